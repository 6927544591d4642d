"""Options of the benchmark suites, and the one JSON file that a run of them leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from sfrt.benchmark.protocol import Case, Figure, Result, environment, forget_peak, write
from sfrt.benchmark.shapes import SHAPES, Shape

Record = Callable[[Case, Sequence[Figure]], None]


def seconds(benchmark: BenchmarkFixture) -> tuple[float, ...]:
    """What the benchmark measured; with --benchmark-disable the case ran once and ends here."""
    if benchmark.stats is None:
        pytest.skip("ran once; nothing was measured")
    return tuple(benchmark.stats.stats.data)


def milliseconds(name: str, benchmark: BenchmarkFixture) -> Figure:
    """The same as a figure."""
    return Figure(name, tuple(sample * 1e3 for sample in seconds(benchmark)))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sfrt")
    group.addoption("--sfrt-device", default="cpu", help="device to measure on: cpu, cuda, cuda:N")
    group.addoption("--sfrt-shape", default="cpu256", help="random model to measure: cpu256, 1.3b")
    group.addoption("--sfrt-json", type=Path, help="write all figures of this run to a file")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--sfrt-device"))


@pytest.fixture(scope="session")
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.config.getoption("--sfrt-shape")]


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, device: str) -> Iterator[Record]:
    """Keep a case's figures for the run's file."""
    measured: list[Result] = []
    surroundings = environment(device)
    yield lambda case, figures: measured.append(Result(case, tuple(figures)))
    path = request.config.getoption("--sfrt-json")
    if path is not None and measured:
        write(path, surroundings, measured)


@pytest.fixture(autouse=True)
def _memory_of_its_own(device: str) -> None:
    forget_peak(device)
