"""Frames out: to an mp4, a gif, a folder of PNGs or a pipe.

Whatever fails on the way becomes a MediaError, and what could not be finished is removed unless a player can show it.
"""

from __future__ import annotations

import errno
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sfrt.errors import MediaError
from sfrt.video.libraries import pull, pyav
from sfrt.video.reasons import cannot_write

if TYPE_CHECKING:
    from av import VideoFrame

Frames = Tensor | NDArray[np.uint8]
"""Delivered frames: uint8 [F, H, W, 3], a tensor or an array."""

STDOUT = "-"


class VideoWriter(ABC):
    """Takes the frames of one video. As a context manager it closes itself, also after Ctrl-C."""

    def __init__(self, target: str, width: int, height: int) -> None:
        self.target = target
        self._size = (height, width)
        self._count = 0
        self._closed = False

    def write(self, frames: Frames) -> bool:
        """Append uint8 frames [F, H, W, 3]. False: the reader has gone away and wants no more; stop.

        Raises MediaError for frames of another type or size, when writing fails, and after closing.
        """
        array = frames.cpu().numpy() if isinstance(frames, Tensor) else frames
        if self._closed:
            raise MediaError(f"cannot write to {self.target}: it is closed")
        if array.dtype != np.uint8 or array.shape[1:] != (*self._size, 3):
            height, width = self._size
            raise MediaError(
                f"cannot write {array.dtype} frames of shape {tuple(array.shape)} to {self.target}; "
                f"it takes uint8 [F, {height}, {width}, 3]"
            )
        if len(array):
            self._append(np.ascontiguousarray(array))
        return True

    def close(self) -> None:
        """Finish the video; closing twice is harmless. Raises MediaError when it cannot be finished."""
        if not self._closed:
            self._closed = True
            self._finish()

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with suppress(MediaError):  # what went wrong first is what the user must hear
                self.close()

    @abstractmethod
    def _append(self, frames: NDArray[np.uint8]) -> None:
        """Write checked frames, contiguous in memory."""

    @abstractmethod
    def _finish(self) -> None:
        """Complete the video; one without a frame leaves nothing behind."""


def open_writer(target: str, *, width: int, height: int, fps: int) -> VideoWriter:
    """A writer for frames of one size; the ending of the target chooses its kind.

    .mp4 is H.264; .gif loops forever; a name without an ending, or with a slash behind it, is a folder for pictures
    000000.png, 000001.png …; "-" is raw video (YUV4MPEG2, 4:2:0) on standard output. Files are replaced, but a folder
    must be new or empty. Nothing is touched before the first frame. Raises MediaError where the target cannot be.
    """
    check_target(target)
    return _kind_of(target)(target, width, height, fps)


def check_target(target: str) -> None:
    """Raise MediaError where no video can be written to this target, before any work is done for it."""
    kind, path = _kind_of(target), Path(target)
    try:
        if kind is _PipeWriter:
            _check_pipe()
        elif kind is _PngWriter:
            _check_folder(path)
        else:
            _check_file(path)
    except OSError as error:
        raise cannot_write(target, error) from error


def _check_pipe() -> None:
    if os.isatty(1):
        raise MediaError("cannot write raw video to a terminal; name a file, or pipe it: sfrt generate … -o - | mpv -")


def _check_folder(path: Path) -> None:
    with suppress(FileNotFoundError):
        if any(path.iterdir()):
            raise MediaError(f"cannot write pictures to {path}: the folder is not empty; name a new one or clear it")


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "")
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(errno.EACCES, "")


_Kind = Callable[[str, int, int, int], VideoWriter]
"""Makes a writer from a target, a width, a height and a rate."""


def _kind_of(target: str) -> _Kind:
    if target == STDOUT:
        return _PipeWriter
    ending = "" if target.endswith(("/", os.sep)) else Path(target).suffix.lower()
    kinds: dict[str, _Kind] = {".mp4": _Mp4Writer, ".gif": _GifWriter, "": _PngWriter}
    if ending not in kinds:
        raise MediaError(
            f"cannot write {target}: unknown ending {ending}; use .mp4, .gif, a folder (no ending) for PNG pictures, "
            "or - for raw video on standard output"
        )
    return kinds[ending]


