"""Sessions that fail, or come and go, on a device that others share: nobody else sees it, and nothing is left."""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from contextlib import suppress
from functools import partial
from traceback import walk_tb
from typing import Any

import numpy as np
import pytest

from sfrt import ConfigError, PromptError, Session
from sfrt.engine import Engine
from sfrt.machine import resident_memory
from tests.engines import FAST, PROMPT, Watched, alone, failing
from tests.streams import same
from tests.waiting import wait_until


@pytest.mark.parametrize("error", [RuntimeError("the device fell over"), StopAsyncIteration(), SystemExit()])
def test_a_failure_reaches_its_own_reader_and_nobody_else(engine: Engine, error: BaseException) -> None:
    reference = alone(engine.runtime, 6, seed=1)
    good = engine.open(PROMPT, seed=1, limit=6, fps=FAST)
    bad = engine.host(partial(failing, engine.runtime, 2, error, seed=1), fps=FAST, queue=4)
    wait_until(lambda: bad.stats().state == "failed")
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
            wait_until(lambda: held[0]() is None)
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
    wait_until(lambda: not engine.stats().streams)
    before = resident_memory() or 0
    for number in range(50):
        come_and_go(number)
    wait_until(lambda: not engine.stats().streams)
    gc.collect()
    assert threading.active_count() == threads
    assert [one for one in sessions if one() is not None] == []
    assert (resident_memory() or 0) - before < 16 << 20
    assert engine.stats().admitted == 60 and len(engine._scheduler.lanes) == 0
