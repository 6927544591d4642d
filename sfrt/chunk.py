"""One chunk of a stream: on its way from latents to frames in host memory, and delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfrt.delivery import Delivery
from sfrt.metrics import Stopwatch
from sfrt.ops.frames import FRAMES
from sfrt.snapshot import Moment
from sfrt.stage import Stage
from sfrt.switching import Receipt, Switch


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one chunk, as in the benchmark protocol; refresh_ms is the pass behind the previous chunk.

    On a GPU that pass runs beside the previous chunk's decode, so that less time passes than the parts come to.
    encode_ms is what a source's frames take once they have come in; waiting for them is not counted. switch_ms is what
    a prompt switch did before the chunk.
    """

    refresh_ms: float
    encode_ms: float
    dit_ms: float
    decode_ms: float
    switch_ms: float = 0.0

    @property
    def chunk_ms(self) -> float:
        return self.refresh_ms + self.switch_ms + self.encode_ms + self.dit_ms + self.decode_ms


@dataclass(frozen=True, eq=False)
class Chunk:
    """One delivered chunk: uint8 pixel frames [F, H, W, 3] on the host, latents [T, C, h, w] float32 on the device.

    Frames from a GPU lie in pinned memory, which nobody else can have; copy what is to be kept for long.

    slots says what is in the ring: for each slot the number of its latent frame in the video, this chunk's with them,
    None where there is none. receipt is that of the prompt switch that took effect with it, if one did. previews, for a
    session that is watched, are what each step took the chunk's last latent frame to be, uint8 [steps, H, W, 3].
    """

    index: int
    frames: npt.NDArray[np.uint8]
    latents: Tensor
    timings: Timings
    slots: tuple[int | None, ...] = ()
    receipt: Receipt | None = None
    previews: npt.NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class Underway:
    """A chunk whose work has been given to the device, and which nobody has seen yet.

    before is the moment it was begun at, switch what took effect with it; previews are pictures still on their way.
    """

    before: Moment
    switch: Switch | None
    latents: Tensor
    deliveries: Sequence[Delivery]
    previews: Delivery | None
    slots: tuple[int | None, ...]
    watch: Stopwatch

    def first_frame(self) -> npt.NDArray[np.uint8]:
        """The first pixel frames that it has, once they are there."""
        return self.deliveries[0].wait()

    def frames(self) -> npt.NDArray[np.uint8]:
        """All of them, once they are there."""
        first, *others = [delivery.wait() for delivery in self.deliveries]
        return np.concatenate((first, *others)) if others else first

    def delivered(self) -> Chunk:
        """What is handed over, once all of it is there."""
        frames, previews = self.frames(), None if self.previews is None else self.previews.wait()
        timings, index = _timings(self.watch), self.before.index
        receipt = None if self.switch is None else self.switch.receipt(index, timings.switch_ms)
        return Chunk(index, frames, self.latents, timings, self.slots, receipt, previews)


def deliver(stage: Stage, parts: Sequence[Tensor], state: Any, watch: Stopwatch) -> list[Delivery]:
    """Decode latents [T, C, h, w] part by part; no frames come where the bundle has no decoder."""
    deliveries: list[Delivery] = []
    with stage.outlet.behind(*parts):
        for latents in parts:
            frames = torch.empty(0, stage.stream.height, stage.stream.width, 3, dtype=torch.uint8)
            if stage.decoder is not None:
                pixels, state = stage.decoder.decode(latents.unsqueeze(0), state)
                frames = stage.ops(FRAMES)(pixels.squeeze(0))
            deliveries.append(Delivery(*stage.outlet.to_host(frames), state))
        watch.mark("decoded")
    return deliveries


def preview(stage: Stage, predictions: Tensor | None) -> Delivery | None:
    """Each of some latents [N, C, h, w] as a picture; None where there are none to show."""
    if stage.decoder is None or predictions is None:
        return None
    with stage.outlet.behind(predictions):
        # One after the other: exported graphs decode one video at a time.
        pixels = torch.cat([stage.decoder.decode(latents[None, None], None)[0].squeeze(0) for latents in predictions])
        return Delivery(*stage.outlet.to_host(stage.ops(FRAMES)(pixels)), None)


def _timings(watch: Stopwatch) -> Timings:
    watch.wait("decoded")

    def if_any(begin: str, end: str) -> float:
        return watch.ms(begin, end) if watch.has(end) else 0.0

    marks = pairwise(("start", "encoded", "denoised", "decoded"))
    encode, dit, decode = (watch.ms(begin, end) for begin, end in marks)
    return Timings(if_any("refresh", "refreshed"), encode, dit, decode, if_any("switch", "switched"))
