"""Streams that viewers keep to come back to: files in one folder, so many, so large, for so long.

They stay on the server, and a viewer gets a name that cannot be guessed. To hand them out and take them back would ask
for more: a snapshot says how much memory its stream takes and its hash is no signature, so that one made to do harm
would come in as well as one that was kept; and the files of large models have gigabytes. Nothing of it is to outlive
the server either, which the recordings of `--record-to` do.
"""

from __future__ import annotations

import secrets
import time
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from sfrt.errors import SnapshotError
from sfrt.server.limits import Clock, Limits
from sfrt.session import Session


@dataclass(frozen=True)
class Snapshot:
    """A kept stream; chunk is the index that it goes on with, kept_at a time of the store's clock."""

    path: Path
    prompt: str
    seed: int
    chunk: int
    size: int
    kept_at: float


class Snapshots:
    """The folder. What is one too many, or too many bytes, is deleted, the oldest first. Used from any thread."""

    def __init__(self, folder: Path, limits: Limits, clock: Clock = time.monotonic) -> None:
        self._folder, self._limits, self._clock = folder, limits, clock
        self._kept: OrderedDict[str, Snapshot] = OrderedDict()
        self._turn = Lock()

    def keep(self, session: Session, seed: int, bytes_at_least: int) -> str:
        """The name under which this session is kept, as it stands. Raises SnapshotError, and then nothing is.

        bytes_at_least is what the file will have at any rate: what is too large is not written first.
        """
        most = self._limits.snapshot_bytes
        if not self._limits.snapshots:
            raise SnapshotError("this server keeps no streams; it was started with a limit of 0 snapshots")
        if bytes_at_least > most:
            raise SnapshotError(f"the stream takes {bytes_at_least} bytes to keep; this server keeps up to {most}")
        name = secrets.token_urlsafe(12)
        path = self._folder / f"{name}.snapshot"
        session.snapshot(path)
        size = path.stat().st_size
        if size > most:
            path.unlink()
            raise SnapshotError(f"the stream takes {size} bytes to keep; this server keeps up to {most}")
        prompt = session.prompt if isinstance(session.prompt, str) else ""
        with self._turn:
            self._kept[name] = Snapshot(path, prompt, seed, session.index, size, self._clock())
            self._tidy()
        return name

    def find(self, name: str) -> Snapshot:
        """What was kept under this name. Raises SnapshotError where there is nothing, or no more."""
        with self._turn:
            self._tidy()
            found = self._kept.get(name)
        if found is None:
            raise SnapshotError("nothing is kept under this name, or no more; keep the stream again")
        return found

    def clear(self) -> None:
        """Delete all of them."""
        with self._turn:
            while self._kept:
                self._drop_oldest()

    def _tidy(self) -> None:
        limits, now = self._limits, self._clock()
        while self._kept and (
            len(self._kept) > limits.snapshots
            or sum(one.size for one in self._kept.values()) > limits.snapshot_bytes
            or now - next(iter(self._kept.values())).kept_at > limits.keep_s
        ):
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, oldest = self._kept.popitem(last=False)
        with suppress(OSError):
            oldest.path.unlink()
