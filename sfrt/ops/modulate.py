"""The residual stream between two products: add the branch, gated, then norm and modulate for the next one.

A block ends each of its three branches the same way: x += gate · branch, h = LayerNorm(x) · scale + shift. Adaptive
norms (scale and shift of the timestep, arXiv 2212.09748) and the affine norm before cross attention are one formula,
and the sum is read by the norm behind it, so one kernel does both in one pass over memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from sfrt.ops.checks import require, require_like, require_rows, require_vector
from sfrt.ops.eight_bits import quantize, row_scales
from sfrt.ops.op import FLOAT8, Cost, Draw, Inputs, Maker, Op, nbytes


def modulate(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """x + gate · branch, and its LayerNorm · scale + shift; both like x, [..., D].

    branch [..., D] may be None (nothing to add), gate None (added as it is). scale, shift and gate are [D], or anything
    that broadcasts against the rows.
    """
    if branch is not None:
        x = x + branch if gate is None else torch.addcmul(x, branch, gate)
    if scale.ndim == 1:
        return x, F.layer_norm(x, scale.shape, scale, shift, eps)
    return x, torch.addcmul(shift, F.layer_norm(x, scale.shape[-1:], eps=eps), scale)


def modulate_float8(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As modulate, the second as e4m3 values [..., D] and float32 scales [..., 1], ready for a float8 product."""
    x, h = modulate(x, branch, gate, scale, shift, eps)
    scales = row_scales(h, FLOAT8)
    return x, quantize(h, scales, FLOAT8), scales


def check(x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float) -> None:
    """What the kernels take: even rows of at most 16384, vectors of their dtype for what modulates them."""
    width = x.shape[-1] if x.ndim else 0
    require(0 < width <= 16384, "modulate", f"x has rows of {width}; kernels take 1 to 16384")
    require_rows("modulate", "x", x)
    if branch is not None:
        require_rows("modulate", "branch", branch)
        require_like("modulate", "branch", branch, x)
    require(branch is not None or gate is None, "modulate", "there is a gate and no branch for it")
    for name, vector in (("gate", gate), ("scale", scale), ("shift", shift)):
        if vector is not None:
            require_vector("modulate", name, vector, width, x.device)
            require(vector.dtype == x.dtype, "modulate", f"{name} is {vector.dtype}; it must be like x, {x.dtype}")


def _draw(rows: int, width: int, *, branch: bool = True, gate: bool = True, strided: bool = False) -> Maker:
    def make(draw: Draw) -> Inputs:
        rows_of = draw.strided if strided else draw.normal
        return {
            "x": rows_of(rows, width),
            "branch": rows_of(rows, width) if branch else None,
            "gate": draw.normal(width) if gate else None,
            "scale": draw.normal(width, std=0.2, mean=1.0),
            "shift": draw.normal(width, std=0.2),
            "eps": 1e-6,
        }

    return make


def _cost(values_bytes: int) -> Callable[..., Cost]:
    """x and the branch read, the sum written where there is a branch, and the modulated norm."""

    def cost(x: Tensor, branch: Tensor | None, *_: object, **__: object) -> Cost:
        moved = nbytes(x) if branch is None else 3 * nbytes(x)
        return Cost(moved + x.numel() * (values_bytes or x.element_size()), 10 * x.numel())

    return cost


_CASES = {
    "one row": _draw(1, 48),
    "odd width": _draw(7, 50),
    "strided": _draw(5, 96, strided=True),
    "no branch": _draw(5, 96, branch=False, gate=False),
    "no gate": _draw(5, 96, gate=False),
    "1.3B": _draw(3, 1536),
}
_SIZES = {"chunk of 3": _draw(4680, 1536), "frame": _draw(1560, 1536)}

MODULATE = Op(
    name="modulate",
    reference=modulate,
    check=check,
    kernels={
        "triton": "sfrt.ops.triton_kernels.modulate:modulate",
        "cuda": "sfrt.ops.cuda_kernels.modulate:modulate",
    },
    cases=_CASES,
    sizes=_SIZES,
    cost=_cost(0),
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
)

MODULATE_FLOAT8 = Op(
    name="modulate_float8",
    reference=modulate_float8,
    check=check,
    kernels={
        "triton": "sfrt.ops.triton_kernels.modulate:modulate_float8",
        "cuda": "sfrt.ops.cuda_kernels.modulate:modulate_float8",
    },
    cases=_CASES,
    sizes=_SIZES,
    cost=_cost(1),
    tolerance={torch.bfloat16: 4e-2, torch.float16: 4e-2},
)
