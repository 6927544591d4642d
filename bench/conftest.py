"""Options of the benchmark suites, and the one JSON file that a run of them leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from bench.protocol import Case, Figure, write

Record = Callable[[Case, Sequence[Figure]], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sfrt")
    group.addoption("--sfrt-device", default="cpu", help="device to measure on: cpu, cuda, cuda:N")
    group.addoption("--sfrt-shape", default="cpu256", help="random model to measure: cpu256, full21")
    group.addoption("--sfrt-json", type=Path, help="write all figures of this run to a file")


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--sfrt-device"))


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest, device: str) -> Iterator[Record]:
    """Keep a case's figures for the run's file."""
    measured: list[tuple[Case, Sequence[Figure]]] = []
    yield lambda case, figures: measured.append((case, figures))
    path = request.config.getoption("--sfrt-json")
    if path is not None and measured:
        write(path, device, measured)
