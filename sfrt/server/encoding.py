"""Delivered frames to what a viewer can show: H.264 for WebCodecs, JPEG for everything else."""

from __future__ import annotations

import io
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from sfrt.server.protocol import H264, JPEG, Codec
from sfrt.video.libraries import pyav

if TYPE_CHECKING:
    from av.video.codeccontext import VideoCodecContext
    from PIL.Image import Image as PilImage

_X264 = {"preset": "veryfast", "tune": "zerolatency", "profile": "main", "crf": "19", "forced-idr": "1"}
_KEY_SECONDS = 10
"""Key frames cost many times the others, and a viewer asks for one when it needs it."""
_THUMBNAIL = 128
"""Pixels of a thumbnail's longer side."""


@dataclass(frozen=True)
class Picture:
    """One encoded frame; key: decodes without those before it."""

    data: bytes
    key: bool


class Encoder(Protocol):
    """One viewer's encoder: every frame that goes in comes out at once. Used from one thread at a time."""

    kind: int
    """What its pictures are, as Frame.kind has it."""

    def encode(self, frames: NDArray[np.uint8]) -> list[Picture]:
        """Pictures of uint8 frames [F, H, W, 3]."""

    def start_over(self) -> None:
        """Make the next picture a key frame."""


def encoder_for(codec: Codec, *, width: int, height: int, fps: int) -> Encoder:
    """A fresh encoder. Raises MediaError where H.264 is asked for and PyAV is not there."""
    return H264Encoder(width, height, fps) if codec == "h264" else JpegEncoder()


class H264Encoder:
    """libx264 without look-ahead and B-frames, as Annex B: parameter sets come with each key frame."""

    kind = H264

    def __init__(self, width: int, height: int, fps: int) -> None:
        av = pyav("a stream of H.264")
        self._count = 0
        self._key_next = True
        self._time_base = Fraction(1, fps)
        context: VideoCodecContext = av.CodecContext.create("libx264", "w")
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.time_base, context.framerate = self._time_base, Fraction(fps)
        context.gop_size = fps * _KEY_SECONDS
        context.thread_count = 1  # many streams share the machine, and each is fast enough alone
        context.options = dict(_X264)
        # Untagged, players guess the colours by the size of the picture. 1 is BT.709 (ITU-T H.273), and limited range.
        context.colorspace = context.color_primaries = context.color_trc = context.color_range = 1
        self._context = context

    def encode(self, frames: NDArray[np.uint8]) -> list[Picture]:
        from av import VideoFrame
        from av.video.frame import PictureType

        pictures = []
        for array in frames:
            frame = VideoFrame.from_ndarray(array, format="rgb24").reformat(format="yuv420p", dst_colorspace="ITU709")
            frame.pts, frame.time_base = self._count, self._time_base
            frame.pict_type = PictureType.I if self._key_next else PictureType.NONE
            self._count, self._key_next = self._count + 1, False
            packets = self._context.encode(frame)
            pictures += [Picture(bytes(packet), packet.is_keyframe) for packet in packets]
        return pictures

    def start_over(self) -> None:
        self._key_next = True


class JpegEncoder:
    """Each frame a picture of its own."""

    kind = JPEG

    def encode(self, frames: NDArray[np.uint8]) -> list[Picture]:
        from PIL import Image

        return [Picture(_jpeg(Image.fromarray(array)), key=True) for array in frames]

    def start_over(self) -> None:
        """Nothing to do: no picture needs another one."""


def thumbnails(pictures: NDArray[np.uint8]) -> list[bytes]:
    """JPEGs of uint8 pictures [N, H, W, 3], brought down to a few kilobytes each."""
    from PIL import Image

    small = [Image.fromarray(array) for array in pictures]
    for image in small:
        image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    return [_jpeg(image) for image in small]


def _jpeg(image: PilImage) -> bytes:
    """With colours at full resolution: small pictures with flat shapes show the difference."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()
