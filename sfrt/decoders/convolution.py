"""Convolutions that keep the channels innermost in memory, and need not add their bias."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfrt.ops.choice import Ops
from sfrt.ops.epilogue import EPILOGUE


class Conv2d(nn.Conv2d):
    """A convolution whose result lies channels-last, whichever library it comes from: most do that by themselves."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, weight, bias)
        return y.contiguous(memory_format=torch.channels_last)


class Conv3d(nn.Conv3d):
    """The same for videos."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = super()._conv_forward(input, weight, bias)
        return y.contiguous(memory_format=torch.channels_last_3d)


class Convolve:
    """Convolves; leaves the bias to whatever reads the result first, where that is a kernel that can add it in passing.

    cuDNN's convolutions spend a pass over memory on the bias; those of a CPU add it for nothing.
    """

    def __init__(self, ops: Ops) -> None:
        self._leaves_bias = ops(EPILOGUE) is not EPILOGUE.reference

    def __call__(self, conv: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The convolution of x, and the bias that is still to be added."""
        if not self._leaves_bias:
            return conv(x), None
        assert isinstance(conv, Conv2d | Conv3d)
        return conv._conv_forward(x, conv.weight, None), conv.bias
