"""The order of work: frames are on their way before the refresh pass, which runs while they are decoded."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import sfrt.cache
from sfrt import Cancelled, Runtime, Session
from sfrt.backends import Rollout
from sfrt.capture import Eager
from sfrt.delivery import Wait
from sfrt.ring import ChunkPlan

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPT = "a red circle moving left"


class Beside:
    """A GPU's outlet by its order alone: frames reach the host when they are waited for, and not before."""

    beside = True

    def __init__(self, log: list[str]) -> None:
        self._log = log
        self._within = False
        self.interrupts = 0

    @contextmanager
    def behind(self, *given: Tensor) -> Iterator[None]:
        self._within = True
        yield
        self._within = False

    def to_host(self, frames: Tensor) -> tuple[Tensor, Wait]:
        assert self._within
        self._log.append(f"decode {len(frames)}")
        host = torch.zeros_like(frames)

        def wait() -> None:
            self._log.append(f"wait {len(frames)}")
            if self.interrupts:
                self.interrupts -= 1
                raise KeyboardInterrupt
            host.copy_(frames)

        return host, wait


class Logged(Eager):
    """A rollout that tells its passes."""

    def __init__(self, rollout: Rollout, log: list[str]) -> None:
        self._rollout, self._log = rollout, log

    def set_text(self, embeds: Tensor) -> None:
        self._rollout.set_text(embeds)

    def place(self, plan: ChunkPlan) -> None:
        self._rollout.place(plan)

    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        self._log.append("step")
        return self._rollout.flow(tokens, timestep)

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        self._log.append("refresh")
        self._rollout.refresh(tokens, timestep)

    def state(self) -> Any:
        return self._rollout.state()

    def load_state(self, state: Any) -> None:
        self._rollout.load_state(state)


@pytest.fixture(scope="module")
def plain(tiny_bundle: Path) -> Runtime:
    return Runtime(tiny_bundle, device="cpu", backend="torch")


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def runtime(tiny_bundle: Path, log: list[str]) -> Runtime:
    """One whose decodes run beside, as on a GPU."""
    runtime = Runtime(tiny_bundle, device="cpu", backend="torch")
    runtime._outlet = Beside(log)
    return runtime


def told(session: Session, log: list[str]) -> Session:
    """The session, its passes told in the log."""
    stage = session._stage
    assert stage is not None
    session._stage = session._context._stage = replace(stage, rollout=Logged(stage.rollout, log))
    return session


def frames_of(session: Session, chunks: int) -> Any:
    return np.concatenate([chunk.frames for chunk in itertools.islice(session, chunks)])


def test_frames_are_queued_before_the_refresh_pass_and_awaited_behind_it(runtime: Runtime, log: list[str]) -> None:
    with told(runtime.session(PROMPT, limit=3), log) as session:
        list(session)
    steps = ["step"] * len(runtime.stream.steps)
    assert log[:-2] == [
        *(*steps, "decode 9", "refresh", "wait 9"),
        *(*steps, "decode 12", "refresh", "wait 12"),
        *steps,
    ]
    assert log[-2:] == ["decode 12", "wait 12"], "a stream that stops does not pay for its last refresh pass"


def test_without_an_outlet_beside_frames_leave_first(plain: Runtime, log: list[str]) -> None:
    with told(plain.session(PROMPT), log) as session:
        next(session)
        assert "refresh" not in log
        session.refresh()
        assert log[-1] == "refresh"


def test_the_first_frame_leaves_early_and_is_the_same(plain: Runtime, runtime: Runtime, log: list[str]) -> None:
    early: list[Any] = []

    def first_frame(frame: Any) -> None:
        log.append("first frame")
        early.append(frame)

    with told(runtime.session(PROMPT, first_frame=first_frame), log) as session:
        shown = frames_of(session, 2)
    steps = len(runtime.stream.steps)
    assert log[steps : steps + 6] == ["decode 1", "decode 8", "refresh", "wait 1", "first frame", "wait 1"]
    with plain.session(PROMPT) as session:
        apart = np.abs(shown.astype(int) - frames_of(session, 2))
    assert apart.max() <= 1, "a frame decoded alone is rounded otherwise"
    assert len(early) == 1 and early[0].shape == (1, 32, 48, 3)
    assert np.array_equal(early[0], shown[:1])


