"""Video to video: frames on their way from a camera or a clip into a stream, which never waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from threading import Condition, Thread

import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]
"""[height, width, 3]"""


class Footage:
    """Frames that were given and not taken yet, at most a chunk of them; a stream's `source`.

    The engine's thread takes them, and only once they are `ready`: a stream is not run until its next chunk's frames
    are there, so that no other one waits for its camera. Given from any thread.
    """

    def __init__(self, first: int, later: int) -> None:
        """How many pixel frames the first chunk takes, and each one after it."""
        self._first, self._later = first, later
        self._waiting: deque[Picture] = deque()
        self._turn = Condition()
        self._begun = self._over = False
        self._error: Exception | None = None

    def ready(self) -> bool:
        """Whether the next chunk need not wait: its frames are there, or no more come."""
        with self._turn:
            return self._over or len(self._waiting) >= (self._later if self._begun else self._first)

    def offer(self, picture: Picture) -> None:
        """A camera's newest. Where there are enough, the oldest makes room, so that no more than a chunk is late."""
        with self._turn:
            if len(self._waiting) >= self._room:
                self._waiting.popleft()
            self._waiting.append(picture)

    def put(self, picture: Picture) -> bool:
        """A clip's next, in order: waits for room. False, and it is not taken, once it is over."""
        with self._turn:
            self._turn.wait_for(lambda: self._over or len(self._waiting) < self._room)
            if not self._over:
                self._waiting.append(picture)
            return not self._over

    def end(self, error: Exception | None = None) -> None:
        """No more come; the stream ends behind those that wait, or fails of the error."""
        with self._turn:
            self._over, self._error = True, error
            self._turn.notify_all()

    def __iter__(self) -> Footage:
        return self

    def __next__(self) -> Picture:
        with self._turn:
            if self._waiting:
                self._begun = True
                self._turn.notify_all()
                return self._waiting.popleft()
            if self._error is not None:
                raise self._error
            assert self._over, "a chunk is begun once its frames are ready"
            raise StopIteration

    @property
    def _room(self) -> int:
        return max(self._first, self._later)


def play(frames: Iterable[Picture], footage: Footage, wake: Callable[[], None]) -> None:
    """Put a clip's frames in, on a thread of its own, which ends with the clip or the footage: reading takes time.

    wake() is called whenever the stream may have become ready.
    """

    def read() -> None:
        try:
            for picture in frames:
                if not footage.put(picture):
                    return
                if footage.ready():
                    wake()
            footage.end()
        except Exception as error:  # whatever a file that somebody sent does: it is this stream's end
            footage.end(error)
        wake()

    Thread(target=read, name="sfrt-clip", daemon=True).start()
