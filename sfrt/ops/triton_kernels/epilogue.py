"""Bias, shortcut and ReLU in place: memory as it lies, cut into equal pieces."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.triton_kernels.launch import Launch, Launches

_BLOCK = 2048


@triton.jit
def _epilogue(x, bias, shortcut, pixels, width, RELU: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(1).to(tl.int64) * pixels * width
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < pixels * width
    values = tl.load(x + start + place, mask=inside, other=0.0).to(tl.float32)
    if bias is not None:
        column = place - place // width * width  # a remainder would hide from the compiler that it runs on evenly
        values += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if shortcut is not None:
        values += tl.load(shortcut + start + place, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        values = tl.maximum(values, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(x + start + place, values.to(x.dtype.element_ty), mask=inside)


@Launches
def epilogue(x: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.epilogue.epilogue."""
    if bias is None and shortcut is None and not relu:
        return (), x
    width, pixels = x.shape[1], x.shape[-2] * x.shape[-1]
    arguments = {"x": x, "bias": bias, "shortcut": shortcut, "pixels": pixels, "width": width}
    grid = (triton.cdiv(pixels * width, _BLOCK), x.numel() // (pixels * width))
    return (Launch(_epilogue, grid, arguments, {"RELU": relu, "BLOCK": _BLOCK}),), x