@pytest.mark.parametrize("refresh", ["rolling", "rebuild"])
def test_beside_or_not_the_video_is_the_same(plain: Runtime, runtime: Runtime, refresh: Any) -> None:
    stream, videos = replace(plain.stream, refresh=refresh), []
    for each in (plain, runtime):
        with each.session(PROMPT, stream=stream, seed=3, history=2) as session:
            parts = [frames_of(session, 4)]
            session.switch("a blue square", how="recache")
            parts.append(frames_of(session, 2))
            session.switch("a red square", how="cross")
            parts.append(frames_of(session, 2))
            session.rewind(1)
            parts.append(frames_of(session, 2))
        videos.append(np.concatenate(parts))
    assert np.array_equal(*videos)


def test_an_interrupt_while_frames_are_awaited_leaves_the_stream_where_it_was(plain: Runtime, runtime: Runtime) -> None:
    with plain.session(PROMPT, seed=2) as session:
        wanted = frames_of(session, 6)
    with runtime.session(PROMPT, seed=2) as session:
        shown = [frames_of(session, 4)]
        assert isinstance(runtime._outlet, Beside)
        runtime._outlet.interrupts = 2
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                next(session)
        shown.append(frames_of(session, 2))
    assert np.array_equal(np.concatenate(shown), wanted)


