"""Matrix products over quantised weights: int8 weights, or e4m3 weights and activations (float8).

A weight has one scale per output channel, an activation one per token, or one for all tokens (static). What stands
before a float8 product may write its rows as such (`takes_float8`), so that they pass through memory in eight bits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt.bundle.quantization import Method
from sfrt.errors import BundleError
from sfrt.ops.choice import Ops, torch_ops
from sfrt.ops.eight_bits import FLOAT8, Float8Rows, Rows, has_float8, quantize
from sfrt.ops.gelu import GELU, QUANTIZE_ROWS, quantize_rows
from sfrt.ops.linear import Activation, Linear

_ALIGNMENT = 16  # of a product's sizes, for CUDA's float8 kernels


def weight_dtype(method: Method) -> torch.dtype:
    """What the weights are stored in."""
    return torch.int8 if method == "int8" else FLOAT8


class QuantizedLinear(Linear):
    """A Linear with a quantised weight, and but for int8 or where weights_only says so, with quantised activations.

    Such weights save memory, not time, as every pass puts them into the activations' dtype. Its parameters: weight
    [out, in], weight_scale float32 [out], bias, and where static input_scale float32 []. A float8 product has a bias,
    whose dtype is that of the result. ops are what it runs with, None being plain torch.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        activation: Activation,
        method: Method,
        ops: Ops | None = None,
        *,
        bias: bool = True,
        weights_only: bool = False,
    ) -> None:
        super().__init__(in_features, out_features, activation, bias=bias)
        ops = ops or torch_ops()
        self.method = method
        self.weights_only = weights_only or method == "int8"
        self._gelu, self._quantize_rows = ops(GELU), ops(QUANTIZE_ROWS)
        self.weight = _parameter(torch.empty(out_features, in_features, dtype=weight_dtype(method)))
        self.weight_scale = _parameter(torch.empty(out_features, dtype=torch.float32))
        static = method == "float8-static"
        self.input_scale = _parameter(torch.empty((), dtype=torch.float32)) if static else None

    def forward(self, x: Rows) -> Tensor:
        """[..., out] from rows [..., in]; where it `takes_float8`, whoever made these may have quantised them."""
        y = self.product(x)
        return self._gelu(y) if self.activation == "gelu_tanh" else y

    def product(self, x: Rows) -> Tensor:
        """forward without the activation."""
        if isinstance(x, Float8Rows):
            return self._float8_product(x)
        if self.weights_only:
            return F.linear(x, self.dense().to(x.dtype), self.bias)
        return self._float8_product(self._float8_rows(x))

    def dense(self) -> Tensor:
        return self.weight.float().mul_(self.weight_scale.unsqueeze(-1))  # in place: a wide layer is there once

    def multiplies_float8(self) -> bool:
        """Whether the GPU does so, with a scale per row: into bfloat16."""
        return (
            has_float8(self.weight.device)
            and self.bias is not None
            and self.bias.dtype == torch.bfloat16
            and not any(size % _ALIGNMENT for size in self.weight.shape)
        )

    def _float8_rows(self, x: Tensor) -> Float8Rows:
        if self.input_scale is None:
            return Float8Rows(*(self._quantize_rows(x) if takes_float8(self) else quantize_rows(x)))
        scale = self.input_scale.expand(*x.shape[:-1], 1)
        return Float8Rows(quantize(x, scale, FLOAT8), scale)

    def _float8_product(self, x: Float8Rows) -> Tensor:
        """In float8 where the GPU can, else the same sums in float32 over what the float8 values stand for."""
        assert self.bias is not None
        if not self.multiplies_float8():
            return self.in_float32(x.values.float() * x.scale).to(self.bias.dtype)
        y = torch._scaled_mm(
            x.values.flatten(0, -2),
            self.weight.t(),
            x.scale.reshape(-1, 1).contiguous(),
            self.weight_scale.unsqueeze(0),
            self.bias,
            out_dtype=self.bias.dtype,
            use_fast_accum=True,  # what a tensor core's own sums lose is far less than the factors have lost
        )
        return y.view(*x.values.shape[:-1], -1)


class QuantizedEmbedding(nn.Module):
    """A table of rows in eight bits, weight [rows, n], with weight_scale float32 [rows]; it gives float32 ones."""

    def __init__(self, rows: int, width: int, method: Method) -> None:
        super().__init__()
        self.weight = _parameter(torch.empty(rows, width, dtype=weight_dtype(method)))
        self.weight_scale = _parameter(torch.empty(rows, dtype=torch.float32))

    def forward(self, ids: Tensor) -> Tensor:
        """[..., n] from int64 [...]."""
        # As bytes: those torch can look up.
        values = F.embedding(ids, self.weight.view(torch.uint8)).view(self.weight.dtype)
        return values.float() * self.weight_scale[ids].unsqueeze(-1)


def takes_float8(layer: nn.Module) -> TypeGuard[QuantizedLinear]:
    """Whether a product wants its rows as Float8Rows: it quantises by token, and would pass over them again for it.

    Not on a GPU that has no float8 products: it has no kernels to make such rows either.
    """
    if not isinstance(layer, QuantizedLinear) or layer.weights_only or layer.method != "float8":
        return False
    return not layer.weight.is_cuda or layer.multiplies_float8()


def place_quantized(
    model: nn.Module, method: Method, layers: Iterable[str], ops: Ops | None = None, *, weights_only: bool = False
) -> None:
    """Put a QuantizedLinear on the meta device, to be assigned, in the place of each of these Linears of the blocks.

    ops are what they run with, None being plain torch. Raises BundleError for a name that is none.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    for name in layers:
        if name not in linears or not name.startswith("blocks."):
            raise BundleError(f"{name!r} is no layer of the model that can be quantised; export the model again")
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
        with torch.device("meta"):
            fresh = QuantizedLinear(*sizes, linear.activation, method, ops, bias=bias, weights_only=weights_only)
        model.set_submodule(name, fresh)


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
