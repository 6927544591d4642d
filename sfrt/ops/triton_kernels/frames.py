"""Decoder output to uint8 frames: a program takes a block of a row, of all planes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.frames import planes_of, scaling
from sfrt.ops.triton_kernels.launch import Launch, Launches

BLOCK = 2048


@triton.jit
def _levels(values, at, inside, scale, shift):
    """Levels 0 to 255 as int32."""
    level = tl.load(values + at, mask=inside, other=0.0).to(tl.float32) * scale + shift
    # Adding 1.5 · 2**23 rounds to a whole number, halves to even, and leaves it in the lowest bits.
    return (tl.clamp(level, 0.0, 255.0) + 12582912.0).to(tl.int32, bitcast=True) & 255


@triton.jit
def _every_fourth(values, COUNT: tl.constexpr):
    """Those at 4i, 4i + 1, 4i + 2 and 4i + 3 of 4 · COUNT values."""
    even, odd = tl.split(tl.reshape(values, (COUNT, 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _frames(
    pixels, out, rows, width, blocks, frame_stride, plane_stride, row_stride, column_stride, scale, shift,
    PLANES: tl.constexpr, WORDS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    column = block * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    red = pixels + row // rows * frame_stride + row % rows * row_stride
    at = column * column_stride
    if PLANES == 1:
        tl.store(out + row * width + column, _levels(red, at, inside, scale, shift).to(tl.uint8), mask=inside)
    else:
        r = _levels(red, at, inside, scale, shift)
        g = _levels(red + plane_stride, at, inside, scale, shift)
        b = _levels(red + 2 * plane_stride, at, inside, scale, shift)
        if WORDS:  # out is int32: four pixels are three words
            group = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
            there = 4 * group < width
            to = out + row * (width // 4 * 3) + 3 * group
            r0, r1, r2, r3 = _every_fourth(r, BLOCK // 4)
            g0, g1, g2, g3 = _every_fourth(g, BLOCK // 4)
            b0, b1, b2, b3 = _every_fourth(b, BLOCK // 4)
            tl.store(to, r0 | g0 << 8 | b0 << 16 | r1 << 24, mask=there)
            tl.store(to + 1, g1 | b1 << 8 | r2 << 16 | g2 << 24, mask=there)
            tl.store(to + 2, b2 | r3 << 8 | g3 << 16 | b3 << 24, mask=there)
        else:
            to = out + (row * width + column) * 3
            tl.store(to, r.to(tl.uint8), mask=inside)
            tl.store(to + 1, g.to(tl.uint8), mask=inside)
            tl.store(to + 2, b.to(tl.uint8), mask=inside)


@Launches
def frames(pixels: Tensor, black: float = 0.0, white: float = 1.0) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.frames.frames."""
    count, _, height, width = pixels.shape
    out = torch.empty(count, height, width, 3, dtype=torch.uint8, device=pixels.device)
    walked = planes_of(pixels)
    _, planes, rows, length = walked.shape
    words = planes == 3 and length % 4 == 0
    blocks = triton.cdiv(length, BLOCK)
    frame_stride, plane_stride, row_stride, column_stride = walked.stride()
    scale, shift = scaling(black, white)
    arguments = {
        "pixels": walked,
        "out": out.view(-1).view(torch.int32) if words else out,
        "rows": rows,
        "width": length,
        "blocks": blocks,
        "frame_stride": frame_stride,
        "plane_stride": plane_stride,
        "row_stride": row_stride,
        "column_stride": column_stride,
        "scale": scale,
        "shift": shift,
    }
    constants = {"PLANES": planes, "WORDS": words, "BLOCK": BLOCK}
    return (Launch(_frames, (count * rows * blocks,), arguments, constants),), out
