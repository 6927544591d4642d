"""The causal DiT of Wan 2.1 and its family: tensors in, tensors out (arXiv 2506.08009, section 3.1; arXiv 2503.20314).

It holds no cache and knows no schedule. Tokens carry any leading dimensions; what a pass attends to is decided by the
`attend` function it is given, so that streaming (a ring of past keys) and training (a mask over a whole clip) run the
very same blocks. Everything that depends on the timestep alone or on the prompt alone is made by its own method, once.

Shapes: L tokens, D = config.dim, H heads of d = config.head_dim, P = config.token_dim, S text slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt.config import ModelConfig
from sfrt.device import on_device
from sfrt.ops.attention import ATTENTION
from sfrt.ops.choice import Ops, torch_ops
from sfrt.ops.eight_bits import FLOAT8, Float8Rows, Rows, scales_up_to
from sfrt.ops.gelu import GELU_FLOAT8
from sfrt.ops.linear import Linear
from sfrt.ops.modulate import MODULATE, MODULATE_FLOAT8
from sfrt.ops.qk_norm import QK_NORM
from sfrt.ops.quantized_linear import takes_float8
from sfrt.ops.rolling_kv import QKV, RingScales


@dataclass(frozen=True)
class Modulation:
    """The adaptive norms of one timestep: shift, scale and gate of attention, then of the FFN, for each layer.

    blocks is [layers, 6, …, D] and head [2, …, D] (shift, scale); scales have their 1 added. The dots are nothing when
    all tokens share a timestep, else dimensions that broadcast against the tokens' leading ones.
    """

    blocks: Tensor
    head: Tensor


@dataclass(frozen=True)
class TextKV:
    """Keys and values of the prompt for every layer, each [layers, …, H, S, d]."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Residual:
    """The residual stream [..., L, D] with its newest branch beside it: the next norm adds it, times its gate."""

    x: Tensor
    branch: Tensor | None = None
    gate: Tensor | None = None


class Attend(Protocol):
    """Self attention of one layer over whatever this pass may see, [..., L, H, d]."""

    def __call__(self, layer: int, qkv: QKV, /) -> Tensor: ...


class Store(Protocol):
    """Keeps one layer's keys and values."""

    def __call__(self, layer: int, qkv: QKV, /) -> None: ...


class Transformer(nn.Module):
    """The whole model. Its parameter names are the tensor names of a bundle's transformer.safetensors."""

    def __init__(self, config: ModelConfig, ops: Ops | None = None) -> None:
        """ops are the implementations to run with; None is plain torch, which passes gradients."""
        super().__init__()
        ops = ops or torch_ops()
        self.config = config
        self.patch_embedding = Linear(config.token_dim, config.dim)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, config.dim, activation="gelu_tanh"), Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.ModuleList((Linear(config.freq_dim, config.dim), Linear(config.dim, config.dim)))
        self.time_projection = Linear(config.dim, 6 * config.dim)
        self.blocks = nn.ModuleList(Block(config, ops) for _ in range(config.num_layers))
        self.head = Head(config, ops)

    def forward(self, tokens: Tensor, modulation: Modulation, rotary: Tensor, text: TextKV, attend: Attend) -> Tensor:
        """The flow (velocity) at each token, [..., L, P] → [..., L, P], features in order (row, column, channel)."""
        residual = Residual(self.patch_embedding(tokens))
        for layer, block in enumerate(self.layers()):
            residual = block(residual, layer, modulation.blocks[layer], rotary, text, attend)
        flow: Tensor = self.head(residual, modulation.head)
        return flow

    def layers(self) -> list[Block]:
        """The blocks in order, as what they are."""
        return cast(list[Block], list(self.blocks))

    def refresh(
        self, tokens: Tensor, modulation: Modulation, rotary: Tensor, text: TextKV, attend: Attend, store: Store
    ) -> None:
        """The refresh pass: as forward as far as the last layer's keys and values, which is all it is for.

        That layer's go to `store`; the layers before it leave theirs through `attend`.
        """
        residual = Residual(self.patch_embedding(tokens))
        *blocks, last = self.layers()
        for layer, block in enumerate(blocks):
            residual = block(residual, layer, modulation.blocks[layer], rotary, text, attend)
        store(len(blocks), last.qkv(residual, modulation.blocks[-1], rotary)[1])

    def modulation(self, timesteps: Tensor) -> Modulation:
        """The adaptive norms of timesteps of any shape […], in [0, 1000]; float32 whatever the weights' dtype."""
        embedded = timestep_embedding(timesteps, self.config.freq_dim)
        first, second = cast(list[Linear], list(self.time_embedding))
        embedded = second.in_float32(F.silu(first.in_float32(embedded)))
        projected = self.time_projection.in_float32(F.silu(embedded)).unflatten(-1, (6, -1)).movedim(-2, 0)
        blocks = torch.stack([_adaptive(block.modulation, projected, scales=(1, 4)) for block in self.layers()])
        return Modulation(blocks, _adaptive(self.head.modulation, embedded.unsqueeze(0), scales=(1,)))

    def text_kv(self, embeds: Tensor) -> TextKV:
        """Keys and values of prompt embeddings [..., S, text_dim] for every layer's cross attention."""
        context = self.text_embedding(embeds)
        pairs = [block.cross_attn.keys_values(context) for block in self.layers()]
        return TextKV(torch.stack([k for k, _ in pairs]), torch.stack([v for _, v in pairs]))

    def ring_scales(self, modulations: Sequence[Modulation]) -> RingScales:
        """Scales for rings of e4m3 values that hold whatever passes at these modulations write, in any video.

        No key and no value can lie beyond them, so there is nothing to calibrate, and nothing that a later prompt of a
        stream could break. What is usual is about a √D-th of what is possible, which costs e4m3 no precision: it has
        three bits of mantissa down to a 28672nd of its largest value.
        """
        norms = torch.stack([modulation.blocks[:, :2] for modulation in modulations], dim=1).float()
        reaches = [block.self_attn.reach(*norms[layer].unbind(1)) for layer, block in enumerate(self.layers())]
        keys, values = (scales_up_to(torch.stack(each), FLOAT8) for each in zip(*reaches, strict=True))
        return RingScales(keys, values)


