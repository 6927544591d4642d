"""A video to write and to read back, and how close it came back."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

HEIGHT, WIDTH, FPS = 48, 64, 16
BLUE, RED = (30, 60, 200), (225, 45, 35)
BT709 = 1


def clip(frames: int, first: int = 0) -> NDArray[np.uint8]:
    """A red square on blue, one pixel further right in each frame."""
    video = np.full((frames, HEIGHT, WIDTH, 3), BLUE, np.uint8)
    for index in range(frames):
        left = (first + index) % (WIDTH - 16)
        video[index, 16:32, left : left + 16] = RED
    return video


def decode(source: Path | str) -> tuple[NDArray[np.uint8], Fraction | None]:
    with av.open(str(source)) as container:
        tagged = container.streams.video[0].codec_context.colorspace == BT709
        # PyAV before 17 converts only between colour spaces that are named and differ.
        spaces = {"src_colorspace": "ITU709", "dst_colorspace": "ITU601"} if tagged else {}
        frames = [frame.to_ndarray(format="rgb24", **spaces) for frame in container.decode(video=0)]
        return np.stack(frames), container.streams.video[0].average_rate


def assert_close(frames: NDArray[np.uint8], expected: NDArray[np.uint8], mean: float) -> None:
    """Close on average, and not off by one frame: the square's place shows in the worst frame."""
    assert frames.shape == expected.shape
    error = np.abs(frames.astype(int) - expected.astype(int)).mean(axis=(1, 2, 3))
    assert error.max() <= mean