def test_an_interrupt_while_sinks_are_moved_leaves_them_as_they_were_written(
    plain: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = replace(plain.stream, window=7, sink=2, positions="window")
    with plain.session(PROMPT, seed=2, stream=stream) as session:
        wanted = frames_of(session, 5)
    shift, calls = sfrt.cache.shift_keys, itertools.count()

    def interrupted(*arguments: Any) -> Tensor:
        if next(calls) == 1:  # one of the two has moved
            raise KeyboardInterrupt
        return shift(*arguments)

    monkeypatch.setattr(sfrt.cache, "shift_keys", interrupted)
    with plain.session(PROMPT, seed=2, stream=stream) as session:
        shown = [frames_of(session, 2)]
        with pytest.raises(KeyboardInterrupt):
            next(session)
        shown.append(frames_of(session, 3))
    assert np.array_equal(np.concatenate(shown), wanted)


def test_ahead_a_chunk_is_begun_before_the_frames_of_the_one_before_are_awaited(
    plain: Runtime, runtime: Runtime, log: list[str]
) -> None:
    with told(runtime.session(PROMPT, limit=3, seed=1, ahead=True), log) as session:
        chunks = [next(session)]
        assert session.index == 1
        chunks += list(session)
    steps = ["step"] * len(runtime.stream.steps)
    assert log == [
        *(*steps, "decode 9", "refresh"),
        *(*steps, "decode 12", "refresh", "wait 9"),
        *(*steps, "decode 12", "wait 12"),
        "wait 12",
    ]
    assert [chunk.index for chunk in chunks] == [0, 1, 2]
    with plain.session(PROMPT, seed=1) as session:
        assert np.array_equal(np.concatenate([chunk.frames for chunk in chunks]), frames_of(session, 3))


@pytest.mark.parametrize("refresh", ["rolling", "rebuild", "reencode"])
def test_a_stream_that_is_ahead_is_kept_and_taken_back_to_what_was_seen(
    plain: Runtime, runtime: Runtime, refresh: Any, tmp_path: Path
) -> None:
    stream, videos = replace(plain.stream, refresh=refresh), []
    for each in (plain, runtime):
        with each.session(PROMPT, stream=stream, seed=3, history=2, ahead=True) as session:
            parts = [frames_of(session, 5)]
            session.rewind(1)
            assert session.index == 4
            parts.append(frames_of(session, 2))
            session.snapshot(tmp_path / "kept")
            parts.append(frames_of(session, 2))
        with each.restore(tmp_path / "kept") as session:
            assert session.index == 6
            again = frames_of(session, 2)
        assert np.array_equal(again, parts[-1])
        videos.append(np.concatenate(parts))
    assert np.array_equal(*videos)


def test_a_switch_that_nobody_saw_is_made_again(runtime: Runtime) -> None:
    with runtime.session(PROMPT, seed=3, ahead=True) as session:
        frames_of(session, 2)
        session.switch("a blue square")
        next(session)  # the switch takes effect with the chunk that was begun meanwhile
        other = session.fork()
        assert session.prompt == other.prompt == "a blue square"
        receipts = [chunk.receipt for one in (session, other) for chunk in (next(one),)]
        assert [receipt.chunk for receipt in receipts if receipt is not None] == [3, 3]


def test_the_switch_of_the_last_chunk_that_nobody_saw_is_made_again_too(runtime: Runtime) -> None:
    with runtime.session(PROMPT, seed=3, ahead=True) as session:
        frames_of(session, 2)
        session.switch("a blue square")
        assert isinstance(runtime._outlet, Beside)
        runtime._outlet.interrupts = 1
        with pytest.raises(KeyboardInterrupt):
            next(session)  # two are underway: one from before the switch, and one that it took effect with
        other = session.fork()
        assert session.prompt == other.prompt == "a blue square"


def test_cancelled_ahead_what_is_made_is_still_delivered(plain: Runtime, runtime: Runtime) -> None:
    with plain.session(PROMPT, seed=3) as session:
        wanted = frames_of(session, 5)
    with runtime.session(PROMPT, seed=3, ahead=True) as session:
        shown = [frames_of(session, 2)]
        session.cancel()
        with pytest.raises(Cancelled):
            next(session)
        shown.append(frames_of(session, 3))
    assert np.array_equal(np.concatenate(shown), wanted)


def test_previews_are_the_steps_on_the_way_to_the_last_frame(plain: Runtime) -> None:
    with plain.session(PROMPT) as session:
        assert next(session).previews is None
        session.watched = True
        chunk = next(session)
        session.watched = False
        assert next(session).previews is None
    previews = chunk.previews
    assert previews is not None and previews.dtype == np.uint8
    assert previews.shape == (len(plain.stream.steps), 32, 48, 3)
    assert plain._decoder is not None
    pixels, _ = plain._decoder.decode(chunk.latents[None, -1:], None)
    last = (pixels[0, 0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    assert np.abs(previews[-1].astype(int) - last).max() <= 1, "the last one is what the chunk ends with"
    distances = [float(np.abs(one.astype(float) - previews[-1]).mean()) for one in previews[:-1]]
    assert min(distances) > 0


@pytest.mark.gpu
def test_a_gpu_delivers_what_it_decodes(tiny_bundle: Path) -> None:
    runtime = Runtime(tiny_bundle, device="cuda", backend="torch")
    early: list[Any] = []
    with runtime.session(PROMPT, first_frame=early.append) as session:
        chunks = list(itertools.islice(session, 8))
    assert runtime._decoder is not None
    latents = torch.cat([chunk.latents for chunk in chunks])
    pixels, _ = runtime._decoder.decode(latents[None], None)
    whole = (pixels[0].permute(0, 2, 3, 1) * 255).round().to(torch.uint8).cpu().numpy()
    shown = np.concatenate([chunk.frames for chunk in chunks])
    assert np.abs(shown.astype(int) - whole).max() <= 1
    assert np.array_equal(early[0], shown[:1])


@pytest.mark.gpu
def test_a_gpu_is_waited_for_once_a_chunk(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the event behind the frames holds the host up: neither while a ring fills nor when it goes round."""
    runtime = Runtime(tiny_bundle, device="cuda", backend="torch")
    runtime.warm_up()
    waits: list[object] = []
    wait = torch.cuda.Event.synchronize
    monkeypatch.setattr(torch.cuda.Event, "synchronize", lambda event: (waits.append(event), wait(event))[1])
    with runtime.session(PROMPT) as session:
        torch.cuda.set_sync_debug_mode("error")
        try:
            chunks = list(itertools.islice(session, 8))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 2 * len(chunks), "for the frames, and for the time they took, which is over by then"
