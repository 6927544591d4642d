"""What a server allows, and the counting that holds clients to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from sfrt.errors import ConfigError

Clock = Callable[[], float]
"""Seconds that only go forward."""


_MAY_BE_0 = ("longest_s", "rewind_chunks", "recordings", "snapshots")


@dataclass(frozen=True)
class Limits:
    """Seconds, bytes, characters and counts; longest_s of 0 is no limit.

    idle_s is how long a viewer may say nothing, longest_s how long a connection may last in all, slow_s how long one
    chunk may take to be sent, hello_s how long a client may take to say who it is. ahead is how many chunks are made
    before they are due. Of messages, messages_per_s are read, and twice as many at once. Snapshots of streams are kept
    for keep_s each, so many and so many bytes in all.
    """

    sessions: int = 4
    idle_s: float = 600.0
    longest_s: float = 0.0
    slow_s: float = 20.0
    hello_s: float = 10.0
    prompt_characters: int = 2000
    message_characters: int = 200_000
    picture_bytes: int = 8 * 2**20
    clip_bytes: int = 64 * 2**20
    messages_per_s: float = 20.0
    ahead: int = 1
    rewind_chunks: int = 16
    record_s: float = 120.0
    recordings: int = 20
    snapshots: int = 20
    snapshot_bytes: int = 2**30
    keep_s: float = 3600.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 <= value < inf or (value == 0 and name not in _MAY_BE_0):
                raise ConfigError(f"the limit {name} is {value}; it must be a positive number")

    @property
    def history(self) -> int:
        """Chunks that a stream can be taken back by: a viewer sees the newest a little after they were made."""
        return self.rewind_chunks + self.ahead + 2

    @property
    def requests(self) -> int:
        """The most at once: beside the viewers there are those who say hello, the page's files, and a probe."""
        return 4 * self.sessions + 64


class Allowance:
    """A bucket of messages that fills with time: `rate` a second, `most` at once."""

    def __init__(self, rate: float, most: float, clock: Clock = time.monotonic) -> None:
        self._rate, self._most, self._clock = rate, most, clock
        self._left, self._at = most, clock()

    def take(self) -> float:
        """Use one up; how many seconds to wait for it."""
        now = self._clock()
        self._left = min(self._most, self._left + (now - self._at) * self._rate) - 1
        self._at = now
        return max(0.0, -self._left / self._rate)
