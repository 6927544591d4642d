"""The model alone: one step, one refresh pass, one chunk, the whole clip, per backend and dtype."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import Record, milliseconds
from bench.models import RandomModel, random_model
from sfrt.backends import BACKENDS
from sfrt.benchmark.protocol import Figure, peak
from sfrt.benchmark.roofline import matrix_rate, operations
from sfrt.benchmark.shapes import Shape
from sfrt.errors import ConfigError, DeviceError
from sfrt.session import Session

CHUNKS = 7


@pytest.fixture(scope="module", params=list(itertools.product(BACKENDS, ("float32", "bfloat16"))), ids="-".join)
def model(request: pytest.FixtureRequest, shape: Shape, device: str) -> Iterator[RandomModel]:
    backend, dtype = request.param
    with ExitStack() as stack:
        try:
            ready = stack.enter_context(random_model(shape, backend, dtype, device))
        except (ConfigError, DeviceError) as reason:
            pytest.skip(str(reason))
        yield ready


def test_step(benchmark: BenchmarkFixture, model: RandomModel, record: Record) -> None:
    """One denoising pass with the ring full."""
    (rollout, keys), tokens = model.full_rollout(), model.tokens()
    benchmark.pedantic(model.run, args=(lambda: rollout.flow(tokens, 1000.0),), rounds=30, warmup_rounds=3)
    step = milliseconds("step_ms", benchmark)
    needed = operations(model.shape.model, len(tokens), keys)
    rate = matrix_rate(model.device, model.dtype)
    roofline = Figure("roofline", tuple(needed / (ms / 1e3) / rate for ms in step.samples))
    record(model.case(), [step, roofline, Figure("matrix_tflops", (rate / 1e12,))])


def test_refresh(benchmark: BenchmarkFixture, model: RandomModel, record: Record) -> None:
    """The refresh pass with the ring full."""
    (rollout, _), tokens = model.full_rollout(), model.tokens()
    benchmark.pedantic(model.run, args=(lambda: rollout.refresh(tokens, 0.0),), rounds=30, warmup_rounds=3)
    record(model.case(), [milliseconds("refresh_ms", benchmark)])


def test_clip(benchmark: BenchmarkFixture, model: RandomModel, record: Record) -> None:
    """21 latent frames from noise, and each chunk on the way: denoising, and from one delivery to the next.

    A first chunk follows no other, so it has a figure of its own.
    """
    dit: list[float] = []
    between: list[float] = []

    def ready() -> tuple[tuple[Session], dict[str, Any]]:
        return (model.session(CHUNKS),), {}

    def clip(session: Session) -> None:
        last = time.perf_counter()
        for chunk in session:
            now = time.perf_counter()
            between.append((now - last) * 1e3)
            dit.append(chunk.timings.dit_ms)
            last = now

    clip(model.session(CHUNKS))
    dit.clear()
    between.clear()
    benchmark.pedantic(clip, setup=ready, rounds=8)
    figures = [
        Figure("dit_ms", tuple(dit)),
        Figure("first_chunk_ms", tuple(between[::CHUNKS])),
        Figure("chunk_ms", tuple(ms for number, ms in enumerate(between) if number % CHUNKS)),
        milliseconds("clip_ms", benchmark),
        peak(str(model.device)),
    ]
    record(model.case(), figures)
