"""The model alone: one step, one refresh pass, one chunk, the whole clip, per backend and dtype."""

from __future__ import annotations

import itertools
import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import Record
from bench.models import SHAPES, RandomModel
from bench.protocol import Figure, peak_gib
from bench.roofline import matrix_rate, operations
from sfrt.backends import BACKENDS
from sfrt.ring import ring_for

CHUNKS = 7


@pytest.fixture(scope="module", params=list(itertools.product(BACKENDS, ("float32", "bfloat16"))), ids="-".join)
def model(request: pytest.FixtureRequest, device: str) -> RandomModel:
    backend, dtype = request.param
    return RandomModel(SHAPES[request.config.getoption("--sfrt-shape")], backend, dtype, device)


def milliseconds(name: str, benchmark: BenchmarkFixture) -> Figure:
    return Figure(name, tuple(seconds * 1e3 for seconds in benchmark.stats.stats.data))


def test_step(benchmark: BenchmarkFixture, model: RandomModel, record: Record) -> None:
    """One denoising pass with the ring full."""
    ring = ring_for(model.shape.stream)
    rollout, tokens = model.rollout(ring), model.tokens()
    rollout.place(ring.plan(ring.slots, model.shape.stream.chunk))
    benchmark.pedantic(model.run, args=(lambda: rollout.flow(tokens, 1000.0),), rounds=30, warmup_rounds=3)
    step = milliseconds("step_ms", benchmark)
    needed = operations(model.shape.model, len(tokens), ring.slots * model.grid.tokens)
    rate = matrix_rate(model.device, model.dtype)
    roofline = Figure("roofline", tuple(needed / (ms / 1e3) / rate for ms in step.samples))
    record(model.case(), [step, roofline, Figure("matrix_tflops", (rate / 1e12,))])


def test_refresh(benchmark: BenchmarkFixture, model: RandomModel, record: Record) -> None:
    """The refresh pass with the ring full."""
    ring = ring_for(model.shape.stream)
    rollout, tokens = model.rollout(ring), model.tokens()
    rollout.place(ring.plan(ring.slots, model.shape.stream.chunk))
    benchmark.pedantic(model.run, args=(lambda: rollout.refresh(tokens, 0.0),), rounds=30, warmup_rounds=3)
    record(model.case(), [milliseconds("refresh_ms", benchmark)])


def test_clip(benchmark: BenchmarkFixture, model: RandomModel, record: Record) -> None:
    """21 latent frames from noise, and each chunk on the way: denoising, and from one delivery to the next."""
    dit: list[float] = []
    between: list[float] = []

    def clip() -> None:
        last = time.perf_counter()
        for chunk in model.session(CHUNKS):
            now = time.perf_counter()
            between.append((now - last) * 1e3)
            dit.append(chunk.timings.dit_ms)
            last = now

    benchmark.pedantic(clip, rounds=8, warmup_rounds=1)
    steady = between[CHUNKS:]  # without the warm-up's
    figures = [
        Figure("dit_ms", tuple(dit[CHUNKS:])),
        Figure("chunk_ms", tuple(steady)),
        milliseconds("clip_ms", benchmark),
        Figure("peak_gib", (peak_gib(str(model.device)),)),
    ]
    record(model.case(), figures)
