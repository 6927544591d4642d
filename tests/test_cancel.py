"""Cancelling: between two passes, from any thread, and the stream goes on as if nothing had been."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier, Thread
from typing import Any

import numpy as np
import pytest

from sfrt import Cancelled, Chunk, Runtime, Session
from tests.streams import same, take

PROMPT, OTHER = "a red circle moving left", "a blue square moving left"


@dataclass
class Passes:
    """Counts the passes of a session, and does something during one of them."""

    session: Session
    during: int
    act: Callable[[], None]
    count: int = 0

    def __post_init__(self) -> None:
        stage = self.session._stage
        assert stage is not None
        for name in ("flow", "refresh"):
            setattr(stage.rollout, name, self._watched(getattr(stage.rollout, name)))

    def _watched(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def passed(*arguments: Any) -> Any:
            self.count += 1
            if self.count == self.during:
                self.act()
            return call(*arguments)

        return passed


def in_another_thread(act: Callable[[], None]) -> None:
    thread = Thread(target=act)
    thread.start()
    thread.join()


@pytest.mark.parametrize("during", range(1, 6))
def test_the_next_pass_is_not_run(runtime: Runtime, during: int) -> None:
    """The refresh pass of the chunk before, then four steps, then the decoder."""
    with runtime.session(PROMPT, seed=1) as session:
        expected = take(session, 7)
    with runtime.session(PROMPT, seed=1) as session:
        made = take(session, 4)
        passes = Passes(session, during, lambda: in_another_thread(session.cancel))
        with pytest.raises(Cancelled, match="ask for the next one to go on"):
            next(session)
        assert passes.count == during
        assert same([*made, *take(session, 3)], expected)
        done = 1 + 4 + 2 * 5  # no refresh pass twice
        assert passes.count == during + done - 1


def test_every_model_and_backend(any_runtime: Runtime) -> None:
    with any_runtime.session(PROMPT, seed=1) as session:
        expected = take(session, 6)
    with any_runtime.session(PROMPT, seed=1) as session:
        made = take(session, 4)
        Passes(session, 3, session.cancel)
        with pytest.raises(Cancelled):
            next(session)
        assert same([*made, *take(session, 2)], expected)


@pytest.mark.parametrize("during", [1, 2, 3])
@pytest.mark.parametrize("settings", [{}, {"positions": "window"}, {"refresh": "rebuild", "window": 8, "sink": 1}])
def test_a_replay_cut_short_is_made_again(runtime: Runtime, during: int, settings: dict[str, Any]) -> None:
    """Of a recache, and of a ring that is rebuilt for every chunk."""
    stream = replace(runtime.stream, **settings)

    def run(session: Session, cancelled: bool) -> list[Chunk]:
        made = take(session, 4)
        session.prompt = OTHER
        if cancelled:
            Passes(session, during, session.cancel)
            with pytest.raises(Cancelled):
                next(session)
            assert session.prompt == OTHER
        return [*made, *take(session, 2)]

    with runtime.session(PROMPT, seed=1, stream=stream) as session:
        expected = run(session, cancelled=False)
    with runtime.session(PROMPT, seed=1, stream=stream) as session:
        made = run(session, cancelled=True)
    assert same(made, expected) and made[4].receipt is not None


def test_with_no_chunk_under_way_it_is_the_next_one(runtime: Runtime) -> None:
    with runtime.session(PROMPT, seed=1) as session:
        expected = take(session, 3)
    with runtime.session(PROMPT, seed=1) as session:
        made = take(session, 1)
        session.cancel()
        session.cancel()  # twice is once
        with pytest.raises(Cancelled):
            next(session)
        assert same([*made, *take(session, 2)], expected)


def test_what_was_cancelled_can_be_kept_forked_or_taken_back(runtime: Runtime, tmp_path: Path) -> None:
    with runtime.session(PROMPT, seed=1) as session:
        expected = take(session, 5)
    with runtime.session(PROMPT, seed=1, history=1) as session:
        take(session, 4)
        Passes(session, 3, session.cancel)
        with pytest.raises(Cancelled):
            next(session)
        session.snapshot(tmp_path / "stream")
        fork = session.fork()
        with runtime.restore(tmp_path / "stream") as restored:
            assert same(take(restored, 1), expected[4:])
        assert same(take(fork, 1), expected[4:])
        session.rewind(1)
        assert next(session).index == 3


def test_a_cancelled_chunk_of_a_source_takes_no_other_frames(runtime: Runtime) -> None:
    frames = np.random.default_rng(0).integers(0, 255, (33, 32, 48, 3), np.uint8)
    settings = {"strength": 0.6, "seed": 1}
    with runtime.session(PROMPT, source=iter(frames), **settings) as session:
        expected = list(session)
    with runtime.session(PROMPT, source=iter(frames), **settings) as session:
        made = take(session, 1)
        Passes(session, 2, session.cancel)
        with pytest.raises(Cancelled):
            next(session)
        assert same([*made, *session], expected)


def test_threads_that_cancel_at_any_time(runtime: Runtime) -> None:
    """Whenever it comes, every chunk is made once, and as it would have been."""
    with runtime.session(PROMPT, seed=1) as session:
        expected = take(session, 12)
    with runtime.session(PROMPT, seed=1) as session:
        started, made, cancelled = Barrier(2), [], 0

        def nag() -> None:
            started.wait()
            for _ in range(20):
                session.cancel()
                time.sleep(0.003)

        thread = Thread(target=nag)
        thread.start()
        started.wait()
        while len(made) < 12:
            try:
                made.append(next(session))
            except Cancelled:
                cancelled += 1
        thread.join()
    assert same(made, expected) and 1 <= cancelled <= 20
