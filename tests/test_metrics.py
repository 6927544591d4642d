"""The meter of a stream, by arithmetic that can be done by hand."""

from __future__ import annotations

import time

import pytest
import torch

from sfrt.metrics import Stopwatch, StreamMeter


def test_the_first_chunk_is_no_steady_chunk() -> None:
    meter = StreamMeter()
    for frames, milliseconds in ((9, 900.0), (12, 100.0), (12, 200.0), (12, 300.0)):
        meter.add(frames, milliseconds)
    summary = meter.summary()
    assert meter.fps == summary["fps"] == 60.0
    assert summary["chunk_ms"] == {"p50": 250.0, "p95": 810.0, "p99": 882.0, "samples": [900.0, 100.0, 200.0, 300.0]}


def test_one_chunk_is_all_there_is() -> None:
    meter = StreamMeter()
    meter.add(9, 450.0)
    assert meter.fps == 20.0


def test_the_first_frame_is_timed_from_the_start() -> None:
    meter = StreamMeter()
    time.sleep(0.05)
    meter.add(9, 1.0)
    first = meter.summary()["first_frame_ms"]
    assert isinstance(first, float)
    assert first >= 50
    meter.add(12, 1.0)
    assert meter.summary()["first_frame_ms"] == first


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stopwatch_adds_up(device: str) -> None:
    watch = Stopwatch(torch.device(device))
    for name in ("start", "middle", "end"):
        watch.mark(name)
        torch.ones(256, 256, device=device) @ torch.ones(256, 256, device=device)
    if device == "cuda":
        torch.cuda.synchronize()
    total = watch.ms("start", "end")
    assert total > 0
    assert watch.ms("start", "middle") + watch.ms("middle", "end") == pytest.approx(total, abs=0.01)
