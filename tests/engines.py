"""Streams on an engine: short ones, ones that fail, ones that wait to be told."""

from __future__ import annotations

import itertools
import threading
from dataclasses import replace
from typing import Any

from sfrt import Chunk, Runtime, Session

PROMPT, OTHER = "a red circle moving left", "a blue square moving left"
FAST = 240.0
"""Frames per second at which a test does not wait for the clock."""


def alone(runtime: Runtime, chunks: int, **settings: Any) -> list[Chunk]:
    with runtime.session(PROMPT, limit=chunks, **settings) as session:
        return list(session)


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
