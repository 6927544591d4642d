"""From published names to the parameters of sfrt's transformer: what is fused, reordered or renamed, in one place.

Names and shapes come from the module itself; the table below says only how it differs from the published layout, so the
two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor

from sfrt.bundle.writer import LazyTensor
from sfrt.config import ModelConfig
from sfrt.errors import CheckpointError
from sfrt.transformer import Transformer

_PATCH_WEIGHT = "patch_embedding.weight"

_ORIGINS = {
    "self_attn.qkv": ("self_attn.q", "self_attn.k", "self_attn.v"),
    "cross_attn.kv": ("cross_attn.k", "cross_attn.v"),
    "cross_attn_norm": ("norm3",),
    "ffn.1": ("ffn.2",),
    "text_embedding.1": ("text_embedding.2",),
    "time_embedding.1": ("time_embedding.2",),
    "time_projection": ("time_projection.1",),
    "head.linear": ("head.head",),
}
"""Module of sfrt → the published modules it is made of, below blocks.N where it is part of a block."""


def module_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the transformer's parameters."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in Transformer(config).state_dict().items()}


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published layout of the same model."""
    return {
        origin: _published_shape(config, name, shape, len(origins))
        for name, shape in module_shapes(config).items()
        for origins in (_origins(name),)
        for origin in origins
    }


def module_tensors(
    config: ModelConfig,
    published: Mapping[str, Tensor | LazyTensor],
    dtype: torch.dtype | None = None,
    check: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor,
) -> dict[str, LazyTensor]:
    """The transformer's parameters from published tensors, each made when asked for; dtype None keeps that stored.

    Attention's products become one weight each. The patch embedding becomes a matrix over features in the order (patch
    row, patch column, channel), which is the order of the head's output, so that latents stay tokens between the steps.
    check sees each published tensor as it is read (a lazy one: made) and returns it.
    """

    def entry(name: str, shape: tuple[int, ...]) -> LazyTensor:
        origins = _origins(name)
        stored = reduce(torch.promote_types, (published[origin].dtype for origin in origins))
        target = stored if dtype is None else dtype

        def make() -> Tensor:
            parts = [check(origin, _made(published[origin])) for origin in origins]
            joined = torch.cat(parts) if len(parts) > 1 else parts[0]
            if name == _PATCH_WEIGHT:
                joined = joined.permute(0, 2, 3, 4, 1)
            return _converted(name, joined.reshape(shape), target)

        return LazyTensor(shape, target, make)

    return {name: entry(name, shape) for name, shape in module_shapes(config).items()}


def _made(tensor: Tensor | LazyTensor) -> Tensor:
    return tensor.make() if isinstance(tensor, LazyTensor) else tensor


def _converted(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    converted = tensor.to(dtype)
    if dtype == torch.float16 and tensor.dtype != dtype and not torch.isfinite(converted).all():
        raise CheckpointError(f"{name} holds values beyond the range of float16; export it as bfloat16 or float32")
    return converted


def _origins(name: str) -> tuple[str, ...]:
    """The published names of the tensors that a parameter is made of."""
    block, inner = "", name
    if name.startswith("blocks."):
        _, number, inner = name.split(".", 2)
        block = f"blocks.{number}."
    module, _, leaf = inner.rpartition(".")
    return tuple(f"{block}{origin}.{leaf}" for origin in _ORIGINS[module]) if module in _ORIGINS else (name,)


def _published_shape(config: ModelConfig, name: str, shape: tuple[int, ...], parts: int) -> tuple[int, ...]:
    if name == _PATCH_WEIGHT:
        return (config.dim, config.latent_channels, *config.patch_size)
    if name.endswith("modulation"):
        return (1, *shape)
    return (shape[0] // parts, *shape[1:])
