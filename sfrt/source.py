"""Video to video: a video that a stream goes by, encoded chunk by chunk while its frames come in."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sfrt.config import StreamConfig
from sfrt.decoders import Decoder
from sfrt.decoders.taehv import TIME
from sfrt.errors import MediaError

PixelFrame = Tensor | NDArray[np.uint8]
"""A float tensor [3, H, W] in [0, 1], or a uint8 array [H, W, 3]."""


class Source:
    """The latents of a video from its start, a chunk at a time; no frame is pulled before its chunk is asked for.

    What is pulled stays until `advance`, so that a chunk that failed can be made once more.
    """

    def __init__(
        self,
        video: str | os.PathLike[str] | Iterable[PixelFrame],
        stream: StreamConfig,
        decoder: Decoder,
        device: torch.device,
    ) -> None:
        """video is a file, brought to the stream's rate and size, or frames of that size; device is the decoder's.

        Raises MediaError for a file that cannot be read and for what is neither.
        """
        self._frames = _frames_of(video, stream)
        self._shape = (3, stream.height, stream.width)
        self._decoder = decoder
        self._device = device
        self._given = 0
        self._pulled: list[Tensor] = []
        self._state: Any = None
        self._next: Any = None

    def pull(self, count: int) -> bool:
        """Wait for the pixel frames of the next `count` latent frames; False where the video ends before them.

        Raises MediaError for a frame of another shape or type and for a video too short for its first chunk, and
        whatever the video's own iterator does. The frames before such a fault are kept.
        """
        wanted = TIME * count - (TIME - 1 if self._state is None else 0)
        for frame in islice(self._frames, wanted - len(self._pulled)):
            self._given += 1
            self._pulled.append(self._pixels(frame))
        if len(self._pulled) < wanted and self._state is None:
            raise MediaError(f"the source ends after {self._given} frames; its first chunk needs {wanted}")
        return len(self._pulled) == wanted

    def latents(self) -> Tensor:
        """The latents [T, C, h, w] of what was pulled."""
        latents, self._next = self._decoder.encode(torch.stack(self._pulled).unsqueeze(0), self._state)
        return latents.squeeze(0)

    def advance(self) -> None:
        """Go on to the next chunk: this one is made."""
        self._state, self._next = self._next, None
        self._pulled.clear()

    def _pixels(self, frame: PixelFrame) -> Tensor:
        """A frame as float32 [3, H, W] in memory of its own, as a camera may reuse its own for the next one.

        It goes to the device at once, while others are still to come, and as bytes where it comes as bytes.
        """
        if isinstance(frame, np.ndarray) and frame.dtype == np.uint8 and frame.shape == (*self._shape[1:], 3):
            own = torch.from_numpy(np.array(frame, order="C")).to(self._device)
            return own.permute(2, 0, 1).to(torch.float32).div_(255)
        if isinstance(frame, Tensor) and frame.is_floating_point() and frame.shape == self._shape:
            return frame.to(self._device, torch.float32, copy=True)
        _, height, width = self._shape
        found = f"{frame.dtype} {list(frame.shape)}" if hasattr(frame, "shape") else type(frame).__name__
        raise MediaError(
            f"frame {self._given} of the source is {found}; "
            f"give float tensors [3, {height}, {width}] in [0, 1] or uint8 arrays [{height}, {width}, 3]"
        )


def _frames_of(video: str | os.PathLike[str] | Iterable[PixelFrame], stream: StreamConfig) -> Iterator[PixelFrame]:
    if isinstance(video, str | os.PathLike):
        from sfrt.video import stream_frames

        return stream_frames(video, height=stream.height, width=stream.width, fps=stream.fps)
    if not isinstance(video, Iterable):
        raise MediaError(f"a {type(video).__name__} is no source; give a file, or frames one after another")
    return iter(video)
