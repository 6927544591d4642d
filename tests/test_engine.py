"""Several real sessions on one device: each its own video and its own reader, as many as there is room for."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
import time
import weakref
from collections.abc import Iterator
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sfrt import AdmissionError, Chunk, ConfigError, PromptError, Runtime, Session
from sfrt.engine import Engine, Stream
from sfrt.engine.cost import Kind
from tests.engines import FAST, OTHER, PROMPT, Watched, alone
from tests.streams import same
from tests.waiting import wait_until

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
        wait_until(lambda: ignored.stats().tally.dropped >= 10)
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


# Control


def test_closing_gives_up_the_chunk_that_is_being_made(engine: Engine) -> None:
    stream = engine.host(lambda: Watched(engine.runtime.session(PROMPT)))
    assert stream.session.begun.wait(60)
    stream.close()
    stream.close()
    assert stream.get() is None and stream.stats().state == "closed"
    wait_until(lambda: not engine.stats().streams)
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
    monkeypatch.setattr(engine.runtime, "free_bytes", lambda: 2 * needed - 1)
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
    wait_until(lambda: unread.stats().queued == 3)
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
