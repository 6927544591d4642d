"""What TensorRT's ONNX parser says that it takes, for the operators of our graphs, and what in a graph it would refuse.

Source: the operator table of TensorRT 11's parser (onnx-tensorrt, docs/operators.md) and the documentation of
KVCacheUpdate. Asked before a graph is parsed, so that a refusal names the node, and by tests where no TensorRT is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper

NEWEST_OPSET = 25

_FLOATS: set[int] = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_NUMBERS: set[int] = {*_FLOATS, TensorProto.INT32, TensorProto.INT64}
_ANYTHING: set[int] = {*_NUMBERS, TensorProto.BOOL}

_TYPES: dict[str, set[int]] = {
    **dict.fromkeys(("Attention", "Clip", "Conv", "Gemm", "LayerNormalization", "MatMul", "QuantizeLinear"), _FLOATS),
    **dict.fromkeys(("Resize", "RMSNormalization", "RotaryEmbedding", "Sigmoid", "Softmax", "Sqrt", "Tanh"), _FLOATS),
    **dict.fromkeys(("Add", "Div", "Gelu", "Max", "Min", "Mul", "Pad", "Pow", "Range", "Relu", "Sub"), _NUMBERS),
    **dict.fromkeys(("Cast", "Concat", "Constant", "Expand", "Gather", "Identity", "Reshape", "Shape"), _ANYTHING),
    **dict.fromkeys(("Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where"), _ANYTHING),
    "DequantizeLinear": {TensorProto.INT8, TensorProto.FLOAT8E4M3FN},
    **dict.fromkeys(("ReduceL2", "ReduceMean"), _NUMBERS),
    "TensorScatter": _FLOATS,
}
"""The types of an operator's first input."""


def refusals(model: ModelProto) -> list[str]:
    """Everything in a graph that the parser would refuse, each as half a sentence that names the node."""
    opsets = [entry for entry in model.opset_import if entry.domain or entry.version > NEWEST_OPSET]
    graph = _Graph(model)
    return [f"opset {entry.version} of domain {entry.domain!r}" for entry in opsets] + [
        f"{node.op_type} of {node.output[0]}: {reason}" for node in model.graph.node for reason in graph.reasons(node)
    ]


class _Graph:
    """A graph with the types and shapes of all its values."""

    def __init__(self, model: ModelProto) -> None:
        graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
        self._types: dict[str, onnx.TypeProto.Tensor] = {
            value.name: value.type.tensor_type for value in (*graph.input, *graph.value_info, *graph.output)
        }
        self._constants = {tensor.name: tensor.data_type for tensor in graph.initializer}
        self._inputs = {value.name for value in graph.input}
        self._outputs = {value.name for value in graph.output}

    def reasons(self, node: NodeProto) -> Iterator[str]:
        """Why the parser would refuse this node."""
        if node.op_type not in _TYPES:
            yield "not among the operators that are known to be taken"
            return
        if node.input and self._type(node.input[0]) not in _TYPES[node.op_type]:
            yield f"does not take {TensorProto.DataType.Name(self._type(node.input[0]))}"
        if node.op_type in _RULES:
            yield from _RULES[node.op_type](self, node, _attributes(node))

    def attention(self, node: NodeProto, attributes: dict[str, object]) -> Iterator[str]:
        if any(self._rank(name) != 4 for name in node.input[:4] if name):
            yield "q, k, v and the mask must have 4 dimensions"
        if any(node.input[4:]):
            yield "past_key, past_value and nonpad_kv_seqlen are not taken"
        if len(node.output) > 1 or attributes.get("qk_matmul_output_mode"):
            yield "has the attention for its only output"
        if attributes.get("softcap"):
            yield "softcap is not taken"

    def tensor_scatter(self, node: NodeProto, attributes: dict[str, object]) -> Iterator[str]:
        cache, update = node.input[:2]
        if self._rank(cache) != 4 or self._rank(update) != 4:
            yield "past_cache and update must have 4 dimensions"
        elif not self._types[cache].shape.dim[2].dim_value:
            yield "the length of the cache must be a number"
        if attributes.get("axis", -2) not in (-2, 2) or attributes.get("mode", b"linear") != b"linear":
            yield "writes along axis -2 in linear mode only"
        if cache not in self._inputs or node.output[0] not in self._outputs:
            yield "the cache must be an input of the graph and the result an output"

    def only_first_output(self, node: NodeProto, _: dict[str, object]) -> Iterator[str]:
        if len(node.output) > 1:
            yield "has one output"

    def constant_axes(self, node: NodeProto, _: dict[str, object]) -> Iterator[str]:
        if len(node.input) > 1 and node.input[1] not in self._constants:
            yield "axes must be a constant"

    def rotary(self, node: NodeProto, _: dict[str, object]) -> Iterator[str]:
        if len(node.input) > 3 and self._type(node.input[3]) != TensorProto.INT64:
            yield "position_ids must be int64"

    def resize(self, _: NodeProto, attributes: dict[str, object]) -> Iterator[str]:
        for name, (default, taken) in _RESIZE.items():
            value = attributes.get(name, default)
            if value not in taken:
                yield f"{name} {value!r} is not taken"

    def _type(self, name: str) -> int:
        return self._constants[name] if name in self._constants else self._types[name].elem_type

    def _rank(self, name: str) -> int | None:
        known = name in self._types and self._types[name].HasField("shape")
        return len(self._types[name].shape.dim) if known else None


_RULES: dict[str, Callable[[_Graph, NodeProto, dict[str, object]], Iterator[str]]] = {
    "Attention": _Graph.attention,
    "LayerNormalization": _Graph.only_first_output,
    "ReduceL2": _Graph.constant_axes,
    "ReduceMean": _Graph.constant_axes,
    "RMSNormalization": _Graph.only_first_output,
    "Resize": _Graph.resize,
    "RotaryEmbedding": _Graph.rotary,
    "Squeeze": _Graph.constant_axes,
    "TensorScatter": _Graph.tensor_scatter,
    "Unsqueeze": _Graph.constant_axes,
}

_RESIZE: dict[str, tuple[object, tuple[object, ...]]] = {
    "mode": (b"nearest", (b"nearest", b"linear")),
    "coordinate_transformation_mode": (
        b"half_pixel",
        (b"half_pixel", b"pytorch_half_pixel", b"tf_half_pixel_for_nn", b"asymmetric", b"align_corners"),
    ),
    "nearest_mode": (
        b"round_prefer_floor",
        (b"floor", b"ceil", b"round_prefer_floor", b"round_prefer_ceil"),
    ),
    "keep_aspect_ratio_policy": (b"stretch", (b"stretch",)),
    "antialias": (0, (0,)),
}
"""An attribute's value where a node does not give it, and the values taken."""


def _attributes(node: NodeProto) -> dict[str, object]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
