"""Runs the sessions of one runtime in the order the scheduler says, each for its own reader."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from traceback import clear_frames
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from sfrt.chunk import Chunk
from sfrt.config import StreamConfig
from sfrt.engine.cost import Costs, Kind
from sfrt.engine.stream import State, Stream, Streamable, StreamStats
from sfrt.engine.worker import Job, Worker
from sfrt.errors import AdmissionError, Cancelled
from sfrt.machine import give_back_memory
from sfrt.runtime import Runtime
from sfrt.scheduler import Demand, Lane, Policy, Scheduler, Tally, load, utilisation
from sfrt.session import Session

S = TypeVar("S", bound=Streamable)

Ready = Callable[[], bool]


@dataclass(frozen=True)
class EngineStats:
    """All streams, in the order they came, and the device: shares of its time, free bytes, counts since it began."""

    streams: tuple[StreamStats, ...]
    utilisation: float
    load: float
    capacity: float
    free_bytes: int | None
    tally: Tally
    admitted: int
    refused: int
    failed: int


@dataclass(frozen=True, eq=False)
class _Place:
    """What the engine keeps of one stream."""

    stream: Stream[Any]
    lane: Lane[Chunk]
    kind: Kind
    ready: Ready | None


class Engine:
    """Runs streams of one runtime, earliest deadline first, and lets in what the device has time and memory for.

    One thread owns the device: it makes all chunks, and does all else that a session or the runtime is asked for
    through here, between two of them. Close the engine, or use it as a context manager.

    Attributes: runtime.
    """

    def __init__(self, runtime: Runtime, *, capacity: float = 0.9, most: int | None = None) -> None:
        """capacity is the part of the device's time that may be given away; above 1 it is more than there is.

        most is how many streams there may be at once (None: any number). Raises ConfigError.
        """
        self.runtime = runtime
        self._scheduler: Scheduler[Chunk] = Scheduler(capacity, most)
        # Changed by the worker's thread alone, and within its lock, as others look at it.
        self._places: dict[Lane[Chunk], _Place] = {}
        self._counts: Counter[str] = Counter()
        device = runtime.device
        self._worker = Worker(self._choose, torch.cuda.device(device) if device.type == "cuda" else nullcontext())
        self._costs = Costs(runtime, self._worker)
        self._worker.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open(
        self,
        prompt: str | Tensor,
        *,
        fps: float | None = None,
        queue: int = 2,
        policy: Policy = "block",
        ready: Ready | None = None,
        **settings: Any,
    ) -> Stream[Session]:
        """A new stream; settings are those of `Runtime.session`: seed, stream, initial, source, strength, limit …

        fps is how many pixel frames per second are wanted (None: the model's own rate). queue is how many chunks may
        be made ahead of the one being shown, and so how many can wait to be taken; policy says what happens when so
        many wait: "block" makes no more until one is taken, "drop" lets the oldest go. No chunk is begun while ready()
        is False, for a source that must not be waited for, as the device would wait with it: it is asked before every
        chunk, must be quick, and `Stream.wake` has it asked again.

        The first stream of its kind has a chunk's time and memory measured first (see `measure`). Waits for the
        device's thread: an event loop uses `open_async`. Raises AdmissionError where the device has no room, and what
        Runtime.session raises.
        """
        return self.host(
            partial(self.runtime.session, prompt, **settings),
            stream=settings.get("stream"),
            sourced=settings.get("source") is not None,
            strength=settings.get("strength"),
            history=settings.get("history", 0),
            fps=fps,
            queue=queue,
            policy=policy,
            ready=ready,
        )

    async def open_async(self, prompt: str | Tensor, **settings: Any) -> Stream[Session]:
        """`open` for an event loop. Where it is cancelled, the stream that comes of it is closed."""
        return await _unless_cancelled(asyncio.to_thread(self.open, prompt, **settings))

    def host(
        self,
        make: Callable[[], S],
        *,
        stream: StreamConfig | None = None,
        sourced: bool = False,
        strength: float | None = None,
        history: int = 0,
        fps: float | None = None,
        queue: int = 2,
        policy: Policy = "block",
        ready: Ready | None = None,
    ) -> Stream[S]:
        """A stream of a session made otherwise, as by `Runtime.restore`: make() runs on the device's thread, if let in.

        stream, sourced, strength and history say what it costs: they are settings of a session that this engine could
        open. Raises as `open`.
        """
        kind = Kind(stream or self.runtime.stream, sourced, strength, history)
        free_of_cost = Demand(kind.stream.fps if fps is None else fps, kind.frames, chunk_ms=0.0)
        Lane(free_of_cost, 0.0, room=queue, policy=policy)  # a bad setting is refused before anything is made
        self._worker.do(partial(self._admit, free_of_cost))  # and a full house before anything is measured
        demand = self._costs.of(kind, free_of_cost.fps)

        def begin() -> Stream[S]:
            self._admit(demand)
            session = make()
            lane: Lane[Chunk] = Lane(demand, time.monotonic(), room=queue, policy=policy)
            begun = Stream(session, lane, self._worker)
            with self._worker.changes():
                self._scheduler.add(lane)
                self._places[lane] = _Place(begun, lane, kind, ready)
                self._counts["admitted"] += 1
            return begun

        return self._worker.do(begin)

    async def host_async(self, make: Callable[[], S], **settings: Any) -> Stream[S]:
        """`host` for an event loop. Where it is cancelled, the stream that comes of it is closed."""
        return await _unless_cancelled(asyncio.to_thread(lambda: self.host(make, **settings)))

    def measure(
        self,
        stream: StreamConfig | None = None,
        *,
        sourced: bool = False,
        strength: float | None = None,
        history: int = 0,
    ) -> Demand:
        """What a stream of these settings needs at its own frame rate: chunk time and memory, measured if not known.

        Measuring makes a few chunks of a session that nobody sees, between the others' chunks; a server does it before
        it opens. Chunk times go on being averaged over all chunks made. Raises as `Runtime.session`.
        """
        kind = Kind(stream or self.runtime.stream, sourced, strength, history)
        return self._costs.of(kind, kind.stream.fps)

    def holds(self, demand: Demand) -> int | None:
        """How many streams with this demand the device's time is enough for; None where it sets no limit."""
        return self._scheduler.holds(demand)

    def ping(self) -> None:
        """Wait until the device's thread answers, which it does between two chunks. Raises ConfigError once closed."""
        self._worker.do(lambda: None)

    def stats(self) -> EngineStats:
        """Everything counted, now."""
        with self._worker.lock:
            demands, counts = self._scheduler.demands, self._counts
            return EngineStats(
                streams=tuple(place.stream.stats() for place in self._places.values()),
                utilisation=utilisation(demands),
                load=load(demands),
                capacity=self._scheduler.capacity,
                free_bytes=self.runtime.free_bytes(),
                tally=self._scheduler.tally,
                admitted=counts["admitted"],
                refused=counts["refused"],
                failed=counts["failed"],
            )

    def close(self, timeout: float | None = None) -> None:
        """Stop: finish the chunk that is being made, close all sessions, end the thread. Closing twice is fine.

        What was made can still be taken; then the streams end. Raises TimeoutError where the thread has not ended
        after so many seconds.
        """
        self._worker.close(self._end_all, timeout)

    def _admit(self, demand: Demand) -> None:
        self._sweep()
        with self._worker.lock:
            try:
                self._scheduler.admit(demand, self.runtime.free_bytes())
            except AdmissionError:
                self._counts["refused"] += 1
                raise

    def _choose(self) -> Job | float | None:
        """For the worker: make the most urgent chunk; else how long there will be nothing to do."""
        self._sweep()
        asked = [place for place in self._places.values() if place.ready is not None]
        answers = {place.lane: self._is_ready(place) for place in asked}
        with self._worker.lock:
            now = time.monotonic()
            for lane, ready in answers.items():
                if ready:
                    lane.release("not ready", now)
                else:
                    lane.hold("not ready", now)
            urgent = self._scheduler.pick(now)
            if urgent is not None:
                return partial(self._make_chunk, self._places[urgent])
            opens = self._scheduler.opens()
            return None if opens is None else max(0.0, opens - now)

    def _is_ready(self, place: _Place) -> bool:
        """Ask, outside the lock, as the answer may need others."""
        assert place.ready is not None
        try:
            return place.ready()
        except BaseException as error:  # its fault, and nobody else's
            self._end(place, "failed", error)
            return False

    def _make_chunk(self, place: _Place) -> None:
        began = time.monotonic()
        try:
            chunk: Chunk = next(place.stream.session)
        except Cancelled:
            return  # as asked: the stream stands where it stood
        except StopIteration:
            self._end(place, "ended")
        except BaseException as error:  # its fault, and nobody else's
            self._end(place, "failed", error)
        else:
            self._learn(place, (time.monotonic() - began) * 1e3)
            place.stream.deliver(chunk, len(chunk.frames) or place.kind.frames)

    def _learn(self, place: _Place, chunk_ms: float) -> None:
        with self._worker.lock:
            if place.lane.begun:  # a first chunk is another thing: shorter, and without a refresh pass
                average = self._costs.learn(place.kind, chunk_ms)
                for lane in [other.lane for other in self._places.values() if other.kind == place.kind]:
                    lane.demand = replace(lane.demand, chunk_ms=average)

    def _end(self, place: _Place, state: State, error: BaseException | None = None) -> None:
        """Let a session and its memory go, and say so to those who read it."""
        if error is not None:
            _clear_frames(error)
        with suppress(Exception):  # what has failed may fail to close, too
            place.stream.session.close()
        give_back_memory()
        with self._worker.lock:
            place.stream.finish(state, error)
            self._scheduler.remove(place.lane)
            del self._places[place.lane]
            self._counts[place.stream.stats().state] += 1

    def _sweep(self) -> None:
        """Let go of the streams that were closed."""
        for place in [place for place in self._places.values() if place.stream.over]:
            self._end(place, "closed")

    def _end_all(self) -> None:
        for place in list(self._places.values()):
            self._end(place, "closed")


def _clear_frames(error: BaseException) -> None:
    """Let go of what was being worked on when this was raised: a reader may keep the error for long."""
    cause: BaseException | None = error
    while cause is not None:
        clear_frames(cause.__traceback__)
        cause = cause.__cause__ or cause.__context__


async def _unless_cancelled(work: Coroutine[Any, Any, Stream[S]]) -> Stream[S]:
    opening = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unwanted)
        raise


def _close_unwanted(opening: asyncio.Future[Stream[Any]]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().close()
