"""Several real sessions on one device: each its own video, its own errors, its own reader."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from math import inf
from pathlib import Path
from traceback import walk_tb
from typing import Any

import numpy as np
import pytest

import sfrt.engine.engine
from sfrt import AdmissionError, Chunk, ConfigError, PromptError, Runtime, Session
from sfrt.engine import Engine, Stream
from sfrt.engine.cost import Kind
from sfrt.machine import resident_memory

PROMPT, OTHER = "a red circle moving left", "a blue square moving left"
FAST = 240.0
"""Frames per second at which a test does not wait for the clock."""


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Runtime:
    return Runtime(tiny_bundle, device="cpu", backend="torch")


@pytest.fixture
def engine(runtime: Runtime) -> Iterator[Engine]:
    """Lets everyone in, as a busy machine would refuse what an idle one takes."""
    with Engine(runtime, capacity=inf) as engine:
        yield engine


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.002)


def alone(runtime: Runtime, chunks: int, **settings: Any) -> list[Chunk]:
    with runtime.session(PROMPT, limit=chunks, **settings) as session:
        return list(session)


def same(ours: list[Chunk], theirs: list[Chunk]) -> bool:
    assert [chunk.index for chunk in ours] == [chunk.index for chunk in theirs]
    return all(np.array_equal(one.frames, other.frames) for one, other in zip(ours, theirs, strict=True))


def failing(runtime: Runtime, after: int, error: BaseException, **settings: Any) -> Session:
    """A session whose decoder raises at some chunk."""
    session = runtime.session(PROMPT, **settings)
    stage, decoded = session._stage, itertools.count()
    assert stage is not None and stage.decoder is not None
    decode = stage.decoder.decode

    class Faulty:
        def decode(self, *arguments: Any) -> Any:
            if next(decoded) == after:
                raise error
            return decode(*arguments)

    session._stage = replace(stage, decoder=Faulty())  # type: ignore[arg-type]
    return session


class Watched:
    """A session that says when a chunk is being made, and waits until it may go on or is cancelled."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.begun, self.go_on = threading.Event(), threading.Event()

    def __next__(self) -> Chunk:
        self.begun.set()
        assert self.go_on.wait(60)
        return next(self.session)

    def cancel(self) -> None:
        self.session.cancel()
        self.go_on.set()

    def close(self) -> None:
        self.session.close()


# Chunks


def test_several_sessions_each_get_their_own_video() -> None:
    """The built-in model, four at once."""
    runtime = Runtime(device="cpu")
    reference = [alone(runtime, 4, seed=seed) for seed in range(4)]
    with Engine(runtime, capacity=inf) as engine:
        streams = [engine.open(PROMPT, seed=seed, limit=4, fps=FAST) for seed in range(4)]
        videos: list[list[Chunk]] = [[] for _ in streams]
        readers = [
            threading.Thread(target=lambda ours, video: video.extend(ours), args=pair)
            for pair in zip(streams, videos, strict=True)
        ]
        for thread in readers:
            thread.start()
        for thread in readers:
            thread.join()
        stats = engine.stats()
    assert all(same(ours, theirs) for ours, theirs in zip(videos, reference, strict=True))
    assert stats.tally.made == 16 and stats.tally.dropped == 0 and stats.streams == ()
    assert [stream.stats().state for stream in streams] == ["ended"] * 4
    assert stats.tally.met == sum(stream.stats().tally.met for stream in streams)


def test_frames_come_at_the_rate_asked_for(engine: Engine) -> None:
    began = time.monotonic()
    with engine.open(PROMPT, fps=120, queue=1) as stream:  # a chunk of 12 frames every 100 ms
        for _ in itertools.islice(stream, 8):
            pass
    assert time.monotonic() - began > 0.5, "not as fast as they can be made"


