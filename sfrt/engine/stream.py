"""The reader's end of one session on an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Generic, Literal, Protocol, TypeVar

from sfrt.chunk import Chunk
from sfrt.engine.worker import Worker
from sfrt.errors import ConfigError
from sfrt.scheduler import Lane, Tally

State = Literal["running", "paused", "ended", "failed", "closed"]


class Streamable(Protocol):
    """What an engine can run: a `Session`, or anything that makes chunks as one does."""

    def __next__(self) -> Chunk: ...

    def cancel(self) -> None:
        """Give up the chunk that is being made, soon; called from any thread."""

    def close(self) -> None: ...


S = TypeVar("S", bound=Streamable)
R = TypeVar("R")


@dataclass(frozen=True)
class StreamStats:
    """One stream: frames per second asked for, chunks waiting to be taken, how deadlines were kept.

    due_ms is how long from now the next chunk is due, below 0 where it is late; chunk_ms is what a chunk of its kind
    takes by the engine's average; error is what it failed of.
    """

    state: State
    fps: float
    chunks: int
    queued: int
    room: int
    due_ms: float
    chunk_ms: float
    tally: Tally
    error: str | None


class Stream(Generic[S]):
    """One session on an engine: its chunks come out here, in order, each once. All of it may be used from any thread.

    The chunks that were made before the session ended or failed are delivered first; then iterating ends, or raises the
    session's own error, once. Close it, or use it as a context manager: an abandoned one holds its place and memory.

    Attributes: session (only what may be called from any thread is called on it directly; the rest through `call`).
    """

    def __init__(self, session: S, lane: Lane[Chunk], worker: Worker) -> None:
        """Made by `Engine.open` and `Engine.host`."""
        self.session = session
        self._lane = lane
        self._worker = worker
        self._waiters: list[Future[None]] = []
        self._state: State = "running"
        self._error: BaseException | None = None
        self._failure: str | None = None

    def get(self, timeout: float | None = None) -> Chunk | None:
        """The next chunk, once it is there; None where the stream has ended.

        Raises TimeoutError after so many seconds, and the session's error where it has failed.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while isinstance(found := self._take(), Future):
            left = None if end is None else max(0.0, end - time.monotonic())
            if not wait([found], left).done and found.cancel():
                raise TimeoutError(f"no chunk came within {timeout} s")
        return found

    def __iter__(self) -> Iterator[Chunk]:
        return self

    def __next__(self) -> Chunk:
        chunk = self.get()
        if chunk is None:
            raise StopIteration
        return chunk

    def __aiter__(self) -> AsyncIterator[Chunk]:
        return self

    async def __anext__(self) -> Chunk:
        while isinstance(found := self._take(), Future):
            await asyncio.wrap_future(found)
        if found is None:
            raise StopAsyncIteration
        return found

    def call(self, work: Callable[[S], R]) -> R:
        """Run work(session) on the device's thread, between two chunks: a switch, a snapshot, a rewind, a fork.

        Waits for it, so an event loop calls it in a thread (`asyncio.to_thread`); the work itself must not wait for the
        engine. Raises what the work raises, and
        ConfigError where the stream is over.
        """

        def between_chunks() -> R:
            if self.over:
                raise ConfigError("the stream is over; open another one")
            return work(self.session)

        return self._worker.do(between_chunks)

    def pause(self) -> None:
        """Make no more chunks until `resume`. Those that are made can be taken; memory stays."""
        with self._worker.changes():
            self._lane.hold("paused", time.monotonic())

    def resume(self) -> None:
        """Go on; the time in between is not counted as late."""
        with self._worker.changes():
            self._lane.release("paused", time.monotonic())

    def wake(self) -> None:
        """Have `ready` asked again: something has changed."""
        with self._worker.changes():
            pass

    def clear(self) -> None:
        """Let the chunks go that wait to be taken, as after a rewind: the next one is shown as soon as it is there."""
        with self._worker.changes():
            self._lane.clear(time.monotonic())

    def close(self) -> None:
        """End the stream now: the chunk being made is given up, what waits is let go, iterating ends.

        Never waits: the device's thread lets the session's memory go as soon as it can. Closing twice is fine.
        """
        with self._worker.changes():
            self._lane.clear(time.monotonic())
            if not self.over:
                self.finish("closed")
                self.session.cancel()

    def __enter__(self) -> Stream[S]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def stats(self) -> StreamStats:
        """Everything counted, now."""
        with self._worker.lock:
            lane = self._lane
            return StreamStats(
                state="paused" if lane.held("paused") and not self.over else self._state,
                fps=lane.demand.fps,
                chunks=lane.tally.made,
                queued=len(lane),
                room=lane.room,
                due_ms=(lane.due - time.monotonic()) * 1e3,
                chunk_ms=lane.demand.chunk_ms,
                tally=replace(lane.tally),
                error=self._failure,
            )

    @property
    def over(self) -> bool:
        """Whether no more chunks will be made."""
        return self._state not in ("running", "paused")

    def deliver(self, chunk: Chunk, frames: int) -> None:
        """For the engine: a chunk of so many pixel frames is done."""
        with self._worker.lock:
            if not self.over:
                self._lane.put(chunk, frames, time.monotonic())
                self._tell()

    def finish(self, state: State, error: BaseException | None = None) -> None:
        """For the engine: no more chunks come. What is over stays as it ended."""
        with self._worker.lock:
            if not self.over:
                self._state, self._error = state, error
                self._failure = None if error is None else f"{type(error).__name__}: {error}"
                self._tell()

    def _take(self) -> Chunk | Future[None] | None:
        """The oldest chunk; None at the end of the stream; else what is done once this is worth asking again."""
        with self._worker.lock:
            if len(self._lane):
                with self._worker.changes():  # there is room now
                    return self._lane.take(time.monotonic())
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.over:
                return None
            self._waiters = [waiter for waiter in self._waiters if not waiter.cancelled()]
            waiter: Future[None] = Future()
            self._waiters.append(waiter)
            return waiter

    def _tell(self) -> None:
        """Wake all who wait for a chunk."""
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if waiter.set_running_or_notify_cancel():
                waiter.set_result(None)
