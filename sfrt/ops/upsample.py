"""Twice the size: TAEHV's frames, several side by side in the channels, taken apart and doubled in height and width."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfrt.ops.channels_last import draw_frames, require_dense
from sfrt.ops.checks import require
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op, nbytes


def upsample(x: Tensor, frames: int) -> Tensor:
    """[N, frames · C, h, w] → [N · frames, C, 2h, 2w], every pixel four times; channels innermost in memory."""
    if frames > 1:
        # Unfolded in the order in memory, so that no later layer turns it back.
        count, _, height, width = x.shape
        cells = x.permute(0, 2, 3, 1).unflatten(3, (frames, -1)).permute(0, 3, 1, 2, 4)
        x = cells.reshape(count * frames, height, width, -1).permute(0, 3, 1, 2)
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


def check(x: Tensor, frames: int) -> None:
    """What the kernel takes: dense memory, channels that divide evenly."""
    require_dense("upsample", "x", x, 4)
    require(
        frames > 0 and x.shape[1] % frames == 0, "upsample", f"{x.shape[1]} channels do not divide into {frames} frames"
    )


def cost(x: Tensor, frames: int) -> Cost:
    """x read once and written four times."""
    return Cost(5 * nbytes(x))


def _draw(count: int, channels: int, height: int, width: int, frames: int) -> Maker:
    def make(draw: Draw) -> Inputs:
        return {"x": draw_frames(draw, count, channels, height, width), "frames": frames}

    return make


UPSAMPLE = Op(
    name="upsample",
    reference=upsample,
    check=check,
    kernels={"triton": "sfrt.ops.triton_kernels.unfold:upsample"},
    cases={
        "one frame": _draw(2, 12, 3, 5, 1),
        "two frames": _draw(2, 24, 3, 5, 2),
        "three frames": _draw(1, 9, 1, 4, 3),
        "two programs": _draw(1, 64, 7, 9, 2),
    },
    sizes={"480×832": _draw(6, 128, 240, 416, 2), "120×208": _draw(3, 256, 60, 104, 1)},
    cost=cost,
    tolerance={torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 0.0},
)
