"""Durations measured where the work happens: the host clock on a CPU, events on a GPU's stream."""

from __future__ import annotations

import time

import torch


class Stopwatch:
    """Marks along a stretch of work; milliseconds between them once it is done. A mark never waits for the device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: dict[str, float | torch.cuda.Event] = {}

    def mark(self, name: str) -> None:
        """Remember this moment (on a GPU: when its stream gets here) under a name."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks[name] = event
        else:
            self._marks[name] = time.perf_counter()

    def ms(self, start: str, end: str) -> float:
        """Milliseconds from one mark to another; on a GPU the stream must have passed both."""
        first, last = self._marks[start], self._marks[end]
        if isinstance(first, float) and isinstance(last, float):
            return (last - first) * 1e3
        assert isinstance(first, torch.cuda.Event) and isinstance(last, torch.cuda.Event)
        return first.elapsed_time(last)
