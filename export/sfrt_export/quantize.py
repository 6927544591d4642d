"""`sfrt export --quantize`: the big matrix products of the transformer's blocks in eight bits.

Quantised are the products of self attention, cross attention and feed-forward: over 97 % of Wan 2.1 1.3B. The
embeddings of patches, text and time and the head stay: they are small, and everything else passes through them.

Weights are symmetric with a scale per output channel. Activations stay as they are (int8), have a scale per token,
found as it passes (float8), or one scale per layer, from the largest value that the gate's prompts brought there
(float8-static).

In ONNX graphs a weight is DequantizeLinear over the stored values, per axis 0, a form that TensorRT's parser takes for
INT8 and FP8 with float32 scales. That alone keeps activations as they are: such weights are small in the file and in
memory, and the product runs in the graph's own dtype (TensorRT's weight-only kernels are for INT4). For a product in
FP8, TensorRT wants QuantizeLinear and DequantizeLinear around the activations too, with a scale that is a constant: it
has no scale per token. So the graphs of float8-static have these pairs and give what the torch backend gives; those of
float8 have dequantised weights only, and are nearer to the unquantised model than the torch backend by the rounding of
the activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from sfrt.bundle.quantization import INPUT_SCALE, WEIGHT_SCALE, Method
from sfrt.bundle.writer import LazyTensor
from sfrt.config import ModelConfig
from sfrt.ops.eight_bits import quantize, row_scales
from sfrt.ops.linear import Linear
from sfrt.ops.quantized_linear import weight_dtype
from sfrt.transformer import Transformer

_BLOCK = 1 << 25
"""Numbers that are in float32 at a time: a table of tokens may have a billion."""


def quantizable(config: ModelConfig) -> list[str]:
    """The layers that are quantised, by module name, in running order."""
    with torch.device("meta"):
        model = Transformer(config)
    return [name for name, module in model.blocks.named_modules(prefix="blocks") if isinstance(module, Linear)]


def quantized_tensors(
    weights: Mapping[str, LazyTensor], method: Method, layers: Iterable[str], input_peaks: Mapping[str, float]
) -> dict[str, LazyTensor]:
    """A part's tensors with the weights of these layers quantised, each made when asked for.

    input_peaks is the largest value that each layer was given; only float8-static asks for it.
    """
    dtype = weight_dtype(method)
    tensors = dict(weights)
    for layer in layers:
        weight = weights[f"{layer}.weight"]
        tensors[f"{layer}.weight"] = LazyTensor(weight.shape, dtype, partial(_values, weight, dtype))
        tensors[f"{layer}.{WEIGHT_SCALE}"] = LazyTensor(
            weight.shape[:1], torch.float32, partial(_scales, weight, dtype)
        )
        if method == "float8-static":
            scale = row_scales(torch.tensor([input_peaks[layer]]), dtype).squeeze(-1)
            tensors[f"{layer}.{INPUT_SCALE}"] = LazyTensor((), torch.float32, scale.clone)
    return tensors


def _scales(weight: LazyTensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([row_scales(rows, dtype).squeeze(-1) for rows in _blocks(weight)])


def _values(weight: LazyTensor, dtype: torch.dtype) -> Tensor:
    return torch.cat([quantize(rows, row_scales(rows, dtype), dtype) for rows in _blocks(weight)])


def _blocks(weight: LazyTensor) -> tuple[Tensor, ...]:
    blocks: tuple[Tensor, ...] = weight.make().split(max(1, _BLOCK // weight.shape[1]))
    return blocks
