"""The built-in model as people use it: prompt to pixel frames in host memory."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import Record, milliseconds, seconds
from sfrt import Runtime
from sfrt.backends import BACKENDS
from sfrt.benchmark.protocol import Case, Figure, case_of, peak
from sfrt.errors import BundleError, ConfigError, DeviceError
from sfrt.ops.frames import frames

PROMPT = "a red circle moving left on a white background"
CHUNKS = 20


@pytest.fixture(scope="module", params=list(itertools.product(BACKENDS, ("float32", "bfloat16"))), ids="-".join)
def setup(request: pytest.FixtureRequest, device: str) -> tuple[Runtime, Case]:
    backend, dtype = request.param
    try:
        runtime = Runtime(device=device, dtype=dtype, backend=backend, prompt_cache=False)
    except (BundleError, ConfigError, DeviceError) as reason:
        pytest.skip(str(reason))
    decoder = runtime.manifest.decoder
    names = (backend, dtype, device)
    kind = decoder.kind if decoder else None
    return runtime, case_of("builtin", runtime.manifest.name, runtime.stream, *names, decoder=kind)


def test_decode(benchmark: BenchmarkFixture, setup: tuple[Runtime, Case], record: Record) -> None:
    """One chunk's latents to uint8 frames on the host, state carried."""
    runtime, case = setup
    with runtime.session(PROMPT, limit=2) as session:
        latents = [chunk.latents.unsqueeze(0) for chunk in session][1]
    decoder = runtime._decoder
    assert decoder is not None

    def decode() -> None:
        frames(decoder.decode(latents, state)[0].squeeze(0)).cpu()

    with torch.no_grad():
        _, state = decoder.decode(latents, None)
        benchmark.pedantic(decode, rounds=20, warmup_rounds=3)
    record(case, [milliseconds("decode_ms", benchmark)])


def test_stream(benchmark: BenchmarkFixture, setup: tuple[Runtime, Case], record: Record) -> None:
    """A stream at full speed: chunk latency and pixel frames per second once the window rolls, decoding included."""
    runtime, case = setup
    window = runtime.stream.window or 0
    warm = window // runtime.stream.chunk + 1

    with runtime.session(PROMPT, seed=1) as session:
        list(itertools.islice(session, warm))
        chunks = []

        def one() -> None:
            chunks.append(next(session))

        benchmark.pedantic(one, rounds=CHUNKS)
    chunk = milliseconds("chunk_ms", benchmark)
    frames = len(chunks[-1].frames)
    figures = [
        chunk,
        Figure("fps", tuple(frames / ms * 1e3 for ms in chunk.samples)),
        Figure("dit_ms", tuple(one.timings.dit_ms for one in chunks)),
        Figure("refresh_ms", tuple(one.timings.refresh_ms for one in chunks)),
        Figure("jitter", (chunk.percentiles["p99"] / chunk.percentiles["p50"],)),
        peak(case.device),
    ]
    record(case, figures)
    assert figures[1].percentiles["p50"] >= runtime.stream.fps, "the built-in model no longer streams in real time"


def test_first_frame(benchmark: BenchmarkFixture, setup: tuple[Runtime, Case], record: Record) -> None:
    """Warm runtime, prompt in → first chunk in host memory; with a prompt never seen, and with one that was."""
    runtime, case = setup
    prompts = (f"{PROMPT} {number}" for number in itertools.count())

    def first(prompt: str) -> float:
        started = time.perf_counter()
        with runtime.session(prompt, limit=1) as session:
            next(session)
        return (time.perf_counter() - started) * 1e3

    first(PROMPT)
    fresh = Figure("ttff_ms", tuple(first(prompt) for prompt in itertools.islice(prompts, 10)))
    benchmark.pedantic(first, args=(PROMPT,), rounds=10)
    cached = milliseconds("ttff_without_text_ms", benchmark)
    record(case, [fresh, cached])


def test_cold_start(benchmark: BenchmarkFixture, setup: tuple[Runtime, Case], record: Record) -> None:
    """A new process, from its start to the first chunk's frames."""
    _, case = setup
    script = (
        "from sfrt import Runtime\n"
        f"runtime = Runtime(device={case.device!r}, dtype={case.dtype!r}, backend={case.backend!r}, "
        "prompt_cache=False)\n"
        f"next(runtime.session({PROMPT!r}))\n"
    )
    benchmark.pedantic(subprocess.run, args=([sys.executable, "-c", script],), kwargs={"check": True}, rounds=3)
    record(case, [Figure("cold_start_s", seconds(benchmark))])