def test_chunk_time_and_memory_are_measured(engine: Engine) -> None:
    demand = engine.measure()
    assert demand.fps == 16 and demand.frames == 12 and demand.chunk_ms > 0 and demand.memory >= 0
    assert engine.measure(sourced=True, strength=0.5, history=2).chunk_ms > 0
    with engine.open(PROMPT, fps=FAST) as stream:
        for _ in itertools.islice(stream, 5):
            pass
        stats = stream.stats()
        assert stats.chunk_ms != demand.chunk_ms, "learnt from its own chunks"
        assert engine.stats().utilisation == pytest.approx(stats.chunk_ms / 50, rel=0.5)


# Readers


@pytest.mark.parametrize("policy", ["block", "drop"])
def test_a_reader_who_never_reads_costs_a_queue(engine: Engine, policy: Any) -> None:
    made: list[weakref.ref[Chunk]] = []

    class Kept(Watched):
        def __next__(self) -> Chunk:
            chunk = next(self.session)
            made.append(weakref.ref(chunk))
            return chunk

    ignored = engine.host(lambda: Kept(engine.runtime.session(PROMPT)), fps=FAST, queue=3, policy=policy)
    with engine.open(OTHER, fps=FAST) as read:
        for _ in itertools.islice(read, 12):
            pass
    if policy == "drop":
        until(lambda: ignored.stats().tally.dropped >= 10)
    ignored.pause()
    ignored.call(lambda _: gc.collect())
    kept = [chunk for chunk in (one() for one in made) if chunk is not None]
    stats = ignored.stats()
    assert stats.queued == len(kept) == 3
    assert stats.chunks == stats.tally.dropped + 3
    assert [ignored.get(1), ignored.get(1), ignored.get(1)] == kept == [one() for one in made[-3:]], "the newest"
    assert stats.tally.dropped == 0 or policy == "drop"
    ignored.close()


def test_chunks_can_be_waited_for_with_or_without_an_event_loop(engine: Engine) -> None:
    async def read(stream: Stream[Session]) -> list[Chunk]:
        return [chunk async for chunk in stream]

    go_on = threading.Event()

    async def all_of_them() -> list[list[Chunk]]:
        settings = {"limit": 3, "fps": FAST, "ready": go_on.is_set}
        streams = [await engine.open_async(PROMPT, seed=seed, **settings) for seed in range(3)]
        hasty = asyncio.ensure_future(streams[0].__anext__())
        await asyncio.sleep(0)
        hasty.cancel()  # a reader that goes away takes no chunk with it
        go_on.set()
        streams[0].wake()
        return await asyncio.gather(*map(read, streams))

    videos = asyncio.run(all_of_them())
    with engine.open(PROMPT, seed=1, limit=3, fps=FAST) as stream:
        assert same(list(stream), videos[1])
        assert stream.get() is None and list(stream) == []
    assert [len(video) for video in videos] == [3, 3, 3]


