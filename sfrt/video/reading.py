"""Frames in: a picture or a clip, brought to a stream's size and rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfrt.errors import MediaError
from sfrt.video.libraries import pull, pyav

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from PIL.ImageFile import ImageFile


def read_frames(
    path: str | os.PathLike[str], *, height: int, width: int, fps: int = 16, max_frames: int | None = None
) -> Tensor:
    """A whole picture or clip, as `stream_frames` gives it: float32 [F, 3, height, width] in [0, 1].

    Decoding stops after max_frames. Raises MediaError as `stream_frames` does.
    """
    frames = np.stack(list(islice(stream_frames(path, height=height, width=width, fps=fps), max_frames)))
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().div(255)


def stream_frames(
    path: str | os.PathLike[str], *, height: int, width: int, fps: int = 16, foreign: bool = False
) -> Iterator[NDArray[np.uint8]]:
    """A picture (one frame) or a clip, brought to the stream's rate, cut around its centre and resized to fit.

    A picture that moves (WebP, APNG) is a clip. Gives uint8 [height, width, 3], each decoded when it is asked for; only
    the first one at once, so that a file that is missing, damaged or no picture at all raises MediaError here. Damage
    further on does so on the way.

    A foreign file, which came from somebody else, is read only as what phones and browsers film (MP4, MOV, WebM): other
    formats name further files and machines to read from. Its pictures may have up to 4096 × 2304 pixels.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"cannot read {path}: there is no such file")
    frames = (
        _clip(path, height, width, fps, foreign) if foreign or _is_clip(path) else _pictures(path, height, width, fps)
    )
    return chain((next(frames),), frames)


@contextmanager
def _pictures_told(path: Path) -> Iterator[None]:
    """Turn what Pillow finds wrong with a file into a MediaError."""
    from PIL import Image

    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot read the picture {path}: {error}") from error


def _is_clip(path: Path) -> bool:
    """Whether a file is PyAV's: a GIF that moves, or no picture."""
    from PIL import Image, UnidentifiedImageError

    with _pictures_told(path):
        try:
            with Image.open(path) as image:
                return image.format == "GIF" and bool(getattr(image, "is_animated", False))
        except UnidentifiedImageError:
            return True


def _pictures(path: Path, height: int, width: int, fps: int) -> Iterator[NDArray[np.uint8]]:
    """Each [height, width, 3]."""
    from PIL import Image, ImageOps

    with _pictures_told(path), Image.open(path) as image:
        for each in _shown(image, fps):
            upright = ImageOps.exif_transpose(each).convert("RGB")
            yield np.array(ImageOps.fit(upright, (width, height), method=Image.Resampling.LANCZOS))


def _shown(image: ImageFile, fps: int) -> Iterator[ImageFile]:
    """What a picture shows at this rate: many that move, one that does not.

    Several pictures without durations (pages, a photograph with a second view) count as the first of them.
    """
    yield image
    shown, end = 1, 0.0
    for index in range(getattr(image, "n_frames", 1) if getattr(image, "is_animated", False) else 0):
        image.seek(index)
        image.load()
        end += image.info.get("duration", 0)  # milliseconds
        while shown * 1000 / fps < end:
            yield image
            shown += 1


def _clip(path: Path, height: int, width: int, fps: int, foreign: bool) -> Iterator[NDArray[np.uint8]]:
    """Each [height, width, 3], at least one."""
    av = pyav(str(path))
    some = False
    try:
        # The path in full: 12:30.mp4 would be taken for a protocol.
        with av.open(os.path.abspath(path), options=_FOREIGN if foreign else {}) as container:
            if not container.streams.video:
                raise MediaError(f"cannot read {path}: there is no picture in it")
            if foreign:
                container.streams.video[0].codec_context.options = {"max_pixels": str(_MOST_PIXELS)}
            for frame in _fitted(container, height, width, fps):
                some = True
                yield np.asarray(frame.to_ndarray(), dtype=np.uint8)
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"cannot read {path} as a picture or a video: {reason}") from error
    if not some:
        raise MediaError(f"cannot read {path}: the video has no frames")


def _fitted(container: InputContainer, height: int, width: int, fps: int) -> Iterator[VideoFrame]:
    """The frames of the first video stream, upright, at this rate and size, as RGB."""
    from av.filter import Graph

    graph = Graph()
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    for frame in container.decode(stream):
        if not graph.configured:
            filters = [
                *_UPRIGHT.get(frame.rotation, ()),
                ("fps", str(fps)),
                ("scale", f"{width}:{height}:force_original_aspect_ratio=increase:flags=lanczos"),
                ("crop", f"{width}:{height}"),
                ("format", "rgb24"),
                ("buffersink", ""),
            ]
            graph.link_nodes(graph.add_buffer(template=stream), *(graph.add(*each) for each in filters)).configure()
        graph.vpush(frame)
        yield from pull(graph)
    if graph.configured:
        graph.vpush(None)
        yield from pull(graph)


_FOREIGN = {"format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm", "protocol_whitelist": "file"}
"""FFmpeg's own settings for a file that may be made to do harm."""
_MOST_PIXELS = 4096 * 2304

_UPRIGHT = {
    90: (("transpose", "cclock"),),
    -90: (("transpose", "clock"),),
    180: (("hflip", ""), ("vflip", "")),
    -180: (("hflip", ""), ("vflip", "")),
}
"""What turns a frame upright whose file says to turn it by so many degrees counterclockwise, as phones write them."""
