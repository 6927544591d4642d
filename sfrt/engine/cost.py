"""What a session costs its device, measured: the time of a chunk, and memory."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from threading import Lock

import numpy as np
import torch

from sfrt.config import StreamConfig
from sfrt.decoders.taehv import TIME
from sfrt.engine.worker import Worker
from sfrt.machine import resident_memory
from sfrt.runtime import Runtime
from sfrt.scheduler import Averages, Demand
from sfrt.session import Session

_STEADY_CHUNKS = 3
"""How many chunks are measured once all is full; their median leaves out the one that had something to prepare."""


@dataclass(frozen=True)
class Kind:
    """The settings that decide what a session costs; one average is kept for each kind."""

    stream: StreamConfig
    sourced: bool = False
    strength: float | None = None
    history: int = 0

    @property
    def frames(self) -> int:
        """Pixel frames of every chunk but the first."""
        return TIME * self.stream.chunk

    @property
    def filling(self) -> int:
        """How many chunks it takes until the ring and the history are full."""
        return max(self.history, -(-(self.stream.window or 0) // self.stream.chunk))


class Costs:
    """What is known of each kind of session on one runtime. The work is done by its worker, between other jobs."""

    def __init__(self, runtime: Runtime, worker: Worker) -> None:
        self._runtime = runtime
        self._worker = worker
        self._measuring = Lock()
        self._chunk_ms = Averages()
        self._memory: dict[Kind, int] = {}

    def of(self, kind: Kind, fps: float) -> Demand:
        """The demand of a session of this kind at fps; measured where it is not known.

        Measuring makes a few chunks of a session that nobody sees. Raises as `Runtime.session`.
        """
        with self._measuring:
            if kind not in self._memory:
                self._measure(kind)
        return Demand(fps, kind.frames, self._chunk_ms.get(kind) or 0.0, self._memory[kind])

    def learn(self, kind: Kind, chunk_ms: float) -> float:
        """Count one more chunk; the average with it."""
        return self._chunk_ms.add(kind, chunk_ms)

    def _measure(self, kind: Kind) -> None:
        do = self._worker.do
        before = do(self._held_bytes)
        session = do(partial(self._sample, kind))
        try:
            taken = [do(partial(_milliseconds, session)) for _ in range(1 + kind.filling + _STEADY_CHUNKS)]
            held = do(self._held_bytes) - before
        finally:
            do(session.close)
        self.learn(kind, statistics.median(taken[-_STEADY_CHUNKS:]))
        self._memory[kind] = max(0, held)

    def _sample(self, kind: Kind) -> Session:
        """A session of this kind that goes by no prompt: no text encoder is loaded for it."""
        model, stream = self._runtime.manifest.model, kind.stream
        black = np.zeros((stream.height, stream.width, 3), np.uint8)
        return self._runtime.session(
            torch.zeros(model.text_len, model.text_dim),
            stream=stream,
            source=repeat(black) if kind.sourced else None,
            strength=kind.strength,
            history=kind.history,
        )

    def _held_bytes(self) -> int:
        """Memory that is taken, up to a constant: of the device, or for a CPU by this program."""
        device = self._runtime.device
        return (resident_memory() or 0) if device.type == "cpu" else -(self._runtime.free_bytes() or 0)


def _milliseconds(session: Session) -> float:
    """How long the next chunk takes."""
    began = time.monotonic()
    next(session)
    return (time.monotonic() - began) * 1e3