def test_opening_that_is_given_up_leaves_nothing(engine: Engine) -> None:
    engine.measure()
    busy = engine.host(lambda: Watched(engine.runtime.session(PROMPT)))
    assert busy.session.begun.wait(60)

    async def give_up() -> None:
        opening = asyncio.ensure_future(engine.open_async(PROMPT))
        await asyncio.sleep(0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        busy.close()
        while engine.stats().admitted < 2 or engine.stats().streams:
            await asyncio.sleep(0.01)

    asyncio.run(give_up())


def test_waiting_has_a_limit(engine: Engine) -> None:
    with engine.host(lambda: Watched(engine.runtime.session(PROMPT))) as stream:
        assert stream.session.begun.wait(60)
        for _ in range(100):
            with pytest.raises(TimeoutError, match="no chunk"):
                stream.get(timeout=0.001)
        assert len(stream._waiters) == 1, "those who have gone are forgotten"
        stream.session.go_on.set()
        assert stream.get(60) is not None


# Faults


@pytest.mark.parametrize("error", [RuntimeError("the device fell over"), StopAsyncIteration(), SystemExit()])
def test_a_failure_reaches_its_own_reader_and_nobody_else(engine: Engine, error: BaseException) -> None:
    reference = alone(engine.runtime, 6, seed=1)
    good = engine.open(PROMPT, seed=1, limit=6, fps=FAST)
    bad = engine.host(partial(failing, engine.runtime, 2, error, seed=1), fps=FAST, queue=4)
    until(lambda: bad.stats().state == "failed")
    assert same([bad.get() or pytest.fail(), bad.get() or pytest.fail()], reference[:2]), "what was made is delivered"
    with pytest.raises(type(error)) as caught:
        bad.get()
    assert caught.value is error
    assert bad.get() is None, "told once"
    assert same(list(good), reference)
    assert engine.stats().failed == 1 and type(error).__name__ in str(bad.stats().error)
    with pytest.raises(ConfigError, match="over"):
        bad.call(lambda session: session.refresh())


def test_a_session_that_cannot_be_made_takes_no_place(engine: Engine) -> None:
    with pytest.raises(PromptError):
        engine.open("")
    with pytest.raises(ConfigError, match="limit"):
        engine.open(PROMPT, limit=0)
    with pytest.raises(ConfigError, match="queue"):
        engine.open(PROMPT, queue=0)
    with pytest.raises(ConfigError, match="fps"):
        engine.open(PROMPT, fps=0)
    assert engine.stats().streams == () and engine.stats().admitted == 0
    assert len(list(engine.open(PROMPT, limit=2, fps=FAST))) == 2


def test_a_failed_session_lets_go_of_what_it_worked_on(engine: Engine) -> None:
    """Though its reader keeps the error."""
    bad = engine.host(partial(failing, engine.runtime, 0, RuntimeError("no")))
    with pytest.raises(RuntimeError) as caught:
        bad.get()
    frames = [frame for frame, _ in walk_tb(caught.tb)]
    inside = [frame for frame in frames if frame.f_code.co_filename.endswith("sfrt/session.py")]
    assert inside and all(not frame.f_locals for frame in inside)


def test_what_failed_between_two_chunks_is_let_go_at_once(engine: Engine) -> None:
    """Device memory must not wait for Python's collector of cycles."""
    held: list[weakref.ref[np.ndarray[Any, Any]]] = []

    def work(_: Session) -> None:
        big = np.zeros(9)
        held.append(weakref.ref(big))
        raise RuntimeError("no")

    with engine.open(PROMPT, fps=1) as stream:
        gc.disable()
        try:
            with suppress(RuntimeError):
                stream.call(work)
            until(lambda: held[0]() is None)
        finally:
            gc.enable()


def test_a_session_that_cannot_be_closed_goes_all_the_same(engine: Engine) -> None:
    class Stubborn(Watched):
        def close(self) -> None:
            super().close()
            raise RuntimeError("no")

    stubborn = engine.host(lambda: Stubborn(engine.runtime.session(PROMPT)))
    stubborn.close()
    assert len(list(engine.open(PROMPT, limit=2, fps=FAST))) == 2
    assert engine.stats().streams == ()


def test_fifty_come_and_go(engine: Engine) -> None:
    """Read, not read, and in the middle of a chunk."""
    engine.measure()
    sessions: list[weakref.ref[Session]] = []
    threads = threading.active_count()

    def come_and_go(number: int) -> None:
        with engine.open(PROMPT, seed=number, fps=FAST) as stream:
            sessions.append(weakref.ref(stream.session))
            for _ in itertools.islice(stream, number % 3):
                pass

    for number in range(10):
        come_and_go(number)
    until(lambda: not engine.stats().streams)
    before = resident_memory() or 0
    for number in range(50):
        come_and_go(number)
    until(lambda: not engine.stats().streams)
    gc.collect()
    assert threading.active_count() == threads
    assert [one for one in sessions if one() is not None] == []
    assert (resident_memory() or 0) - before < 16 << 20
    assert engine.stats().admitted == 60 and len(engine._scheduler.lanes) == 0


# Control


def test_closing_gives_up_the_chunk_that_is_being_made(engine: Engine) -> None:
    stream = engine.host(lambda: Watched(engine.runtime.session(PROMPT)))
    assert stream.session.begun.wait(60)
    stream.close()
    stream.close()
    assert stream.get() is None and stream.stats().state == "closed"
    until(lambda: not engine.stats().streams)
    assert stream.session.session._stage is None, "closed for good"
    assert engine.stats().tally.made == 0


def test_cancelling_a_chunk_is_no_failure(engine: Engine) -> None:
    reference = alone(engine.runtime, 2, seed=3)
    stream = engine.host(lambda: Watched(engine.runtime.session(PROMPT, seed=3, limit=2)), fps=FAST)
    assert stream.session.begun.wait(60)
    stream.session.cancel()  # and the same chunk is made again
    assert same(list(stream), reference)


def test_a_pause_stops_one_stream_only(engine: Engine) -> None:
    with engine.open(PROMPT, fps=FAST) as paused, engine.open(OTHER, fps=FAST) as other:
        assert paused.get() is not None
        paused.pause()
        paused.call(lambda _: None)  # a chunk that was being made is done
        paused.clear()
        made = paused.stats().chunks
        for _ in itertools.islice(other, 6):
            pass
        assert paused.stats().chunks == made and paused.stats().state == "paused"
        late = paused.stats().tally.late
        time.sleep(0.2)
        paused.resume()
        assert (chunk := paused.get()) is not None and chunk.index == made, "it goes on where it stood"
        assert paused.stats().tally.late <= late + 1, "a pause is not lateness; a busy machine may be late itself"


def test_between_two_chunks_a_session_does_what_it_is_told(engine: Engine, tmp_path: Path) -> None:
    with engine.open(PROMPT, fps=FAST, seed=2, history=4) as stream:
        for _ in itertools.islice(stream, 2):
            pass
        stream.pause()
        stream.call(lambda session: session.rewind(1))
        stream.clear()
        assert stream.call(lambda session: threading.current_thread().name) == "sfrt-engine"
        with pytest.raises(PromptError):
            stream.call(lambda session: session.switch(""))
        stream.call(lambda session: session.switch(OTHER))
        stream.call(lambda session: session.snapshot(tmp_path / "kept"))
        stream.resume()
        chunk = stream.get()
        assert chunk is not None and chunk.receipt is not None and chunk.receipt.chunk == chunk.index
    with engine.host(lambda: engine.runtime.restore(tmp_path / "kept"), fps=FAST) as restored:
        again = restored.get()
    assert again is not None and same([again], [chunk])


def test_a_camera_is_not_waited_for(engine: Engine) -> None:
    """No chunk is begun before the frames for it are there, and others run meanwhile."""
    frames: list[np.ndarray[Any, Any]] = []
    wanted = [9]

    def feed() -> Iterator[np.ndarray[Any, Any]]:
        while True:
            assert frames, "the device would wait"
            yield frames.pop(0)

    def ready() -> bool:
        return len(frames) >= wanted[0]

    with engine.open(PROMPT, fps=FAST, source=feed(), strength=0.5, ready=ready) as filmed:
        with engine.open(OTHER, fps=FAST) as other:
            for _ in itertools.islice(other, 4):
                pass
        assert filmed.stats().chunks == 0
        for count in (9, 12, 12):
            wanted[0] = count
            frames.extend([np.full((32, 48, 3), 90, np.uint8)] * count)
            filmed.wake()
            chunk = filmed.get(60)
            assert chunk is not None and len(chunk.frames) == count


def test_who_cannot_say_whether_it_is_ready_has_failed(engine: Engine) -> None:
    def ready() -> bool:
        raise OSError("the camera is gone")

    with engine.open(PROMPT, fps=FAST, limit=3) as good, engine.open(PROMPT, ready=ready) as bad:
        with pytest.raises(OSError, match="gone"):
            bad.get()
        assert bad.session._stage is None, "let go of"
        assert len(list(good)) == 3
    assert engine.stats().failed == 1


def test_many_threads_at_once(engine: Engine) -> None:
    """Opened, read, paused, resumed and closed from everywhere; nothing is lost, nothing hangs."""
    engine.measure()
    counts: list[int] = []

    def meddle(stream: Stream[Session]) -> None:
        stream.pause()
        stream.wake()
        stream.resume()

    def use(number: int) -> None:
        for _ in range(3):
            stream = engine.open(PROMPT, seed=number, limit=4, fps=FAST, queue=1 + number % 3)
            meddler = threading.Timer(0.005, meddle, args=(stream,))
            meddler.start()
            counts.append(len([chunk.index for chunk in stream]))
            meddler.join()

    threads = [threading.Thread(target=use, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert counts == [4] * 15
    assert engine.stats().tally.made == 60


# Admission


def test_no_more_is_let_in_than_there_is_time_for(runtime: Runtime) -> None:
    with Engine(runtime, capacity=0.5) as engine:
        demand = engine.measure()
        fps = 0.4 * demand.frames / demand.chunk_ms * 1e3  # each takes 40 %
        holding = engine.open(PROMPT, fps=fps)
        holding.pause()
        with pytest.raises(AdmissionError, match=r"one more beside the 1 that run .* above 50%"):
            for _ in range(20):
                engine.open(PROMPT, fps=fps * 2).pause()
        assert engine.stats().refused == 1
        assert engine.stats().load <= 0.5 or engine.stats().streams[0].chunks > 1


def test_no_more_is_let_in_than_there_is_memory_for(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = 1 << 30
    engine.measure()
    engine._costs._memory[Kind(engine.runtime.stream)] = needed
    monkeypatch.setattr(sfrt.engine.engine, "free_bytes", lambda device: 2 * needed - 1)
    with engine.open(PROMPT, ready=lambda: False) as first:
        with pytest.raises(AdmissionError, match=r"needs 1\.00 GiB and 1\.00 GiB are free .* the 1 that run"):
            engine.open(PROMPT)
        first.close()
        engine.open(PROMPT).close()


def test_at_most_so_many(runtime: Runtime) -> None:
    with Engine(runtime, capacity=inf, most=2) as engine:
        first, _ = engine.open(PROMPT, fps=1), engine.open(PROMPT, fps=1)
        with pytest.raises(AdmissionError, match="2 streams are all"):
            engine.open(PROMPT, fps=1)
        first.close()
        assert engine.open(PROMPT, fps=1).get() is not None


# The end


def test_closing_the_engine_ends_all_streams(runtime: Runtime) -> None:
    before = set(threading.enumerate())
    engine = Engine(runtime, capacity=inf)
    unread = engine.open(PROMPT, fps=FAST, queue=3)
    waiting = engine.open(PROMPT, ready=lambda: False)
    reader = threading.Thread(target=lambda: list(waiting))
    reader.start()
    until(lambda: unread.stats().queued == 3)
    engine.close()
    engine.close()
    reader.join(60)
    assert not reader.is_alive() and set(threading.enumerate()) == before
    assert [chunk.index for chunk in unread] == [0, 1, 2], "what was made can still be taken"
    for refused in (lambda: engine.open(PROMPT), lambda: unread.call(lambda _: None)):
        with pytest.raises(ConfigError, match="engine is closed"):
            refused()
    for harmless in (unread.pause, unread.resume, unread.wake, unread.clear, unread.close):
        harmless()
    assert engine.stats().streams == ()


def test_closing_waits_only_so_long(runtime: Runtime) -> None:
    engine = Engine(runtime)
    stream = engine.host(lambda: Watched(runtime.session(PROMPT)))
    assert stream.session.begun.wait(60)
    with pytest.raises(TimeoutError, match="not done"):
        engine.close(timeout=0.01)
    stream.session.go_on.set()
    engine.close()
    assert stream.get() is not None and stream.get() is None
