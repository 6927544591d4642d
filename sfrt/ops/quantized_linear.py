"""Matrix products over quantised weights: int8 weights, or e4m3 weights and activations (float8).

Quantisation is symmetric, with one float32 scale per output channel of a weight and per token of an activation (or one
for all tokens, static): x ≈ values · scale, the largest value of a row being the largest the type has.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt.bundle.quantization import Method
from sfrt.errors import BundleError
from sfrt.ops.linear import Activation, Linear

FLOAT8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FLOAT8: 448.0}

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a row of zeros has a scale too: TensorRT wants them positive
_ALIGNMENT = 16  # of a product's sizes, for CUDA's float8 kernels


def weight_dtype(method: Method) -> torch.dtype:
    """What the weights are stored in."""
    return torch.int8 if method == "int8" else FLOAT8


def row_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each row, float32 [..., 1] from [..., n]."""
    largest = x.abs().amax(dim=-1, keepdim=True).float()
    return (largest / LARGEST[dtype]).clamp_min(_SMALLEST_SCALE)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values nearest to x / scale, ties to even; what is beyond the type's range becomes its largest value."""
    values = (x.float() / scale).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (values.round_() if dtype == torch.int8 else values).to(dtype)


class QuantizedLinear(Linear):
    """A Linear with a quantised weight; int8 saves memory, not time, as every pass puts it into the activations' dtype.

    Its parameters: weight [out, in], weight_scale float32 [out], bias, and where static input_scale float32 [].
    """

    def __init__(self, in_features: int, out_features: int, activation: Activation, method: Method) -> None:
        super().__init__(in_features, out_features, activation)
        self.method = method
        self.weight = _parameter(torch.empty(out_features, in_features, dtype=weight_dtype(method)))
        self.weight_scale = _parameter(torch.empty(out_features, dtype=torch.float32))
        static = method == "float8-static"
        self.input_scale = _parameter(torch.empty((), dtype=torch.float32)) if static else None

    def forward(self, x: Tensor) -> Tensor:
        if self.method == "int8":
            y = F.linear(x, self._dequantized().to(x.dtype), self.bias)
        else:
            scale = row_scales(x, FLOAT8) if self.input_scale is None else self.input_scale.expand(*x.shape[:-1], 1)
            y = self._float8_product(quantize(x, scale, FLOAT8), scale, x.dtype)
        return F.gelu(y, approximate="tanh") if self.activation == "gelu_tanh" else y

    def in_float32(self, x: Tensor) -> Tensor:
        return F.linear(x, self._dequantized(), self.bias.float())

    def _float8_product(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """In float8 where the GPU can, else the same sums in float32 over what the float8 values stand for."""
        if not _multiplies_float8(self.weight, dtype):
            return F.linear(values.float() * scale, self._dequantized(), self.bias.float()).to(dtype)
        rows = values.flatten(0, -2)
        scales = scale.reshape(-1, 1).contiguous(), self.weight_scale[None]
        y = torch._scaled_mm(rows, self.weight.t(), *scales, self.bias, out_dtype=dtype)
        product: Tensor = y.unflatten(0, values.shape[:-1])
        return product

    def _dequantized(self) -> Tensor:
        return self.weight.float() * self.weight_scale[:, None]


def place_quantized(model: nn.Module, method: Method, layers: Iterable[str]) -> None:
    """Put a QuantizedLinear on the meta device, to be assigned, in the place of each of these Linears of the blocks.

    Raises BundleError for a name that is none.
    """
    linears = {name for name, module in model.named_modules() if isinstance(module, Linear)}
    for name in layers:
        if name not in linears or not name.startswith("blocks."):
            raise BundleError(f"{name!r} is no layer of the transformer that can be quantised; export the model again")
        linear = model.get_submodule(name)
        assert isinstance(linear, Linear)
        with torch.device("meta"):
            fresh = QuantizedLinear(linear.in_features, linear.out_features, linear.activation, method)
        model.set_submodule(name, fresh)


def _multiplies_float8(weight: Tensor, dtype: torch.dtype) -> bool:
    """CUDA's kernels with a scale per row give bfloat16, from compute capability 8.9 on."""
    return (
        weight.is_cuda
        and dtype == torch.bfloat16
        and not any(size % _ALIGNMENT for size in weight.shape)
        and torch.cuda.get_device_capability(weight.device) >= (8, 9)
    )


def _parameter(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
