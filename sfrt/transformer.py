"""The causal DiT of Wan 2.1 and its family: tensors in, tensors out (arXiv 2506.08009, section 3.1; arXiv 2503.20314).

It holds no cache and knows no schedule. Tokens carry any leading dimensions; what a pass attends to is decided by the
`attend` function it is given, so that streaming (a ring of past keys) and training (a mask over a whole clip) run the
very same blocks. Everything that depends on the timestep alone or on the prompt alone is made by its own method, once.

Shapes: L tokens, D = config.dim, H heads of d = config.head_dim, P = config.token_dim, S text slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt.config import ModelConfig
from sfrt.ops.attention import attention
from sfrt.ops.linear import Linear


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


class Attend(Protocol):
    """Self attention of one layer over whatever this pass may see; q, k and v are [..., L, H, d], rotary applied."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor, /) -> Tensor: ...


class Store(Protocol):
    """Keeps one layer's keys and values, each [..., L, H, d], rotary applied."""

    def __call__(self, layer: int, k: Tensor, v: Tensor, /) -> None: ...


class Transformer(nn.Module):
    """The whole model. Its parameter names are the tensor names of a bundle's transformer.safetensors."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embedding = Linear(config.token_dim, config.dim)
        self.text_embedding = nn.Sequential(
            Linear(config.text_dim, config.dim, activation="gelu_tanh"), Linear(config.dim, config.dim)
        )
        self.time_embedding = nn.ModuleList((Linear(config.freq_dim, config.dim), Linear(config.dim, config.dim)))
        self.time_projection = Linear(config.dim, 6 * config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = Head(config)

    def forward(self, tokens: Tensor, modulation: Modulation, rotary: Tensor, text: TextKV, attend: Attend) -> Tensor:
        """The flow (velocity) at each token, [..., L, P] → [..., L, P], features in order (row, column, channel)."""
        x = self.patch_embedding(tokens)
        for layer, block in enumerate(self.layers()):
            x = block(x, layer, modulation.blocks[layer], rotary, text, attend)
        flow: Tensor = self.head(x, modulation.head)
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
        x = self.patch_embedding(tokens)
        *blocks, last = self.layers()
        for layer, block in enumerate(blocks):
            x = block(x, layer, modulation.blocks[layer], rotary, text, attend)
        store(len(blocks), *last.keys_values(x, modulation.blocks[-1], rotary))

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


class Block(nn.Module):
    """Self attention, cross attention to the text, feed-forward: each on the residual stream x, [..., L, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.normal(0.0, config.dim**-0.5, (6, config.dim)))
        self.self_attn = SelfAttention(config)
        self.cross_attn_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            Linear(config.dim, config.ffn_dim, activation="gelu_tanh"), Linear(config.ffn_dim, config.dim)
        )

    def forward(
        self, x: Tensor, layer: int, modulation: Tensor, rotary: Tensor, text: TextKV, attend: Attend
    ) -> Tensor:
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = modulation.unbind(0)
        q, k, v = self.self_attn.qkv_heads(modulated_norm(x, scale, shift, self.eps), rotary)
        x = torch.addcmul(x, self.self_attn.o(attend(layer, q, k, v).flatten(-2)), gate)
        x = x + self.cross_attn(self.cross_attn_norm(x), text.k[layer], text.v[layer])
        return torch.addcmul(x, self.ffn(modulated_norm(x, ffn_scale, ffn_shift, self.eps)), ffn_gate)

    def keys_values(self, x: Tensor, modulation: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor]:
        """Only what this layer leaves behind for later chunks, each [..., L, H, d]."""
        shift, scale = modulation[0], modulation[1]
        _, k, v = self.self_attn.qkv_heads(modulated_norm(x, scale, shift, self.eps), rotary)
        return k, v


