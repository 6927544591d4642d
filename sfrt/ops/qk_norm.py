"""RMSNorm over the full width of all heads, for the queries and keys of cross attention."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfrt.ops.checks import require, require_device, require_rows, require_shape
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op, nbytes


def qk_norm(x: Tensor, weight: Tensor, heads: int, eps: float) -> Tensor:
    """The norm of x [..., H·d], its weight [H·d], as heads [..., H, d]."""
    return F.rms_norm(x, weight.shape, weight, eps).view(*x.shape[:-1], heads, -1)


def check(x: Tensor, weight: Tensor, heads: int, eps: float) -> None:
    """What the kernels take: even rows of at most 16384."""
    width = x.shape[-1] if x.ndim else 0
    require(0 < width <= 16384, "qk_norm", f"x has rows of {width}; kernels take 1 to 16384")
    require(heads > 0 and width % heads == 0, "qk_norm", f"rows of {width} are no {heads} heads of one size")
    require(x.numel() > 0, "qk_norm", f"x is {list(x.shape)}; there must be a row")
    require_rows("qk_norm", "x", x)
    require_shape("qk_norm", "weight", weight, (width,), x.dtype)
    require_device("qk_norm", "weight", weight, x.device)


def _draw(rows: int, heads: int, size: int, *, strided: bool = False) -> Maker:
    def make(draw: Draw) -> Inputs:
        return {
            "x": (draw.strided if strided else draw.normal)(rows, heads * size),
            "weight": draw.normal(heads * size, std=0.2, mean=1.0),
            "heads": heads,
            "eps": 1e-6,
        }

    return make


def _cost(x: Tensor, *_: object, **__: object) -> Cost:
    return Cost(2 * nbytes(x), 4 * x.numel())


QK_NORM = Op(
    name="qk_norm",
    reference=qk_norm,
    check=check,
    kernels={
        "cuda": "sfrt.ops.cuda_kernels.qk_norm:qk_norm",
        "triton": "sfrt.ops.triton_kernels.qk_norm:qk_norm",
    },
    cases={
        "one row": _draw(1, 2, 24),
        "odd width": _draw(7, 5, 11),
        "strided": _draw(5, 4, 16, strided=True),
        "1.3B": _draw(3, 12, 128),
        "14B": _draw(2, 40, 128),
    },
    sizes={"chunk of 3": _draw(4680, 12, 128), "frame": _draw(1560, 12, 128)},
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
)
