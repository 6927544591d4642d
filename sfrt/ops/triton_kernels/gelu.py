"""The activation, and rows as e4m3 values and scales, in one pass: one program per row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.checks import row_stride
from sfrt.ops.eight_bits import LARGEST
from sfrt.ops.op import FLOAT8
from sfrt.ops.triton_kernels.launch import Launch, Launches, power_of_two


@triton.jit
def _gelu(x):
    # x (1 + tanh(u)) / 2 as x · sigmoid(2 u): nothing cancels; exp of what is below zero never overflows.
    twice = 1.5957691216057308 * (x + 0.044715 * x * x * x)
    decay = tl.exp(-tl.abs(twice))
    return tl.where(x < 0, x * decay, x) / (1.0 + decay)


@triton.jit
def _read(x, columns, inside, GELU: tl.constexpr):
    values = tl.load(x + columns, mask=inside, other=0.0)
    if GELU:
        values = _gelu(values.to(tl.float32)).to(x.dtype.element_ty)
    return values


@triton.jit
def _write(out, columns, inside, values, row_scale, largest):
    if row_scale is not None:
        values = tl.clamp(values.to(tl.float32) / row_scale, -largest, largest)
    tl.store(out + columns, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _rows(
    x, out, scales, x_stride, width, largest, smallest,
    GELU: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    # A row is a power of two and a rest: 8192 + 1024 lanes for 8960 elements, not 16384.
    row = tl.program_id(0).to(tl.int64)
    x += row * x_stride
    out += row * width
    head = tl.arange(0, HEAD)
    tail = HEAD + tl.arange(0, TAIL)
    front = _read(x, head, head < width, GELU)
    back = _read(x, tail, tail < width, GELU)
    row_scale = None
    if scales is not None:
        reach = tl.maximum(tl.max(tl.abs(front)), tl.max(tl.abs(back))).to(tl.float32)
        row_scale = tl.maximum(reach / largest, smallest)
        tl.store(scales + row, row_scale)
    _write(out, head, head < width, front, row_scale, largest)
    _write(out, tail, tail < width, back, row_scale, largest)


@Launches
def gelu(x: Tensor) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.gelu.gelu."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return (_launch(x, out, None, gelu=True),), out


@Launches
def gelu_float8(x: Tensor) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """See sfrt.ops.gelu.gelu_float8."""
    out, scales = _quantized_like(x)
    return (_launch(x, out, scales, gelu=True),), (out, scales)


@Launches
def quantize_rows(x: Tensor) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """See sfrt.ops.gelu.quantize_rows."""
    out, scales = _quantized_like(x)
    return (_launch(x, out, scales, gelu=False),), (out, scales)


def _launch(x: Tensor, out: Tensor, scales: Tensor | None, *, gelu: bool) -> Launch:
    width = x.shape[-1]
    head = 1 << (width.bit_length() - 1)
    arguments = {
        "x": x,
        "out": out,
        "scales": scales,
        "x_stride": row_stride(x),
        "width": width,
        "largest": LARGEST[FLOAT8],
        "smallest": torch.finfo(torch.float32).tiny,
    }
    constants = {"GELU": gelu, "HEAD": head, "TAIL": power_of_two(max(width - head, 1))}
    return Launch(_rows, (x.numel() // width,), arguments, constants, warps=max(1, min(head // 512, 16)))


def _quantized_like(x: Tensor) -> tuple[Tensor, Tensor]:
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return torch.empty(x.shape, dtype=FLOAT8, device=x.device), scales
