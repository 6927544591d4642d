"""Between two products: the activation, and rows as the e4m3 values and scales that a float8 product takes.

A product in bfloat16 has its GELU in its own epilogue (cuBLASLt; `torch._addmm_activation`), which costs no pass over
memory, so `gelu` is for what has no such epilogue: a float8 product whose reader is not float8. Where the reader is,
`gelu_float8` does both at once; `quantize_rows` serves the rows that no other op makes, such as those of attention.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sfrt.ops.checks import require, require_rows
from sfrt.ops.eight_bits import quantize, row_scales
from sfrt.ops.op import FLOAT8, Cost, Draw, Inputs, Maker, Op, nbytes


def gelu(x: Tensor) -> Tensor:
    """x · (1 + tanh(√(2/π) · (x + 0.044715 x³))) / 2 (arXiv 1606.08415), like x, [..., N]."""
    return F.gelu(x, approximate="tanh")


def gelu_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """As gelu, rounded to x's dtype, then as e4m3 values [..., N] and float32 scales [..., 1]."""
    return quantize_rows(gelu(x))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., N] as e4m3 values [..., N] and float32 scales [..., 1]; a row's largest value is e4m3's, 448."""
    scales = row_scales(x, FLOAT8)
    return quantize(x, scales, FLOAT8), scales


def _check(op: str) -> Callable[[Tensor], None]:
    """What the kernels take: even rows of at most 16384."""

    def check(x: Tensor) -> None:
        width = x.shape[-1] if x.ndim else 0
        require(0 < width <= 16384, op, f"x has rows of {width}; kernels take 1 to 16384")
        require_rows(op, "x", x)

    return check


def _draw(*shape: int, strided: bool = False, std: float = 1.0) -> Maker:
    def make(draw: Draw) -> Inputs:
        return {"x": draw.strided(*shape) if strided else draw.normal(*shape, std=std)}

    return make


def _zeros(draw: Draw) -> Inputs:
    x = draw.normal(3, 48)
    return {"x": x * torch.tensor([[0.0], [1.0], [1e-3]], dtype=x.dtype, device=x.device)}


def _cost(values_bytes: int, operations: int) -> Callable[[Tensor], Cost]:
    """x read, the values written; with scales where the values are of one byte."""

    def cost(x: Tensor) -> Cost:
        scales = 4 * (x.numel() // x.shape[-1]) if values_bytes else 0
        return Cost(nbytes(x) + x.numel() * (values_bytes or x.element_size()) + scales, operations * x.numel())

    return cost


_CASES = {
    "one row": _draw(1, 48),
    "odd width": _draw(7, 50),
    "a power of two": _draw(2, 3, 64),
    "strided": _draw(5, 96, strided=True),
    "large": _draw(3, 96, std=40.0),
    "1.3B": _draw(2, 8960),
}
_QUANTIZED_CASES = _CASES | {"a row of zeros": _zeros}
_SIZES = {"chunk of 3": _draw(4680, 8960), "frame": _draw(1560, 8960)}
_QUANTIZED_TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 4e-2}


GELU = Op(
    name="gelu",
    reference=gelu,
    check=_check("gelu"),
    kernels={"triton": "sfrt.ops.triton_kernels.gelu:gelu"},
    cases=_CASES,
    sizes=_SIZES,
    cost=_cost(0, 8),
    tolerance={torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4},
)

GELU_FLOAT8 = Op(
    name="gelu_float8",
    reference=gelu_float8,
    check=_check("gelu_float8"),
    kernels={
        "triton": "sfrt.ops.triton_kernels.gelu:gelu_float8",
        "cuda": "sfrt.ops.cuda_kernels.gelu:gelu_float8",
    },
    cases=_QUANTIZED_CASES,
    sizes=_SIZES,
    cost=_cost(1, 12),
    tolerance=_QUANTIZED_TOLERANCE,
)

QUANTIZE_ROWS = Op(
    name="quantize_rows",
    reference=quantize_rows,
    check=_check("quantize_rows"),
    kernels={
        "triton": "sfrt.ops.triton_kernels.gelu:quantize_rows",
        "cuda": "sfrt.ops.cuda_kernels.gelu:quantize_rows",
    },
    cases=_QUANTIZED_CASES,
    sizes={"chunk of 3": _draw(4680, 1536), "frame": _draw(1560, 1536)},
    cost=_cost(1, 4),
    tolerance=_QUANTIZED_TOLERANCE,
)