class _ContainerWriter(VideoWriter):
    """A video that PyAV encodes and writes while it grows, to a file or to standard output."""

    format: ClassVar[str]
    codec: ClassVar[str]
    pixel_format: ClassVar[str]
    muxer_options: ClassVar[dict[str, str]] = {}
    codec_options: ClassVar[dict[str, str]] = {}

    def __init__(self, target: str, width: int, height: int, fps: int) -> None:
        super().__init__("standard output" if target == STDOUT else target, width, height)
        av = pyav(self.target)
        # In full: a name such as 12:30.mp4 would be taken for a protocol.
        self._file = None if target == STDOUT else os.path.abspath(target)
        self._started = False
        self._header = b""
        self._whole_bytes = 0
        self._time_base = Fraction(1, fps)
        # Flushed packets: whatever has been muxed is on the disk or down the pipe.
        options = {"flush_packets": "1", **self.muxer_options}
        self._container = av.open(self._file or "pipe:1", "w", format=self.format, options=options)
        try:
            self._stream = self._container.add_stream(self.codec, rate=fps, options=dict(self.codec_options))
        except av.codec.codec.UnknownCodecError as error:
            raise MediaError(
                f"cannot write {target}: this PyAV lacks {self.codec}; install PyAV's own wheel"
            ) from error
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, self.pixel_format
        self._prepare(width, height, fps)

    def _append(self, frames: NDArray[np.uint8]) -> None:
        import av

        with self._salvaging():
            if not self._started:
                self._start()
            for array in frames:
                frame = av.VideoFrame.from_ndarray(array, format="rgb24")
                frame.pts, frame.time_base = self._count, self._time_base
                self._encode(frame)
                self._count += 1
            if self._file:
                self._whole_bytes = os.path.getsize(self._file)

    def _finish(self) -> None:
        if self._count == 0:
            self._abandon()
            return
        with self._salvaging():
            self._encode(None)
            self._container.mux(self._stream.encode(None))
            self._container.close()

    def _start(self) -> None:
        """Make the file ours and write its header. Until then a file of that name stays what it is."""
        if self._file is not None:
            open(self._file, "wb").close()
        self._started = True
        self._container.start_encoding()
        self._header = b"" if self._file is None else Path(self._file).read_bytes()

    def _encode(self, frame: VideoFrame | None) -> None:
        """Convert, encode and mux one frame."""
        for converted in self._convert(frame):
            self._container.mux(self._stream.encode(converted))

    @contextmanager
    def _salvaging(self) -> Iterator[None]:
        """Turn a failure to write into a MediaError, after saving what can be saved."""
        import av

        try:
            yield
        except (OSError, av.FFmpegError) as error:
            self._closed = True
            self._abandon()
            raise cannot_write(self.target, error) from error

    def _abandon(self) -> None:
        """Close what is open; cut the file back to what was whole, and remove it if that shows nothing."""
        import av

        with suppress(OSError, av.FFmpegError):
            self._container.close()
        if self._file is None or not self._started:
            return
        with suppress(OSError):
            with open(self._file, "r+b") as file:
                file.write(self._header)  # finishing an mp4 rewrites its head, even if the index it names did not fit
                file.truncate(self._whole_bytes)
            if not _shows_a_frame(self._file):
                os.unlink(self._file)

    def _prepare(self, width: int, height: int, fps: int) -> None:
        """Finish the set-up of the stream before its header is written."""

    def _convert(self, frame: VideoFrame | None) -> Iterable[VideoFrame]:
        """From RGB to what the encoder takes; None is the end of the video."""
        return () if frame is None else (frame.reformat(format=self.pixel_format),)


