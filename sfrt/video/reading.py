"""Frames in: a picture or a clip, brought to a stream's size and rate."""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import islice
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
    """Read a picture (one frame) or a clip, brought to the stream's rate, cut around its centre and resized to fit.

    A picture that moves (WebP, APNG) is a clip. Returns float32 [F, 3, height, width] in [0, 1]; decoding stops after
    max_frames. Raises MediaError when the file is missing, damaged or no picture at all.
    """
    path = Path(path)
    if not path.is_file():
        raise MediaError(f"cannot read {path}: there is no such file")
    frames = _read_picture(path, height, width, fps, max_frames)
    if frames is None:
        frames = _read_clip(path, height, width, fps, max_frames)
    return torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().div(255)


def _read_picture(path: Path, height: int, width: int, fps: int, max_frames: int | None) -> NDArray[np.uint8] | None:
    """[F, height, width, 3], or None where it is PyAV's: a GIF that moves, or no picture."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            if image.format == "GIF" and getattr(image, "is_animated", False):
                return None
            upright = (ImageOps.exif_transpose(each).convert("RGB") for each in islice(_shown(image, fps), max_frames))
            fitted = [ImageOps.fit(each, (width, height), method=Image.Resampling.LANCZOS) for each in upright]
    except UnidentifiedImageError:
        return None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise MediaError(f"cannot read the picture {path}: {error}") from error
    return np.stack([np.array(each) for each in fitted])


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


def _read_clip(path: Path, height: int, width: int, fps: int, max_frames: int | None) -> NDArray[np.uint8]:
    """[F, height, width, 3]."""
    av = pyav(str(path))
    try:
        with av.open(os.path.abspath(path)) as container:  # in full: 12:30.mp4 would be taken for a protocol
            if not container.streams.video:
                raise MediaError(f"cannot read {path}: there is no picture in it")
            frames = [frame.to_ndarray() for frame in islice(_fitted(container, height, width, fps), max_frames)]
    except (OSError, av.FFmpegError) as error:
        reason = getattr(error, "strerror", None) or error
        raise MediaError(f"cannot read {path} as a picture or a video: {reason}") from error
    if not frames:
        raise MediaError(f"cannot read {path}: the video has no frames")
    return np.stack(frames)


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


_UPRIGHT = {
    90: (("transpose", "cclock"),),
    -90: (("transpose", "clock"),),
    180: (("hflip", ""), ("vflip", "")),
    -180: (("hflip", ""), ("vflip", "")),
}
"""What turns a frame upright whose file says to turn it by so many degrees counterclockwise, as phones write them."""
