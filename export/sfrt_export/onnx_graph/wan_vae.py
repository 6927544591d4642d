"""The Wan 2.1 VAE as ONNX graphs, a chunk at a time: `sfrt.decoders.wan_vae` in standard operators.

Activations are [1, C, T, h, w] and the state of a layer [1, C, n, h, w]. Convolutions take their weights as stored, so
that plans made of the graphs stay refittable; upsampling and the convolution behind it are therefore not one operator,
as they are in the torch module: that needs another kernel.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir

from sfrt import graphs
from sfrt.bundle import DTypeName
from sfrt.config import WanVaeConfig
from sfrt.ops.causal_input import PAST
from sfrt_export.onnx_graph.builder import Dimension, ExternalWeights, GraphBuilder
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
_TIME = 2
"""The axis of the frames."""
_SWAPPED = (0, 2, 1, 3, 4)
"""[1, C, T, h, w] ↔ [1, T, C, h, w]"""


def decoder_graph(config: WanVaeConfig, weights: ExternalWeights, dtype: DTypeName, *, first: bool) -> onnx.ModelProto:
    """`decoder`, or `decoder_first`, in which the first latent frame is a single pixel frame."""
    builder = GraphBuilder(weights, dtype)
    latents = builder.input(graphs.LATENTS, latents_shape(config.latent_channels), _FLOAT)
    mean, std = _statistics(builder, config)
    z = builder.op("Add", builder.op("Mul", latents, std), mean)
    z = builder.op("Transpose", builder.cast(z, builder.dtype), perm=_SWAPPED)
    layers = _Layers(builder, "decoder", scale=1, first=first)
    x = layers.middle(layers.causal_conv(builder.conv(z, "conv2"), "conv1"))
    number = 0
    for temporal in (*reversed(config.temporal_downsample), None):
        for _ in range(config.num_res_blocks + 1):
            x = layers.residual(x, f"upsamples.{number}")
            number += 1
        if temporal is not None:
            x = layers.upsample(x, f"upsamples.{number}", temporal)
            number += 1
    frames = builder.op("Transpose", builder.cast(layers.head(x), _FLOAT), perm=_SWAPPED)
    half = builder.constant(0.5, _FLOAT)
    pixels = clamped(builder, builder.op("Add", builder.op("Mul", frames, half), half))
    builder.output(graphs.PIXELS, pixels, pixels_shape(), _FLOAT)
    return layers.carried.finish("decoder_first" if first else "decoder")


def encoder_graph(config: WanVaeConfig, weights: ExternalWeights, dtype: DTypeName, *, first: bool) -> onnx.ModelProto:
    """`encoder`, or `encoder_first`, in which the first pixel frame is a latent frame of its own."""
    builder = GraphBuilder(weights, dtype)
    pixels = builder.input(graphs.PIXELS, pixels_shape(), _FLOAT)
    two, one = (builder.constant(number, _FLOAT) for number in (2.0, 1.0))
    x = builder.cast(builder.op("Sub", builder.op("Mul", pixels, two), one), builder.dtype)
    layers = _Layers(builder, "encoder", scale=SCALE, first=first)
    x = layers.causal_conv(builder.op("Transpose", x, perm=_SWAPPED), "conv1")
    number = 0
    for temporal in (*config.temporal_downsample, None):
        for _ in range(config.num_res_blocks):
            x = layers.residual(x, f"downsamples.{number}")
            number += 1
        if temporal is not None:
            x = layers.downsample(x, f"downsamples.{number}", temporal)
            number += 1
    both = builder.conv(layers.head(layers.middle(x)), "conv1")
    mu = builder.op("Transpose", builder.slice(both, 1, 0, config.latent_channels), perm=_SWAPPED)
    mean, std = _statistics(builder, config)
    latents = builder.op("Div", builder.op("Sub", builder.cast(mu, _FLOAT), mean), std)
    builder.output(graphs.LATENTS, latents, latents_shape(config.latent_channels), _FLOAT)
    return layers.carried.finish("encoder_first" if first else "encoder")


def _statistics(builder: GraphBuilder, config: WanVaeConfig) -> tuple[ir.Value, ir.Value]:
    """Mean and standard deviation of latents, [C, 1, 1]."""
    mean, std = (builder.constant(np.array(values)[:, None, None], _FLOAT) for values in (config.mean, config.std))
    return mean, std


class _Layers:
    """The layers of one half, by name, at the size that its frames have by then."""

    def __init__(self, builder: GraphBuilder, half: Literal["decoder", "encoder"], *, scale: int, first: bool) -> None:
        self.carried = Carried(builder, _TIME, first=first)
        self._builder = builder
        self._half = half
        self._scale = scale
        self._first = first

    def causal_conv(self, x: ir.Value, name: str) -> ir.Value:
        """A convolution over every frame and the two before it."""
        whole = self.carried.behind(x, PAST, self._past(name, PAST))
        return self._builder.conv(whole, f"{self._half}.{name}", pads=[0, 1, 1, 0, 1, 1])

    def residual(self, x: ir.Value, name: str) -> ir.Value:
        """Twice norm, SiLU and causal convolution, around them a shortcut."""
        y = self._activated_conv(x, f"{name}.residual.0", f"{name}.residual.2")
        y = self._activated_conv(y, f"{name}.residual.3", f"{name}.residual.6")
        out, channels = self._builder.weights.shape(f"{self._half}.{name}.residual.2.weight")[:2]
        if out != channels:
            x = self._builder.conv(x, f"{self._half}.{name}.shortcut")
        return self._builder.op("Add", y, x)

    def middle(self, x: ir.Value) -> ir.Value:
        """The part at the lowest resolution, the only one with attention."""
        return self.residual(self._attention(self.residual(x, "middle.0"), "middle.1"), "middle.2")

    def head(self, x: ir.Value) -> ir.Value:
        return self._activated_conv(x, "head.0", "head.2")

    def upsample(self, x: ir.Value, name: str, temporal: bool) -> ir.Value:
        """Twice the height and width; if temporal, also twice the frames."""
        if temporal:
            x = self._double_frames(x, f"{name}.time_conv")
        self._scale *= 2
        frames = upsample(self._builder, self._frames(x))
        return self._clip(self._builder.conv(frames, f"{self._half}.{name}.resample.1", pads=SAME))

    def downsample(self, x: ir.Value, name: str, temporal: bool) -> ir.Value:
        """Half the height and width; if temporal, also half the frames."""
        self._scale //= 2
        resample = f"{self._half}.{name}.resample.1"
        x = self._clip(self._builder.conv(self._frames(x), resample, pads=[0, 0, 1, 1], strides=[2, 2]))
        return self._halve_frames(x, f"{name}.time_conv") if temporal else x

    def _double_frames(self, x: ir.Value, name: str) -> ir.Value:
        """Two frames for each but the first of a video, which stays single.

        The convolution never sees that first frame: it is given an empty one in its place.
        """
        builder = self._builder
        seen = builder.slice(x, _TIME, 1) if self._first else x
        past = self._past(name, PAST)
        doubled = builder.conv(self.carried.behind(seen, PAST, past, blank=PAST + 1), f"{self._half}.{name}")
        channels = past[1]
        assert isinstance(channels, int)
        pairs = builder.op("Transpose", builder.reshape(doubled, [2, channels, 0, 0, 0]), perm=[1, 2, 0, 3, 4])
        return self._keep_first(x, builder.reshape(pairs, [1, channels, -1, 0, 0]), 2)

    def _halve_frames(self, x: ir.Value, name: str) -> ir.Value:
        """One frame for two, but for the first of a video, which passes as it is."""
        whole = self.carried.behind(x, 1, self._past(name, 1), blank=PAST)
        halved = self._builder.conv(whole, f"{self._half}.{name}", strides=[2, 1, 1])
        return self._keep_first(x, halved, 1)

    def _keep_first(self, x: ir.Value, changed: ir.Value, replaced: int) -> ir.Value:
        """Where a video starts, x's first frame instead of the first so many of what a layer made of x."""
        if not self._first:
            return changed
        builder = self._builder
        opening, others = builder.slice(x, _TIME, 0, 1), builder.slice(changed, _TIME, replaced)
        return builder.op("Concat", opening, others, axis=_TIME)

    def _attention(self, x: ir.Value, name: str) -> ir.Value:
        """Single-head self-attention inside each frame, across all its positions."""
        builder, name = self._builder, f"{self._half}.{name}"
        frames = self._frames(x)
        normed = builder.cast(self._norm(frames, f"{name}.norm"), builder.dtype)
        channels = builder.weights.shape(f"{name}.proj.weight")[0]
        parts = builder.split(builder.reshape(builder.conv(normed, f"{name}.to_qkv"), [0, 3, channels, -1]), 3, axis=1)
        q, k, v = (builder.op("Transpose", part, perm=[0, 1, 3, 2]) for part in parts)  # [T, 1, h · w, C]
        seen = builder.op("Attention", q, k, v, softmax_precision=int(_FLOAT))
        seen = builder.op("Transpose", seen, perm=[0, 1, 3, 2])
        seen = builder.op("Reshape", seen, builder.op("Shape", frames))
        return self._clip(builder.op("Add", builder.conv(seen, f"{name}.proj"), frames))

    def _activated_conv(self, x: ir.Value, norm: str, conv: str) -> ir.Value:
        """conv(silu(norm(x))), all before the convolution in float32."""
        builder = self._builder
        normed = self._norm(x, f"{self._half}.{norm}")
        activated = builder.op("Mul", normed, builder.op("Sigmoid", normed))
        return self.causal_conv(builder.cast(activated, builder.dtype), conv)

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        """Every pixel's channels brought to root mean square 1, times gamma: float32, channels second."""
        builder, gamma = self._builder, f"{name}.gamma"
        x = builder.cast(x, _FLOAT)
        length = builder.op("ReduceL2", x, builder.constant([1]))
        # No division by the length of nothing: the same bound as in the published code.
        unit = builder.op("Div", x, builder.op("Max", length, builder.constant(1e-12, _FLOAT)))
        root = builder.constant(math.sqrt(builder.weights.shape(gamma)[0]), _FLOAT)
        return builder.op("Mul", unit, builder.op("Mul", builder.weight(gamma, _FLOAT), root))

    def _past(self, name: str, frames: int) -> list[Dimension]:
        """The shape of what the convolution of this name keeps."""
        channels = self._builder.weights.shape(f"{self._half}.{name}.weight")[1]
        return [1, channels, frames, *height_and_width(self._scale)]

    def _frames(self, x: ir.Value) -> ir.Value:
        """[1, C, T, h, w] → [T, C, h, w], for layers that work frame by frame."""
        builder = self._builder
        return builder.op("Squeeze", builder.op("Transpose", x, perm=_SWAPPED), builder.constant([0]))

    def _clip(self, frames: ir.Value) -> ir.Value:
        """And back."""
        builder = self._builder
        return builder.op("Transpose", builder.op("Unsqueeze", frames, builder.constant([0])), perm=_SWAPPED)
