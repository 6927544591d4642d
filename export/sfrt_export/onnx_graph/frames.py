"""What the graphs of both autoencoders have in common: how they begin and end, and frames carried between chunks."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from sfrt import graphs
from sfrt.graphs import GraphName
from sfrt_export.onnx_graph.builder import Dimension, GraphBuilder

SCALE = 8
"""Pixels along one side of a latent cell."""

SAME = (1, 1, 1, 1)
"""The padding that keeps height and width under 3×3 kernels."""

_FLOAT = ir.DataType.FLOAT


def height_and_width(scale: int) -> list[Dimension]:
    """Of frames with so many cells along one side of a latent cell: sizes known when the graph runs."""
    return ["height", "width"] if scale == 1 else [f"height_x{scale}", f"width_x{scale}"]


def latents_shape(channels: int) -> list[Dimension]:
    """[1, T, C, h, w]"""
    return [1, "frames", channels, *height_and_width(1)]


def pixels_shape() -> list[Dimension]:
    """[1, F, 3, H, W]"""
    return [1, "pixel_frames", 3, *height_and_width(SCALE)]


class Carried:
    """The frames that each layer keeps from chunk to chunk, blank where a video starts.

    `first` builds the graph of a video's first chunk, which takes none; both leave theirs for the chunk that follows.
    """

    def __init__(self, builder: GraphBuilder, axis: int, *, first: bool) -> None:
        self._builder = builder
        self._axis = axis
        self._first = first
        self._kept: list[tuple[ir.Value, list[Dimension]]] = []

    def behind(self, x: ir.Value, frames: int, shape: list[Dimension], *, blank: int | None = None) -> ir.Value:
        """x behind the last `frames` frames of the layer's past (a tensor of this shape), or behind `blank` empty ones.

        As many of the result's last frames are kept for the next chunk. blank None: as many as `frames`.
        """
        builder, axis = self._builder, self._axis
        if self._first:
            pads = np.zeros((2, len(shape)), np.int64)
            pads[0, axis] = frames if blank is None else blank
            whole = builder.op("Pad", x, builder.constant(pads.ravel()))
        else:
            past = builder.input(graphs.state_in(len(self._kept)), shape)
            whole = builder.op("Concat", past, x, axis=axis)
        self._kept.append((builder.slice(whole, axis, -frames), shape))
        return whole

    def finish(self, name: GraphName) -> onnx.ModelProto:
        """The graph, what was kept among its outputs."""
        for index, (value, shape) in enumerate(self._kept):
            self._builder.output(graphs.state_out(index), value, shape)
        return self._builder.model(name)


def upsample(builder: GraphBuilder, frames: ir.Value) -> ir.Value:
    """[n, C, h, w] → [n, C, 2h, 2w]: every cell four times."""
    scales = builder.constant(np.array([1, 1, 2, 2]), _FLOAT)
    return builder.op(
        "Resize",
        frames,
        None,
        scales,
        mode="nearest",
        coordinate_transformation_mode="asymmetric",
        nearest_mode="floor",
    )


def clamped(builder: GraphBuilder, pixels: ir.Value) -> ir.Value:
    """Float32 pixels cut to [0, 1]."""
    return builder.op("Clip", pixels, *(builder.constant(bound, _FLOAT) for bound in (0.0, 1.0)))
