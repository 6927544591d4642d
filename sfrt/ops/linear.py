"""The matrix products, y = x·Wᵀ + b, with or without the bias, and an optional tanh-GELU behind it."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Activation = Literal["none", "gelu_tanh"]


class Linear(nn.Linear):
    """nn.Linear with the activation that follows it, so that the two can be one operation. [..., in] → [..., out]."""

    bias: nn.Parameter | None  # type: ignore[assignment]  # torch says that there always is one

    def __init__(
        self, in_features: int, out_features: int, activation: Activation = "none", *, bias: bool = True
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        if self.weight.is_mkldnn:
            attr, algorithm = ("gelu", "tanh") if self.activation == "gelu_tanh" else ("none", "")
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, attr, [], algorithm)
            return y
        if self.activation == "gelu_tanh" and self.bias is not None and _has_gelu_epilogue(x):
            rows = torch._addmm_activation(self.bias, x.flatten(0, -2), self.weight.t(), use_gelu=True)
            return rows.view(*x.shape[:-1], -1)
        y = F.linear(x, self.weight, self.bias)
        return F.gelu(y, approximate="tanh") if self.activation == "gelu_tanh" else y

    def in_float32(self, x: Tensor) -> Tensor:
        """The same in float32 for weights kept in less, without the activation: for what is computed once."""
        return F.linear(x, self.dense(), None if self.bias is None else self.bias.float())

    def dense(self) -> Tensor:
        """The weight as float32 [out, in], however it is kept."""
        return (self.weight.to_dense() if self.weight.is_mkldnn else self.weight).float()


def _has_gelu_epilogue(x: Tensor) -> bool:
    """Whether torch multiplies, adds a bias and applies the tanh-GELU in one kernel: cuBLASLt's, without gradients.

    Elsewhere the same function of torch has the other GELU, of erf.
    """
    return x.is_cuda and not torch.is_grad_enabled()


def pack_for_cpu(module: nn.Module, rows: int) -> None:
    """Reorder the weights of every Linear below `module` into oneDNN's blocked layout, for about `rows` rows.

    Inference on a CPU only. The plain weights are let go one layer at a time, so where nobody else holds them the peak
    is one layer more. Weights in a dtype that oneDNN cannot multiply on this CPU stay as they are.
    """
    for layer in module.modules():
        if isinstance(layer, Linear) and _can_pack(layer.weight.dtype):
            packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), rows)
            layer.weight = nn.Parameter(packed, requires_grad=False)


def _can_pack(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32
