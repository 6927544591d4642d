"""Frames that lie side by side in the channels, put one after the other, as they are or twice the size."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.channels_last import empty_video
from sfrt.ops.triton_kernels.launch import Launch, Launches

_BLOCK = 2048


@triton.jit
def _unfold(
    x, bias, first, out, first_batch, frames, pixels, columns, width, FOLD: tl.constexpr, LEAD: tl.constexpr,
    SCALE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per piece of an unfolded frame: LEAD first ones, then FOLD from each of the `frames` of x."""
    clip = (tl.program_id(1) // (LEAD + FOLD * frames)).to(tl.int64)
    frame = (tl.program_id(1) % (LEAD + FOLD * frames)).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < pixels * width
    pixel = place // width
    out += (clip * (LEAD + FOLD * frames) + frame) * pixels * width * (SCALE * SCALE)
    if first is not None and frame < LEAD:
        tl.store(out + place, tl.load(first + clip * first_batch + place, mask=inside, other=0.0), mask=inside)
    if frame >= LEAD:
        folded = (clip * frames + (frame - LEAD) // FOLD) * pixels * width * FOLD
        part = (frame - LEAD) % FOLD * width
        values = tl.load(x + folded + part + place + pixel * (width * (FOLD - 1)), mask=inside, other=0.0)
        if bias is not None:
            added = tl.load(bias + part + (place - pixel * width), mask=inside, other=0.0)
            values = (values.to(tl.float32) + added.to(tl.float32)).to(out.dtype.element_ty)
        # In front of a pixel, those of the rows above it stand SCALE² times, those of its own row SCALE times.
        corner = place + (pixel // columns * columns * SCALE + pixel) * ((SCALE - 1) * width)
        for down in tl.static_range(SCALE):
            for right in tl.static_range(SCALE):
                tl.store(out + corner + (down * SCALE * columns + right) * width, values, mask=inside)


@Launches
def interleave(x: Tensor, bias: Tensor | None, first: Tensor | None) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.interleave.interleave."""
    lead = 0 if first is None else 1
    out = empty_video(x, x.shape[1] // 2, lead + 2 * x.shape[2])
    return (_launch(x, bias, first, out, clips=x.shape[0], frames=x.shape[2], fold=2, scale=1),), out


@Launches
def upsample(x: Tensor, frames: int) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.upsample.upsample."""
    count, channels, height, width = x.shape
    shape = (count * frames, channels // frames, 2 * height, 2 * width)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return (_launch(x, None, None, out, clips=1, frames=count, fold=frames, scale=2),), out


def _launch(
    x: Tensor,
    bias: Tensor | None,
    first: Tensor | None,
    out: Tensor,
    *,
    clips: int,
    frames: int,
    fold: int,
    scale: int,
) -> Launch:
    """x is dense: `frames` folded ones for each clip."""
    height, columns = x.shape[-2:]
    width, lead = x.shape[1] // fold, 0 if first is None else 1
    arguments = {
        "x": x,
        "bias": bias,
        "first": first,
        "out": out,
        "first_batch": 0 if first is None else first.stride(0),
        "frames": frames,
        "pixels": height * columns,
        "columns": columns,
        "width": width,
    }
    constants = {"FOLD": fold, "LEAD": lead, "SCALE": scale, "BLOCK": _BLOCK}
    grid = (triton.cdiv(height * columns * width, _BLOCK), clips * (lead + fold * frames))
    return Launch(_unfold, grid, arguments, constants)
