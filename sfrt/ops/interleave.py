"""Twice the frames: the Wan 2.1 VAE's temporal convolution makes two frames side by side; one goes after the other."""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt.ops.channels_last import (
    draw_video,
    empty_video,
    per_channel,
    require_dense,
    require_match,
    require_video,
)
from sfrt.ops.checks import require
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op, nbytes


def interleave(x: Tensor, bias: Tensor | None, first: Tensor | None) -> Tensor:
    """[B, 2C, T, H, W] → [B, C, 2T, H, W]: frames 2t and 2t + 1 are the two halves of the channels of x + bias at t.

    bias: [2C]. first: [B, C, 1, H, W], a frame to stand before all of them. Channels lie innermost in memory.
    """
    lead = 0 if first is None else 1
    out = empty_video(x, x.shape[1] // 2, lead + 2 * x.shape[2])
    if first is not None:
        out[:, :, :1] = first
    if bias is not None:
        x = x + per_channel(bias, x)
    out[:, :, lead::2], out[:, :, lead + 1 :: 2] = x.chunk(2, dim=1)
    return out


def check(x: Tensor, bias: Tensor | None, first: Tensor | None) -> None:
    """What the kernel takes: dense memory, a first frame that lies where it likes."""
    require_dense("interleave", "x", x, 5)
    batch, channels, _, height, width = x.shape
    require(channels % 2 == 0, "interleave", f"x has {channels} channels; they must be even")
    if bias is not None:
        require_match("interleave", "bias", bias, (channels,), x)
        require(bias.stride(0) == 1, "interleave", f"bias has stride {bias.stride(0)}; it must be dense")
    if first is not None:
        require_match("interleave", "first", first, (batch, channels // 2, 1, height, width), x)
        require_video("interleave", "first", first)


def cost(x: Tensor, bias: Tensor | None, first: Tensor | None) -> Cost:
    """Everything read and written once."""
    return Cost(2 * nbytes(x, first), 0 if bias is None else x.numel())


def _draw(
    channels: int, frames: int, height: int, width: int, *, batch: int = 1, bias: bool = True, first: bool = False
) -> Maker:
    def make(draw: Draw) -> Inputs:
        return {
            "x": draw_video(draw, channels, frames, height, width, batch=batch),
            "bias": draw.normal(channels) if bias else None,
            "first": draw_video(draw, channels // 2, 1, height, width, batch=batch, part=True) if first else None,
        }

    return make


INTERLEAVE = Op(
    name="interleave",
    reference=interleave,
    check=check,
    kernels={"triton": "sfrt.ops.triton_kernels.unfold:interleave"},
    cases={
        "bias": _draw(12, 3, 3, 5, batch=2),
        "no bias": _draw(48, 2, 3, 5, bias=False),
        "first frame": _draw(12, 2, 2, 3, batch=2, first=True),
        "one pixel": _draw(6, 1, 1, 1, first=True),
        "two programs": _draw(96, 1, 7, 9, first=True),
    },
    sizes={"120×208": _draw(768, 6, 120, 208)},
    cost=cost,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
)
