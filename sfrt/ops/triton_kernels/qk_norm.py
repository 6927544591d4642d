"""RMSNorm of rows: one program per row, the row in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.checks import row_stride
from sfrt.ops.triton_kernels.launch import Launch, Launches, power_of_two


@triton.jit
def rms_normed(values, weight, width, eps):
    """A whole row, zeros beyond its width, normed in float32; values and weight are of one shape, whatever it is."""
    values = values.to(tl.float32)
    return values * tl.rsqrt(tl.sum(values * values) / width + eps) * weight.to(tl.float32)


@triton.jit
def _qk_norm(x, weight, out, x_stride, width, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * x_stride + columns, mask=inside, other=0.0)
    weights = tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + row * width + columns, rms_normed(values, weights, width, eps).to(out.dtype.element_ty), mask=inside)


@Launches
def qk_norm(x: Tensor, weight: Tensor, heads: int, eps: float) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.qk_norm.qk_norm."""
    width = x.shape[-1]
    out = torch.empty((*x.shape[:-1], heads, width // heads), dtype=x.dtype, device=x.device)
    arguments = {"x": x, "weight": weight, "out": out, "x_stride": row_stride(x), "width": width, "eps": eps}
    block = power_of_two(width)
    launch = Launch(_qk_norm, (x.numel() // width,), arguments, {"BLOCK": block}, warps=max(1, min(block // 512, 16)))
    return (launch,), out
