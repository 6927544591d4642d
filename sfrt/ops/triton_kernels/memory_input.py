"""Every frame beside the one before it: read once, written to its own row and to the next frame's."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.triton_kernels.launch import Launch, Launches

_BLOCK = 2048


@triton.jit
def _memory_input(frames, memory, both, newest, length, pixels, width, BLOCK: tl.constexpr):
    clip = (tl.program_id(1) // length).to(tl.int64)
    frame = tl.program_id(1) % length
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < pixels * width
    place_in_both = place + (place // width) * width
    size = tl.cast(pixels, tl.int64) * width
    here = clip * length + frame
    values = tl.load(frames + here * size + place, mask=inside, other=0.0)
    tl.store(both + here * (2 * size) + place_in_both, values, mask=inside)
    if frame + 1 < length:
        tl.store(both + (here + 1) * (2 * size) + place_in_both + width, values, mask=inside)
    else:
        tl.store(newest + clip * size + place, values, mask=inside)
    if frame == 0:
        carried = tl.zeros([BLOCK], both.dtype.element_ty)
        if memory is not None:
            carried = tl.load(memory + clip * size + place, mask=inside, other=0.0)
        tl.store(both + here * (2 * size) + place_in_both + width, carried, mask=inside)


@Launches
def memory_input(frames: Tensor, memory: Tensor | None, batch: int) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """See sfrt.ops.memory_input.memory_input."""
    count, channels, height, width = frames.shape
    both = _empty(frames, count, 2 * channels)
    newest = _empty(frames, batch, channels)
    arguments = {
        "frames": frames,
        "memory": memory,
        "both": both,
        "newest": newest,
        "length": count // batch,
        "pixels": height * width,
        "width": channels,
    }
    grid = (triton.cdiv(height * width * channels, _BLOCK), count)
    return (Launch(_memory_input, grid, arguments, {"BLOCK": _BLOCK}),), (both, newest)


def _empty(frames: Tensor, count: int, channels: int) -> Tensor:
    shape = (count, channels, *frames.shape[2:])
    return torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=torch.channels_last)
