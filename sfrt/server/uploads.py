"""What a viewer sent to begin streams from: a picture, a clip. It is kept until another one comes, or it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import NamedTemporaryFile
from threading import Lock

from sfrt.errors import MediaError, ProtocolError
from sfrt.server.limits import Limits
from sfrt.server.protocol import PICTURE, Frame


class Uploads:
    """Used from any thread: whoever hangs up does not wait for a write to end.

    A clip goes to a file while it comes, part by part, so that it takes no memory, and what else is said need not wait
    for all of it.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._turn = Lock()
        self._picture: bytes | None = None
        self._clip: Path | None = None
        self._parts = 0
        self._whole = self._closed = False

    def take(self, frame: Frame) -> None:
        """A picture, or the next part of a clip. Raises MediaError, and ProtocolError for a part out of order."""
        with self._turn:
            if frame.kind == PICTURE:
                self._keep_picture(frame.data)
            elif not self._closed:
                self._keep_part(frame)

    def picture(self) -> bytes:
        """Raises MediaError where none was sent."""
        if self._picture is None:
            raise MediaError("no picture was sent to start from; send it as a binary message before start")
        return self._picture

    def clip(self) -> Path:
        """The file. Raises MediaError where none was sent, or not all of it."""
        with self._turn:
            if self._clip is None or not self._whole:
                raise MediaError("no whole clip was sent to start from; send its parts before start")
            return self._clip

    def close(self) -> None:
        """Let go of everything, and take no more."""
        with self._turn:
            self._closed = True
            self._picture = None
            self._drop_clip()

    def _keep_picture(self, data: bytes) -> None:
        if len(data) > self._limits.picture_bytes:
            raise MediaError(f"the picture has {len(data)} bytes; send one of up to {self._limits.picture_bytes}")
        self._picture = data

    def _keep_part(self, frame: Frame) -> None:
        if frame.number == 0:
            self._drop_clip()
            with _told(), NamedTemporaryFile(prefix="sfrt-clip-", delete=False) as file:
                self._clip = Path(file.name)
        if self._clip is None or self._whole or frame.number != self._parts:
            raise ProtocolError(f"part {frame.number} of a clip came out of order; send it again from part 0")
        try:
            if self._clip.stat().st_size + len(frame.data) > self._limits.clip_bytes:
                raise MediaError(f"the clip is too large; send one of up to {self._limits.clip_bytes} bytes")
            with _told(), self._clip.open("ab") as file:
                file.write(frame.data)
        except MediaError:
            self._drop_clip()
            raise
        self._parts, self._whole = self._parts + 1, frame.key

    def _drop_clip(self) -> None:
        clip, self._clip = self._clip, None
        self._parts, self._whole = 0, False
        if clip is not None:
            with suppress(OSError):
                clip.unlink()


@contextmanager
def _told() -> Iterator[None]:
    """Turn what a disk does into a MediaError."""
    try:
        yield
    except OSError as error:
        raise MediaError(f"the clip cannot be kept ({error.strerror}); try again later, or a smaller one") from None