class Block(nn.Module):
    """Self attention, cross attention to the text, feed-forward: each a branch of the residual stream."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.eps = config.eps
        self._modulate, self._modulate_float8 = ops(MODULATE), ops(MODULATE_FLOAT8)
        self.modulation = nn.Parameter(torch.normal(0.0, config.dim**-0.5, (6, config.dim)))
        self.self_attn = SelfAttention(config)
        self.cross_attn_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config, ops)
        self.ffn = FeedForward(config, ops)

    def forward(
        self, residual: Residual, layer: int, modulation: Tensor, rotary: Tensor, text: TextKV, attend: Attend
    ) -> Residual:
        _, _, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(0)
        x, qkv = self.qkv(residual, modulation, rotary)
        attended = self.self_attn.o(attend(layer, qkv).flatten(-2))
        norm = self.cross_attn_norm
        x, h = self._normed(Residual(x, attended, gate), norm.weight, norm.bias, self.cross_attn.q)
        attended = self.cross_attn(h, text.k[layer], text.v[layer])
        x, h = self._normed(Residual(x, attended), ffn_scale, ffn_shift, self.ffn[0])
        return Residual(x, self.ffn(h), ffn_gate)

    def qkv(self, residual: Residual, modulation: Tensor, rotary: Tensor) -> tuple[Tensor, QKV]:
        """The stream with its branch added, and what this layer's self attention is made of."""
        x, h = self._normed(residual, modulation[1], modulation[0], self.self_attn.qkv)
        return x, self.self_attn.qkv_of(h, rotary)

    def _normed(self, residual: Residual, scale: Tensor, shift: Tensor, reader: nn.Module) -> tuple[Tensor, Rows]:
        """The stream with its branch added, and its modulated norm, as the product that reads it takes it."""
        arguments = residual.x, residual.branch, residual.gate, scale, shift, self.eps
        if takes_float8(reader):
            x, *rows = self._modulate_float8(*arguments)
            return x, Float8Rows(*rows)
        return self._modulate(*arguments)


class SelfAttention(nn.Module):
    """The products around self attention, with queries, keys and values fused in one weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.eps = config.eps
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        self.o = Linear(config.dim, config.dim)

    def qkv_of(self, x: Rows, rotary: Tensor) -> QKV:
        """From x [..., L, D]."""
        return QKV(self.qkv(x), self.norm_q.weight, self.norm_k.weight, rotary, self.heads, self.eps)

    def reach(self, shifts: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The largest key and value that each head can have where x is a norm modulated by one of these, float32 [H].

        shifts and scales are [n, D]. A row that leaves a norm, before its weights, is of length √D at most. So are the
        pairs of features that rotary phases turn, all together; and a product with it is at most √D times as large as
        the other vector is long.
        """
        weight = self.qkv.dense().chunk(3)[2]
        length = len(weight) ** 0.5
        keys = length * self.norm_k.weight.float().abs()
        shifted = self.qkv.in_float32(shifts).chunk(3, dim=-1)[2]
        values = length * (scales.square() @ weight.square().t()).sqrt() + shifted.abs()
        return keys.view(self.heads, -1).amax(-1), values.amax(0).view(self.heads, -1).amax(-1)