class _Mp4Writer(_ContainerWriter):
    """H.264 in an MP4 that plays at any moment of its life.

    It is written as fragments of about a second, each complete in itself: after a crash, a kill or a full disk all but
    the last second plays, where a temporary file to be finished at the end would be lost. A fragmented file lacks an
    index and shows no duration in some players, so closing adds both in place (hybrid_fragmented), without a copy.
    """

    format = "mp4"
    codec = "libx264"
    pixel_format = "yuv420p"
    muxer_options: ClassVar[dict[str, str]] = {"movflags": "hybrid_fragmented+frag_keyframe+empty_moov"}
    # zerolatency: no frames wait inside the encoder, where a crash would take them along.
    codec_options: ClassVar[dict[str, str]] = {"crf": "18", "preset": "veryfast", "tune": "zerolatency"}

    def _prepare(self, width: int, height: int, fps: int) -> None:
        if width % 2 or height % 2:
            raise MediaError(f"cannot write {self.target}: {width}×{height} is odd, and an mp4 needs even sizes")
        context = self._stream.codec_context
        context.gop_size = fps  # a fragment begins at each key frame
        # Untagged, players guess the colours by the size of the picture. 1 is BT.709 (ITU-T H.273), and limited range.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1

    def _convert(self, frame: VideoFrame | None) -> Iterable[VideoFrame]:
        if frame is None:
            return ()
        return (frame.reformat(format=self.pixel_format, dst_colorspace="ITU709"),)


class _GifWriter(_ContainerWriter):
    """An endless GIF, every frame in the 256 colours that suit it best."""

    format = "gif"
    codec = "gif"
    pixel_format = "pal8"

    def _prepare(self, width: int, height: int, fps: int) -> None:
        from av import VideoFormat
        from av.filter import Graph

        self._graph = Graph()
        source = self._graph.add_buffer(
            width=width, height=height, format=VideoFormat("rgb24"), time_base=self._time_base
        )
        split = self._graph.add("split")
        # A sample of the pixels chooses the palette as well as all of them do, six times as fast at 480 lines.
        sample = self._graph.add("scale", "w='min(iw,256)':h=-1:flags=neighbor")
        palette = self._graph.add("palettegen", "stats_mode=single")
        paint = self._graph.add("paletteuse", "new=1:dither=bayer:bayer_scale=3")
        source.link_to(split)
        split.link_to(paint, 0, 0)
        split.link_to(sample, 1, 0)
        sample.link_to(palette)
        palette.link_to(paint, 0, 1)
        paint.link_to(self._graph.add("buffersink"))
        self._graph.configure()

    def _convert(self, frame: VideoFrame | None) -> Iterable[VideoFrame]:
        self._graph.vpush(frame)
        return pull(self._graph)


class _PipeWriter(_ContainerWriter):
    """Raw video on standard output, for a player or another encoder. A reader that leaves is no error."""

    format = "yuv4mpegpipe"
    codec = "rawvideo"
    pixel_format = "yuv420p"

    def __init__(self, target: str, width: int, height: int, fps: int) -> None:
        super().__init__(target, width, height, fps)
        self._reader_left = False

    def write(self, frames: Frames) -> bool:
        if not self._reader_left:
            with self._allowing_the_reader_to_leave():
                super().write(frames)
        return not self._reader_left

    def _finish(self) -> None:
        with self._allowing_the_reader_to_leave():
            super()._finish()

    @contextmanager
    def _allowing_the_reader_to_leave(self) -> Iterator[None]:
        try:
            yield
        except MediaError as error:
            if not isinstance(error.__cause__, BrokenPipeError):
                raise
            self._reader_left = True


class _PngWriter(VideoWriter):
    """A folder of numbered pictures, to which the rate means nothing."""

    def __init__(self, target: str, width: int, height: int, fps: int) -> None:
        super().__init__(target, width, height)
        self._folder = Path(target)

    def _append(self, frames: NDArray[np.uint8]) -> None:
        for array in frames:
            path = self._folder / f"{self._count:06d}.png"
            try:
                self._folder.mkdir(parents=True, exist_ok=True)
                _save_png(path, array)
            except OSError as error:
                self._closed = True
                raise cannot_write(str(path), error) from error
            self._count += 1

    def _finish(self) -> None:
        """Each picture is complete as it is."""


def _save_png(path: Path, array: NDArray[np.uint8]) -> None:
    from PIL import Image

    try:
        Image.fromarray(array).save(path, compress_level=1)  # the default level cannot keep up with a stream
    except BaseException:  # Ctrl-C too: half a picture is none
        path.unlink(missing_ok=True)
        raise


def _shows_a_frame(path: str) -> bool:
    import av

    try:
        with av.open(path) as container:
            return any(True for _ in container.decode(video=0))
    except (OSError, av.FFmpegError, IndexError):
        return False
