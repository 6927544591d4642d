"""What follows a convolution: its bias, the shortcut around it, a ReLU; in one pass, in place.

cuDNN's convolutions leave the bias to a pass of its own, and so would every term after it be.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt.ops.channels_last import draw_frames, draw_video, per_channel, require_dense, require_match
from sfrt.ops.checks import require
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op, nbytes


def epilogue(x: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Tensor:
    """x + bias + shortcut, then a ReLU if asked for, written to x, which is returned.

    x and shortcut: [N, C, …], channels innermost in memory; bias: [C].
    """
    for term in (None if bias is None else per_channel(bias, x), shortcut):
        if term is not None:
            x = x.add_(term)
    return x.relu_() if relu else x


def check(x: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> None:
    """What the kernel takes: memory without gaps."""
    require_dense("epilogue", "x", x)
    if bias is not None:
        require_match("epilogue", "bias", bias, (x.shape[1],), x)
        require(bias.stride(0) == 1, "epilogue", f"bias has stride {bias.stride(0)}; it must be dense")
    if shortcut is not None:
        require_match("epilogue", "shortcut", shortcut, tuple(x.shape), x)
        require_dense("epilogue", "shortcut", shortcut)


def cost(x: Tensor, bias: Tensor | None, shortcut: Tensor | None, relu: bool) -> Cost:
    """x read and written, the shortcut read; nothing where there is nothing to do."""
    if bias is None and shortcut is None and not relu:
        return Cost(0)
    return Cost(2 * nbytes(x) + nbytes(shortcut), 3 * x.numel())


def _draw(*shape: int, bias: bool = True, shortcut: bool = True, relu: bool = True) -> Maker:
    def make(draw: Draw) -> Inputs:
        def drawn() -> Tensor:
            return draw_video(draw, *shape[1:], batch=shape[0]) if len(shape) == 5 else draw_frames(draw, *shape)

        return {
            "x": drawn(),
            "bias": draw.normal(shape[1]) if bias else None,
            "shortcut": drawn() if shortcut else None,
            "relu": relu,
        }

    return make


EPILOGUE = Op(
    name="epilogue",
    reference=epilogue,
    check=check,
    kernels={"triton": "sfrt.ops.triton_kernels.epilogue:epilogue"},
    cases={
        "all": _draw(2, 12, 3, 5),
        "bias and ReLU": _draw(2, 24, 3, 5, shortcut=False),
        "ReLU": _draw(1, 7, 3, 5, bias=False, shortcut=False),
        "video": _draw(2, 20, 3, 2, 5, relu=False),
        "shortcut": _draw(2, 20, 3, 2, 5, bias=False, relu=False),
        "nothing": _draw(1, 4, 2, 2, bias=False, shortcut=False, relu=False),
        "two programs": _draw(1, 48, 9, 7),
    },
    sizes={
        "memory block's middle": _draw(6, 64, 240, 416, shortcut=False),
        "memory block's end": _draw(6, 64, 240, 416),
    },
    cost=cost,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
)
