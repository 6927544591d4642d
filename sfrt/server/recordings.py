"""What viewers recorded: mp4 files in one folder, so many and no longer, each under a name that cannot be guessed."""

from __future__ import annotations

import secrets
from collections import deque
from contextlib import suppress
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from sfrt.errors import MediaError
from sfrt.video import VideoWriter, open_writer


class Recorder:
    """One recording as it grows. Used from any thread: whoever hangs up does not wait for a write to end."""

    def __init__(self, path: Path, *, width: int, height: int, fps: int, seconds: float) -> None:
        self.path = path
        self.frames = 0
        self._most = int(seconds * fps)
        self._turn = Lock()
        self._writer: VideoWriter = open_writer(str(path), width=width, height=height, fps=fps)

    def write(self, frames: NDArray[np.uint8]) -> bool:
        """Append uint8 frames [F, H, W, 3]; False once it may be no longer. Raises MediaError, as on a full disk."""
        with self._turn:
            fitting = frames[: self._most - self.frames]
            self._writer.write(fitting)
            self.frames += len(fitting)
            return self.frames < self._most

    def finish(self) -> bool:
        """Complete the file; whether there is one to fetch. Raises MediaError where it cannot be completed."""
        with self._turn:
            self._writer.close()
            return self.frames > 0


class Recordings:
    """The folder. What is one too many is deleted, the oldest first."""

    def __init__(self, folder: Path, most: int) -> None:
        self.folder, self._most = folder, most
        self._finished: deque[str] = deque()

    def begin(self, *, width: int, height: int, fps: int, seconds: float) -> Recorder:
        """A new recording. Raises MediaError where there can be none."""
        if self._most == 0:
            raise MediaError("this server keeps no recordings; start it with --recordings of 1 or more")
        path = self.folder / f"{secrets.token_urlsafe(12)}.mp4"
        return Recorder(path, width=width, height=height, fps=fps, seconds=seconds)

    def keep(self, recorder: Recorder) -> str:
        """The name under which a finished recording can be fetched."""
        self._finished.append(recorder.path.name)
        while len(self._finished) > self._most:
            with suppress(OSError):
                (self.folder / self._finished.popleft()).unlink()
        return recorder.path.name

    def find(self, name: str) -> Path | None:
        """A finished recording's file; None for any other name."""
        return self.folder / name if name in self._finished else None
