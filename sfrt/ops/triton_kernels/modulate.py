"""Gated residual, LayerNorm, scale and shift in one pass: one program per row, the row in registers."""

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
def _modulate(
    x, branch, gate, scale, shift, total, out, scales, x_stride, branch_stride, width, eps, largest, smallest,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    if branch is not None:
        added = tl.load(branch + row * branch_stride + columns, mask=inside, other=0.0).to(tl.float32)
        if gate is not None:
            added *= tl.load(gate + columns, mask=inside, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + added).to(total.dtype.element_ty)
        tl.store(total + row * width + columns, values, mask=inside)
    # What is normed is what the next reader of the sum sees: the rounded values.
    values = values.to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / width, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred) / width + eps)
    result = normed * tl.load(scale + columns, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(shift + columns, mask=inside, other=0.0).to(tl.float32)
    if scales is not None:
        result = result.to(x.dtype.element_ty).to(tl.float32)
        row_scale = tl.maximum(tl.max(tl.abs(result)) / largest, smallest)
        tl.store(scales + row, row_scale)
        result = tl.clamp(result / row_scale, -largest, largest)
    tl.store(out + row * width + columns, result.to(out.dtype.element_ty), mask=inside)


@Launches
def modulate(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """See sfrt.ops.modulate.modulate."""
    total, out = _sum_of(x, branch), _dense_like(x, x.dtype)
    return (_launch(x, branch, gate, scale, shift, eps, total, out, None),), (total, out)


@Launches
def modulate_float8(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor, Tensor]]:
    """See sfrt.ops.modulate.modulate_float8."""
    total, out = _sum_of(x, branch), _dense_like(x, FLOAT8)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    return (_launch(x, branch, gate, scale, shift, eps, total, out, scales),), (total, out, scales)


def _launch(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    total: Tensor,
    out: Tensor,
    scales: Tensor | None,
) -> Launch:
    width = x.shape[-1]
    arguments = {
        "x": x,
        "branch": branch,
        "gate": gate,
        "scale": scale,
        "shift": shift,
        "total": None if branch is None else total,
        "out": out,
        "scales": scales,
        "x_stride": row_stride(x),
        "branch_stride": 0 if branch is None else row_stride(branch),
        "width": width,
        "eps": eps,
        "largest": LARGEST[FLOAT8],
        "smallest": torch.finfo(torch.float32).tiny,
    }
    block = power_of_two(width)
    return Launch(_modulate, (x.numel() // width,), arguments, {"BLOCK": block}, warps=max(1, min(block // 512, 16)))


def _sum_of(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else _dense_like(x, x.dtype)


def _dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)