class CrossAttention(nn.Module):
    """Attention to the text; its keys and values depend on the prompt alone."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self._qk_norm, self._attention = ops(QK_NORM), ops(ATTENTION)
        self.heads = config.num_heads
        self.eps = config.eps
        self.q = Linear(config.dim, config.dim)
        self.kv = Linear(config.dim, 2 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        self.o = Linear(config.dim, config.dim)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., H, S, d] from embedded text [..., S, D]."""
        k, v = self.kv(context).chunk(2, dim=-1)
        k = self._qk_norm(k, self.norm_k.weight, self.heads, self.eps)
        return k.transpose(-2, -3), v.unflatten(-1, (self.heads, -1)).transpose(-2, -3)

    def forward(self, x: Rows, k: Tensor, v: Tensor) -> Tensor:
        """[..., L, D] from x [..., L, D] and k, v [..., H, S, d]."""
        q = self._qk_norm(self.q(x), self.norm_q.weight, self.heads, self.eps)
        out: Tensor = self.o(self._attention(q, k, v).flatten(-2))
        return out


class FeedForward(nn.Sequential):
    """Two products with the activation between them, which is part of the first, or makes the second's float8 rows."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__(Linear(config.dim, config.ffn_dim, activation="gelu_tanh"), Linear(config.ffn_dim, config.dim))
        self._gelu_float8 = ops(GELU_FLOAT8)

    def forward(self, x: Rows) -> Tensor:
        """[..., L, D] from x [..., L, D]."""
        first, second = self
        if takes_float8(first) and takes_float8(second):
            hidden: Rows = Float8Rows(*self._gelu_float8(first.product(x)))
        else:
            hidden = first(x)
        out: Tensor = second(hidden)
        return out


class Head(nn.Module):
    """The last norm and the linear map back to latent patches."""

    def __init__(self, config: ModelConfig, ops: Ops) -> None:
        super().__init__()
        self.eps = config.eps
        self._modulate = ops(MODULATE)
        self.modulation = nn.Parameter(torch.normal(0.0, config.dim**-0.5, (2, config.dim)))
        self.linear = Linear(config.dim, config.token_dim)

    def forward(self, residual: Residual, modulation: Tensor) -> Tensor:
        shift, scale = modulation.unbind(0)
        _, h = self._modulate(residual.x, residual.branch, residual.gate, scale, shift, self.eps)
        flow: Tensor = self.linear(h)
        return flow


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines then sines of t · 10000^(-i / (dim / 2)), float32 [..., dim]; the phases are computed in float64."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    phases = timesteps.to(torch.float64).unsqueeze(-1) * torch.pow(10000.0, -exponents)
    return torch.cat((phases.cos(), phases.sin()), dim=-1).to(torch.float32)


def rotary_phases(config: ModelConfig, frames: Sequence[int], rows: int, columns: int, device: torch.device) -> Tensor:
    """Unit complex rotations for the tokens of some latent frames, complex64 [len(frames)·rows·columns, 1, d/2].

    frames are the positions on the frame axis. The angles are computed in float64: exact for millions of frames.
    """
    axes = zip((frames, range(rows), range(columns)), config.rotary_pairs, strict=True)
    angles = []
    for axis, (positions, size) in enumerate(axes):
        exponents = torch.arange(size, dtype=torch.float64, device=device) / size
        position = _in_float64(positions, device)
        angle = torch.outer(position, torch.pow(config.rotary_base, -exponents))
        shape = [1, 1, 1, size]
        shape[axis] = len(position)
        angles.append(angle.view(shape).expand(len(frames), rows, columns, size))
    angle = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def _in_float64(numbers: Sequence[int], device: torch.device) -> Tensor:
    """A range is made on the device, where a list would have to be brought to."""
    if isinstance(numbers, range):
        return torch.arange(numbers.start, numbers.stop, dtype=torch.float64, device=device)
    return on_device(numbers, device).to(torch.float64)


def _adaptive(learned: Tensor, conditioned: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Learned rows [n, D] + conditioned rows [n or 1, …, D], 1 added to the rows that are scales; float32 [n, …, D]."""
    units = torch.stack([learned.new_full((1,), float(row in scales)) for row in range(len(learned))])
    rows = learned.float() + units.float()
    return rows.view(len(rows), *[1] * (conditioned.ndim - 2), -1) + conditioned
