"""Sum, RMSNorm and SiLU behind the past frames in one pass: one program per few pixels of one frame of the input."""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.causal_input import EPS, PAST
from sfrt.ops.channels_last import empty_video, frame_strides
from sfrt.ops.triton_kernels.launch import Launch, Launches, power_of_two

_VALUES = 8192
"""Values in a program of four warps, at most: 64 a thread, 48 at the model's widths."""


@triton.jit
def _causal_input(
    x, bias, shortcut, gamma, past, out, newest, x_batch, x_frame, shortcut_batch, shortcut_frame, past_batch,
    past_frame, frames, pixels, width, eps, AHEAD: tl.constexpr, KEEP: tl.constexpr, ROWS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program per ROWS pixels of a frame of `out`; their channels are in PARTS, as three are seldom one block."""
    batch = (tl.program_id(1) // (AHEAD + frames)).to(tl.int64)
    frame = (tl.program_id(1) % (AHEAD + frames)).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out += (batch * (AHEAD + frames) + frame) * pixels * width
    newest += (batch * AHEAD + frame - frames) * pixels * width
    if frame < AHEAD:
        for part in tl.static_range(PARTS):
            places, inside, _, _ = _part(part, row, pixels, width, BLOCK)
            behind = tl.zeros([ROWS, BLOCK], out.dtype.element_ty)
            if past is not None:
                here = past + batch * past_batch + frame * past_frame + places
                behind = tl.load(here, mask=inside, other=0.0)
            _store(out, newest, places, behind, inside, frame >= frames)
    else:
        x += batch * x_batch + (frame - AHEAD) * x_frame
        if shortcut is not None:
            shortcut += batch * shortcut_batch + (frame - AHEAD) * shortcut_frame
        totals = tl.tuple(())
        squares = tl.zeros([ROWS], tl.float32)
        for part in tl.static_range(PARTS):
            places, inside, column, exists = _part(part, row, pixels, width, BLOCK)
            total = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
            if bias is not None:
                total += tl.load(bias + column, mask=exists, other=0.0).to(tl.float32)[None, :]
            if shortcut is not None:
                total += tl.load(shortcut + places, mask=inside, other=0.0).to(tl.float32)
            if KEEP:
                # What is normed is what the next reader of the sum sees: the rounded values.
                rounded = total.to(x.dtype.element_ty)
                tl.store(x + places, rounded, mask=inside)
                total = rounded.to(tl.float32)
            squares += tl.sum(total * total, axis=1)
            totals += (total,)
        to_unit = tl.rsqrt(squares / width + eps)[:, None]
        for part in tl.static_range(PARTS):
            places, inside, column, exists = _part(part, row, pixels, width, BLOCK)
            result = totals[part]
            if gamma is not None:
                result *= to_unit * tl.load(gamma + column, mask=exists, other=0.0).to(tl.float32)[None, :]
                # result · sigmoid(result): a reciprocal square root, squared, is half the work of a division.
                root = tl.rsqrt(1.0 + tl.exp2(result * -1.4426950408889634))
                result *= root * root
            _store(out, newest, places, result.to(out.dtype.element_ty), inside, frame >= frames)


@triton.jit
def _part(part, row, pixels, width, BLOCK: tl.constexpr):
    """Where these rows' part lies in a frame, which of it there is, its columns, and which of these there are."""
    column = part * BLOCK + tl.arange(0, BLOCK)
    exists = column < width
    return row[:, None] * width + column[None, :], (row < pixels)[:, None] & exists[None, :], column, exists


@triton.jit
def _store(out, newest, places, values, inside, is_newest):
    """A piece of a frame of the input, kept for the next chunk too if the frame is among the newest."""
    tl.store(out + places, values, mask=inside)
    if is_newest:
        tl.store(newest + places, values, mask=inside)


@Launches
def causal_input(
    x: Tensor, bias: Tensor | None, shortcut: Tensor | None, gamma: Tensor | None, past: Tensor | None, keep: bool
) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor, Tensor | None]]:
    """See sfrt.ops.causal_input.causal_input."""
    batch, channels, frames, height, width = x.shape
    out, newest = empty_video(x, channels, PAST + frames), empty_video(x, channels, PAST)
    parts, block = min(((parts, power_of_two(triton.cdiv(channels, parts))) for parts in (1, 3)), key=math.prod)
    pixels = height * width
    rows = min(power_of_two(pixels), max(1, _VALUES // power_of_two(channels)))
    arguments = {
        "x": x,
        "bias": bias,
        "shortcut": shortcut,
        "gamma": gamma,
        "past": past,
        "out": out,
        "newest": newest,
        **dict(zip(("x_batch", "x_frame"), frame_strides(x), strict=True)),
        **dict(zip(("shortcut_batch", "shortcut_frame"), frame_strides(shortcut), strict=True)),
        **dict(zip(("past_batch", "past_frame"), frame_strides(past), strict=True)),
        "frames": frames,
        "pixels": pixels,
        "width": channels,
        "eps": EPS,
    }
    kept = keep and (bias is not None or shortcut is not None)
    constants = {"AHEAD": PAST, "KEEP": kept, "ROWS": rows, "PARTS": parts, "BLOCK": block}
    launch = Launch(_causal_input, (triton.cdiv(pixels, rows), batch * (PAST + frames)), arguments, constants)
    return (launch,), (out, newest, x if keep else None)