class SelfAttention(nn.Module):
    """The products around self attention, with queries, keys and values fused in one weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.qkv = Linear(config.dim, 3 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        self.o = Linear(config.dim, config.dim)

    def qkv_heads(self, x: Tensor, rotary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys (normed over the full width, rotated) and values, each [..., L, H, d]; x is [..., L, D]."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (self.norm_q(q), self.norm_k(k), v))
        return apply_rotary(q, rotary), apply_rotary(k, rotary), v


class CrossAttention(nn.Module):
    """Attention to the text; its keys and values depend on the prompt alone."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads = config.num_heads
        self.q = Linear(config.dim, config.dim)
        self.kv = Linear(config.dim, 2 * config.dim)
        self.norm_q = nn.RMSNorm(config.dim, eps=config.eps)
        self.norm_k = nn.RMSNorm(config.dim, eps=config.eps)
        self.o = Linear(config.dim, config.dim)

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [..., H, S, d] from embedded text [..., S, D]."""
        k, v = self.kv(context).chunk(2, dim=-1)
        k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in (self.norm_k(k), v))
        return k, v

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[..., L, D] from x [..., L, D] and k, v [..., H, S, d]."""
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        out: Tensor = self.o(attention(q, k, v).flatten(-2))
        return out


class Head(nn.Module):
    """The last norm and the linear map back to latent patches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.eps
        self.modulation = nn.Parameter(torch.normal(0.0, config.dim**-0.5, (2, config.dim)))
        self.linear = Linear(config.dim, config.token_dim)

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        shift, scale = modulation.unbind(0)
        flow: Tensor = self.linear(modulated_norm(x, scale, shift, self.eps))
        return flow


def modulated_norm(x: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """LayerNorm, then · scale + shift; one affine LayerNorm where all tokens share the modulation."""
    if scale.ndim == 1:
        return F.layer_norm(x, scale.shape, scale, shift, eps)
    return torch.addcmul(shift, F.layer_norm(x, scale.shape[-1:], eps=eps), scale)


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Cosines then sines of t · 10000^(-i / (dim / 2)), float32 [..., dim]; the phases are computed in float64."""
    half = dim // 2
    exponents = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    phases = timesteps.to(torch.float64).unsqueeze(-1) * torch.pow(10000.0, -exponents)
    return torch.cat((phases.cos(), phases.sin()), dim=-1).to(torch.float32)


def rotary_phases(config: ModelConfig, frames: range, rows: int, columns: int, device: torch.device) -> Tensor:
    """Unit complex rotations for the tokens of some latent frames, complex64 [len(frames)·rows·columns, 1, d/2].

    frames are the positions on the frame axis. Of the d/2 pairs of a head the row and the column axis take a third
    each, rounded down, and the frame axis the rest.
    """
    pairs = config.head_dim // 2
    third = pairs // 3
    axes = ((frames, pairs - 2 * third), (range(rows), third), (range(columns), third))
    angles = []
    for axis, (positions, size) in enumerate(axes):
        exponents = torch.arange(size, dtype=torch.float64, device=device) / size
        position = torch.arange(positions.start, positions.stop, dtype=torch.float64, device=device)
        angle = torch.outer(position, torch.pow(config.rotary_base, -exponents))
        shape = [1, 1, 1, size]
        shape[axis] = len(position)
        angles.append(angle.view(shape).expand(len(frames), rows, columns, size))
    angle = torch.cat(angles, dim=-1).flatten(0, 2).unsqueeze(1)
    return torch.polar(torch.ones_like(angle), angle).to(torch.complex64)


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Rotate neighbouring pairs of features of x, [..., L, H, d], in float32."""
    rotated = torch.view_as_complex(x.float().unflatten(-1, (-1, 2))) * rotary
    return torch.view_as_real(rotated).flatten(-2).to(x.dtype)


def _adaptive(learned: Tensor, conditioned: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Learned rows [n, D] + conditioned rows [n or 1, …, D], 1 added to the rows that are scales; float32 [n, …, D]."""
    units = torch.stack([learned.new_full((1,), float(row in scales)) for row in range(len(learned))])
    rows = learned.float() + units.float()
    return rows.view(len(rows), *[1] * (conditioned.ndim - 2), -1) + conditioned
