"""What a causal convolution of the Wan 2.1 VAE reads: the activation before it, right behind the frames of its past.

Most convolutions read SiLU(RMSNorm(x)) (arXiv 2503.20314). x itself is often a sum not yet done: a convolution without
its bias, and the shortcut around a residual block. One pass does the sum, the norm and the SiLU, puts the frames of the
past in front, and keeps the newest frames as the past of the next chunk: nothing is padded, concatenated or copied.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfrt.ops.channels_last import (
    draw_video,
    empty_video,
    per_channel,
    require_match,
    require_video,
    rows,
)
from sfrt.ops.checks import require
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op, nbytes

PAST = 2
"""Frames of the past that a convolution with a temporal kernel of 3 sees."""

EPS = 1e-24
"""What the VAE's norms add to the mean square: they only keep black pixels from being divided by zero."""


def causal_input(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor | None, past: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(input, next past, total): SiLU(RMSNorm(total) · gamma) behind the past, and total = x + bias + shortcut.

    x and shortcut: [B, C, T, H, W], channels innermost in memory; bias and gamma: [C]. Without gamma, the total itself
    stands behind the past. past: [B, C, 2, H, W], None for zeros. Input: [B, C, 2 + T, H, W]; next past: its last two
    frames, in memory of their own. If keep, the total comes too and is x, which the terms were added to; else None.
    """
    buffer = empty_video(x, x.shape[1], PAST + x.shape[2])
    buffer[:, :, :PAST] = 0 if past is None else past
    coming = buffer[:, :, PAST:]
    for term in (None if bias is None else per_channel(bias, x), shortcut):
        if term is not None:
            x = torch.add(x, term, out=x if keep else coming)
    if gamma is None:
        coming.copy_(x)
    else:
        normed = F.rms_norm(rows(x), gamma.shape, gamma, eps=EPS).movedim(-1, 1)
        torch.ops.aten.silu.out(normed, out=coming)
    return buffer, buffer[:, :, -PAST:].clone(memory_format=torch.channels_last_3d), x if keep else None


def check(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor | None, past: Tensor | None, keep: bool
) -> None:
    """What the kernels take: frames that lie dense, up to 4096 channels."""
    name = "causal_input"
    require_video(name, "x", x)
    batch, channels, _, height, width = x.shape
    require(channels <= 4096, name, f"x has {channels} channels; kernels take at most 4096")
    for label, vector in (("bias", bias), ("gamma", gamma)):
        if vector is not None:
            require_match(name, label, vector, (channels,), x)
            require(vector.stride(0) == 1, name, f"{label} has stride {vector.stride(0)}; it must be dense")
    for label, video, shape in (
        ("shortcut", shortcut, tuple(x.shape)),
        ("past", past, (batch, channels, PAST, height, width)),
    ):
        if video is not None:
            require_match(name, label, video, shape, x)
            require_video(name, label, video)


def cost(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor | None, past: Tensor | None, keep: bool
) -> Cost:
    """x, shortcut and past read; input and next past written, and the total where it is kept and not x as it came."""
    summed = bias is not None or shortcut is not None
    written = nbytes(x) * (1 + (keep and summed))
    pasts = 2 * PAST * nbytes(x[:, :, :1])
    return Cost(nbytes(x, shortcut, past) + written + pasts, 8 * x.numel())


def _draw(
    channels: int,
    frames: int,
    height: int,
    width: int,
    *,
    batch: int = 1,
    bias: bool = False,
    shortcut: bool = False,
    norm: bool = True,
    past: bool = True,
    keep: bool = False,
    part: bool = False,
    black: bool = False,
) -> Maker:
    def make(draw: Draw) -> Inputs:
        def video(count: int) -> Tensor:
            return draw_video(draw, channels, count, height, width, batch=batch, part=part)

        return {
            "x": video(frames).mul_(0 if black else 1),
            "bias": draw.normal(channels) if bias else None,
            "shortcut": video(frames) if shortcut else None,
            "gamma": draw.normal(channels, std=0.2, mean=1.0) if norm else None,
            "past": video(PAST) if past else None,
            "keep": keep,
        }

    return make


CAUSAL_INPUT = Op(
    name="causal_input",
    reference=causal_input,
    check=check,
    kernels={"triton": "sfrt.ops.triton_kernels.causal_input:causal_input"},
    cases={
        "norm": _draw(24, 3, 2, 5),
        "black": _draw(24, 1, 2, 3, black=True),
        "start": _draw(12, 2, 3, 3, past=False, batch=2),
        "one frame": _draw(12, 1, 3, 3, batch=2),
        "no frame": _draw(12, 0, 3, 3, past=False, norm=False),
        "bias": _draw(12, 2, 3, 3, bias=True),
        "sum kept": _draw(20, 3, 2, 3, bias=True, shortcut=True, keep=True, batch=2),
        "sum": _draw(20, 3, 2, 3, bias=True, shortcut=True),
        "nothing added": _draw(20, 2, 2, 3, keep=True),
        "no norm": _draw(6, 2, 2, 3, norm=False, shortcut=True),
        "parts": _draw(8, 2, 3, 5, bias=True, shortcut=True, keep=True, batch=2, part=True),
        "two programs": _draw(96, 2, 7, 11, bias=True, shortcut=True, keep=True),
    },
    sizes={
        "block's start": _draw(96, 4, 480, 832, bias=True, shortcut=True, keep=True),
        "block's middle": _draw(96, 4, 480, 832, bias=True),
    },
    cost=cost,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
)
