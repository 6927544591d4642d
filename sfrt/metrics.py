"""Durations measured where the work happens: the host clock on a CPU, events on a GPU's stream."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import torch


class Stopwatch:
    """Marks along a stretch of work; milliseconds between them once it is done. A mark never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: dict[str, float | torch.cuda.Event] = {}

    def mark(self, name: str) -> None:
        """Remember this moment (on a GPU: when its stream gets here) under a name."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def has(self, name: str) -> bool:
        """Whether this mark was made."""
        return name in self._marks

    def wait(self, name: str) -> None:
        """Wait until the device has passed a mark; on a CPU it has."""
        mark = self._marks[name]
        if isinstance(mark, torch.cuda.Event):
            mark.synchronize()

    def ms(self, start: str, end: str) -> float:
        """Milliseconds from one mark to another; on a GPU the stream must have passed both."""
        first, last = self._marks[start], self._marks[end]
        if isinstance(first, float) and isinstance(last, float):
            return (last - first) * 1e3
        assert isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event)
        elapsed: float = first.elapsed_time(last)
        return elapsed


class StreamMeter:
    """First-frame latency, chunk latency and frame rate of one stream.

    The clock of the first frame starts when the meter is made: make it just before the session. On a runtime that has
    made no video yet it includes the loading of the text encoder, so it is not the protocol's ttff_ms.
    """

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._first_frame_ms = 0.0
        self._chunks: list[tuple[int, float]] = []

    def add(self, frames: int, chunk_ms: float) -> None:
        """Count a chunk that has just been delivered: its pixel frames and how long it took."""
        if not self._chunks:
            self._first_frame_ms = (time.perf_counter() - self._started) * 1e3
        self._chunks.append((frames, chunk_ms))

    @property
    def fps(self) -> float:
        """Pixel frames per second over the steady chunks: all but the first, where there are others."""
        steady = self._chunks[1:] or self._chunks
        milliseconds = sum(chunk_ms for _, chunk_ms in steady)
        return 1e3 * sum(frames for frames, _ in steady) / milliseconds if milliseconds else 0.0

    def __str__(self) -> str:
        return f"the first after {self._first_frame_ms:.0f} ms, then {self.fps:.1f} per second"

    def summary(self) -> dict[str, object]:
        """first_frame_ms, chunk_ms with its percentiles and samples, fps. Needs one chunk at least."""
        samples = [chunk_ms for _, chunk_ms in self._chunks]
        return {
            "first_frame_ms": round(self._first_frame_ms, 3),
            "chunk_ms": {
                **{name: round(value, 3) for name, value in percentiles(samples).items()},
                "samples": [round(sample, 3) for sample in samples],
            },
            "fps": round(self.fps, 3),
        }


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """p50, p95 and p99 of some samples."""
    return {f"p{share}": float(np.percentile(samples, share)) for share in (50, 95, 99)}
