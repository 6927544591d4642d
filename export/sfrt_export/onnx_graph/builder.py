"""A thin layer over onnx_ir: nodes in the order they are made, weights where the bundle already has them.

A graph holds no weights. Each is a reference into the bundle's safetensors file, whose tensors lie there as ONNX wants
external data: raw, row by row, little-endian. So all graphs, in all dtypes, share one copy of the weights on disk.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir import tape

from sfrt.bundle import DTypeName
from sfrt.bundle.quantization import INPUT_SCALE, WEIGHT_SCALE
from sfrt.graphs import OPSET

Dimension = int | str
"""A size, or the name of one that is known when the graph runs."""

IR_VERSION = 11
"""The oldest format of ONNX files that has opset 24."""

_END = 2**63 - 1
"""Where a slice that goes to the end stops."""

_STORED = {
    "F32": ir.DataType.FLOAT,
    "F16": ir.DataType.FLOAT16,
    "BF16": ir.DataType.BFLOAT16,
    "I8": ir.DataType.INT8,
    "F8_E4M3": ir.DataType.FLOAT8E4M3FN,
}
_DTYPES = {"float32": ir.DataType.FLOAT, "float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}


class ExternalWeights:
    """The tensors of one safetensors file, as references to where they lie in it."""

    def __init__(self, file: Path) -> None:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        header.pop("__metadata__", None)
        self._file = file
        self._start = 8 + size
        self._tensors = header

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name]["shape"])

    def reference(self, name: str) -> ir.ExternalTensor:
        """The tensor of this name, to be read by whoever runs the graph."""
        entry = self._tensors[name]
        begin, end = entry["data_offsets"]
        return ir.ExternalTensor(
            self._file.name,
            self._start + begin,
            end - begin,
            _STORED[entry["dtype"]],
            shape=ir.Shape(entry["shape"]),
            name=name,
            base_dir=self._file.parent,
        )


class GraphBuilder:
    """One graph that computes in `dtype`, made node by node; values pass between the calls as in ordinary code."""

    def __init__(self, weights: ExternalWeights, dtype: DTypeName) -> None:
        self.weights = weights
        self.dtype = _DTYPES[dtype]
        self._tape = tape.Tape()
        self._inputs: list[ir.Value] = []
        self._outputs: list[ir.Value] = []
        self._initializers: dict[str, ir.Value] = {}
        self._cast_weights: dict[tuple[str, ir.DataType], ir.Value] = {}

    def input(self, name: str, shape: Sequence[Dimension], dtype: ir.DataType | None = None) -> ir.Value:
        """An input of the graph, of the graph's own dtype unless another is given."""
        value = ir.Value(name=name, type=ir.TensorType(dtype or self.dtype), shape=ir.Shape(shape))
        self._inputs.append(value)
        return value

    def output(self, name: str, value: ir.Value, shape: Sequence[Dimension], dtype: ir.DataType | None = None) -> None:
        """Make a value an output of the graph."""
        value.name, value.type, value.shape = name, ir.TensorType(dtype or self.dtype), ir.Shape(shape)
        self._outputs.append(value)

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: float | int | str | Sequence[int]) -> ir.Value:
        """One node with one output."""
        return self._tape.op(kind, inputs, attributes=attributes)

    def split(self, value: ir.Value, parts: int, axis: int) -> Sequence[ir.Value]:
        """Equal parts along an axis."""
        attributes = {"axis": axis, "num_outputs": parts}
        return self._tape.op_multi_out("Split", [value], attributes=attributes, num_outputs=parts)

    def weight(self, name: str, dtype: ir.DataType | None = None) -> ir.Value:
        """A tensor of the bundle, cast where it is stored in another dtype than the graph's (or the one given)."""
        reference = self.weights.reference(name)
        if name not in self._initializers:
            self._initializers[name] = ir.Value(
                name=name, type=ir.TensorType(reference.dtype), shape=reference.shape, const_value=reference
            )
        stored, wanted = self._initializers[name], dtype or self.dtype
        if reference.dtype == wanted:
            return stored
        if (name, wanted) not in self._cast_weights:
            self._cast_weights[name, wanted] = self.cast(stored, wanted)
        return self._cast_weights[name, wanted]

    def constant(self, values: float | int | Sequence[int] | np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
        """A small constant: integers are int64, all else of the graph's dtype unless another is given."""
        array = np.asarray(values)
        if dtype is None:
            dtype = ir.DataType.INT64 if array.dtype.kind == "i" else self.dtype
        name = f"constant.{len(self._initializers)}"
        data = ir.tensor(array.astype(dtype.numpy()), dtype=dtype, name=name)
        self._initializers[name] = ir.Value(
            name=name, type=ir.TensorType(dtype), shape=ir.Shape(array.shape), const_value=data
        )
        return self._initializers[name]

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.op("Cast", value, to=int(dtype))

    def linear(self, x: ir.Value, name: str, dtype: ir.DataType | None = None, *, bias: bool = True) -> ir.Value:
        """[n, in] → [n, out] by the weight and bias of this name, quantised as the weights' file has them."""
        if f"{name}.{INPUT_SCALE}" in self.weights:
            x = self._through_float8(x, self.weight(f"{name}.{INPUT_SCALE}", ir.DataType.FLOAT))
        return self.op("Gemm", x, *self._weight_and_bias(name, dtype, bias), transB=1)

    def conv(
        self,
        x: ir.Value,
        name: str,
        *,
        pads: Sequence[int] | None = None,
        strides: Sequence[int] | None = None,
        bias: bool = True,
    ) -> ir.Value:
        """[n, in, …] → [n, out, …] by the weight and bias of this name; pads before and then after every axis."""
        kernel = self.weights.shape(f"{name}.weight")[2:]
        return self.op(
            "Conv",
            x,
            *self._weight_and_bias(name, None, bias),
            kernel_shape=kernel,
            pads=pads or [0] * 2 * len(kernel),
            strides=strides or [1] * len(kernel),
        )

    def reshape(self, x: ir.Value, shape: Sequence[int]) -> ir.Value:
        return self.op("Reshape", x, self.constant(shape))

    def slice(self, x: ir.Value, axis: int, start: int, stop: int = _END) -> ir.Value:
        """x[start:stop] along an axis."""
        return self.op("Slice", x, *(self.constant([number]) for number in (start, stop, axis)))

    def _weight_and_bias(self, name: str, dtype: ir.DataType | None, bias: bool) -> list[ir.Value]:
        weight = f"{name}.weight"
        if f"{name}.{WEIGHT_SCALE}" in self.weights:
            values = self.weight(weight, self.weights.reference(weight).dtype)
            scale = self.weight(f"{name}.{WEIGHT_SCALE}", ir.DataType.FLOAT)
            found = self.op("DequantizeLinear", values, scale, axis=0, output_dtype=int(dtype or self.dtype))
        else:
            found = self.weight(weight, dtype)
        return [found, self.weight(f"{name}.bias", dtype)] if bias else [found]

    def _through_float8(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """x as float8 knows it: the pair of nodes by which TensorRT sees that a product is to run in float8."""
        values = self.op("QuantizeLinear", x, scale, output_dtype=int(ir.DataType.FLOAT8E4M3FN))
        return self.op("DequantizeLinear", values, scale, output_dtype=int(self.dtype))

    def model(self, name: str) -> onnx.ModelProto:
        """The finished graph."""
        graph = ir.Graph(
            self._inputs,
            self._outputs,
            nodes=self._tape.nodes,
            initializers=tuple(self._initializers.values()),
            opset_imports={"": OPSET},
            name=name,
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="sfrt")
        return ir.to_proto(model)
