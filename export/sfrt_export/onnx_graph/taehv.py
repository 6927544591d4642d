"""TAEHV as ONNX graphs, a chunk at a time: `sfrt.decoders.taehv` in standard operators.

Frames are the batch, [T, C, h, w] from end to end. Places of layers are the numbers in the published names.
"""

from __future__ import annotations

from typing import Literal

import onnx
import onnx_ir as ir

from sfrt import graphs
from sfrt.bundle import DTypeName
from sfrt.config import TaehvConfig
from sfrt.decoders.taehv import TIME
from sfrt_export.onnx_graph.builder import ExternalWeights, GraphBuilder
from sfrt_export.onnx_graph.frames import (
    SAME,
    SCALE,
    Carried,
    clamped,
    height_and_width,
    latents_shape,
    pixels_shape,
    upsample,
)

_FLOAT = ir.DataType.FLOAT
_LEVELS = 3
_MEM_BLOCKS = 3
"""On every level."""


def decoder_graph(config: TaehvConfig, weights: ExternalWeights, dtype: DTypeName, *, first: bool) -> onnx.ModelProto:
    """`decoder`, or `decoder_first`, which drops the frames that are not part of the video."""
    builder = GraphBuilder(weights, dtype)
    layers = _Layers(builder, "decoder", first=first)
    latents = builder.input(graphs.LATENTS, latents_shape(config.latent_channels), _FLOAT)
    bound = builder.constant(3.0, _FLOAT)
    bent = builder.op("Mul", builder.op("Tanh", builder.op("Div", layers.frames(latents), bound)), bound)
    x = builder.op("Relu", layers.conv(builder.cast(bent, builder.dtype), 1))
    for level in range(_LEVELS):
        place = 3 + (_MEM_BLOCKS + 3) * level
        x = layers.mem_blocks(x, place, scale=2**level)
        # Unfolded before the upsampling that comes first by number: 1×1 convolutions do not mind repeated cells.
        x = upsample(builder, layers.unfold(x, place + _MEM_BLOCKS + 1))
        x = layers.conv(x, place + _MEM_BLOCKS + 2, bias=False)
    x = builder.cast(layers.conv(builder.op("Relu", x), 22), _FLOAT)
    video = builder.slice(x, 0, TIME - 1) if first else x
    builder.output(graphs.PIXELS, layers.clip(clamped(builder, video)), pixels_shape(), _FLOAT)
    return layers.carried.finish("decoder_first" if first else "decoder")


def encoder_graph(config: TaehvConfig, weights: ExternalWeights, dtype: DTypeName, *, first: bool) -> onnx.ModelProto:
    """`encoder`, or `encoder_first`, which repeats the first frame until it fills a latent frame."""
    builder = GraphBuilder(weights, dtype)
    layers = _Layers(builder, "encoder", first=first)
    x = builder.cast(layers.frames(builder.input(graphs.PIXELS, pixels_shape(), _FLOAT)), builder.dtype)
    if first:
        opening = builder.slice(x, 0, 0, 1)
        x = builder.op("Concat", *[opening] * (TIME - 1), x, axis=0)
    x = builder.op("Relu", layers.conv(x, 0))
    for level in range(_LEVELS):
        place = 2 + (_MEM_BLOCKS + 2) * level
        x = layers.conv(layers.fold(x, place), place + 1, strides=[2, 2], bias=False)
        x = layers.mem_blocks(x, place + 2, scale=SCALE // 2 ** (level + 1))
    x = builder.cast(layers.conv(x, 17), _FLOAT)
    builder.output(graphs.LATENTS, layers.clip(x), latents_shape(config.latent_channels), _FLOAT)
    return layers.carried.finish("encoder_first" if first else "encoder")


class _Layers:
    """The layers of one half, by their places in it."""

    def __init__(self, builder: GraphBuilder, half: Literal["decoder", "encoder"], *, first: bool) -> None:
        self.carried = Carried(builder, axis=0, first=first)
        self._builder = builder
        self._half = half

    def frames(self, clip: ir.Value) -> ir.Value:
        """[1, T, C, h, w] → [T, C, h, w]"""
        return self._builder.op("Squeeze", clip, self._builder.constant([0]))

    def clip(self, frames: ir.Value) -> ir.Value:
        """And back."""
        return self._builder.op("Unsqueeze", frames, self._builder.constant([0]))

    def conv(self, x: ir.Value, place: int | str, *, strides: list[int] | None = None, bias: bool = True) -> ir.Value:
        return self._builder.conv(x, f"{self._half}.{place}", pads=SAME, strides=strides, bias=bias)

    def mem_blocks(self, x: ir.Value, place: int, scale: int) -> ir.Value:
        """Residual blocks that read every frame beside the one before it."""
        builder = self._builder
        for block in range(place, place + _MEM_BLOCKS):
            width = builder.weights.shape(f"{self._half}.{block}.conv.0.weight")[0]
            before = builder.slice(self.carried.behind(x, 1, [1, width, *height_and_width(scale)]), 0, 0, -1)
            y = builder.op("Concat", x, before, axis=1)
            for convolution in (0, 2):
                y = builder.op("Relu", self.conv(y, f"{block}.conv.{convolution}"))
            x = builder.op("Relu", builder.op("Add", self.conv(y, f"{block}.conv.4"), x))
        return x

    def fold(self, x: ir.Value, place: int) -> ir.Value:
        """Neighbouring frames become one."""
        name = f"{self._half}.{place}.conv"
        together = self._builder.weights.shape(f"{name}.weight")[1]
        return self._builder.conv(self._builder.reshape(x, [-1, together, 0, 0]), name, bias=False)

    def unfold(self, x: ir.Value, place: int) -> ir.Value:
        """Every frame becomes several."""
        name = f"{self._half}.{place}.conv"
        alone = self._builder.weights.shape(f"{name}.weight")[1]
        return self._builder.reshape(self._builder.conv(x, name, bias=False), [-1, alone, 0, 0])
