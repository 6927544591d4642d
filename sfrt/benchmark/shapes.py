"""Models of random weights, where a shape is all that matters: speed does not depend on trained ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from sfrt.bundle import DTypeName, Manifest, TaehvPart, WanVaePart
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.config import DecoderConfig, ModelConfig, StreamConfig, TaehvConfig, WanVaeConfig
from sfrt.decoders import LoadedDecoder, decoder_dtype, load_decoder
from sfrt.decoders.taehv import Taehv
from sfrt.decoders.wan_vae import WanVae
from sfrt.device import DTYPES, dtype_name
from sfrt.transformer import Transformer

DecoderKind = Literal["taehv", "wan_vae"]


@dataclass(frozen=True)
class Shape:
    """A model of random weights, the stream it runs, and the autoencoders of its size by kind."""

    name: str
    model: ModelConfig
    stream: StreamConfig
    decoders: dict[DecoderKind, DecoderConfig]


CPU256 = Shape(
    name="cpu256",
    model=ModelConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=512, text_len=64),
    stream=StreamConfig(height=128, width=128, window=21),
    decoders={
        "wan_vae": WanVaeConfig(dim=24),
        "taehv": TaehvConfig(encoder_width=16, decoder_widths=(64, 32, 16, 16)),
    },
)
"""Small enough for a CPU: 64 tokens a latent frame, 21 frames in chunks of 3, 4 + 1 passes."""

WAN_1_3B = Shape(
    name="1.3b",
    model=ModelConfig(),
    stream=StreamConfig(),
    decoders={"wan_vae": WanVaeConfig(), "taehv": TaehvConfig()},
)
"""Wan 2.1 1.3B at 480×832, window 21."""

SHAPES = {shape.name: shape for shape in (CPU256, WAN_1_3B)}


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Transformer tensors: products scaled by fan-in, norms at one."""
    return {name: make() for name, (_, make) in _recipes(config, device, dtype).items()}


def random_decoder(config: DecoderConfig, dtype: str, device: str) -> LoadedDecoder:
    """An autoencoder of random weights."""
    return load_decoder(config, _decoder_weights(config), torch.device(device), DTYPES[dtype])


def write_random_bundle(folder: Path, shape: Shape, decoder: DecoderKind, dtype: str, device: torch.device) -> Path:
    """A bundle of random weights without a text encoder, in the dtypes that it is to run in; made on the device."""
    torch.manual_seed(0)
    config, stored = shape.decoders[decoder], DTYPES[dtype]
    recipes = _recipes(shape.model, device, stored)
    runs_in = decoder_dtype(config, device, stored)
    manifest = Manifest(
        name=f"random {shape.name}",
        family="random weights",
        model=shape.model,
        stream=shape.stream,
        weights="random",
        dtype=cast(DTypeName, dtype_name(stored)),
        created_by="sfrt bench",
        decoder=TaehvPart(config) if isinstance(config, TaehvConfig) else WanVaePart(config),
    )
    with BundleWriter(folder) as writer:
        writer.add_tensors("transformer", {n: LazyTensor(size, stored, make) for n, (size, make) in recipes.items()})
        writer.add_tensors("decoder", {name: weight.to(runs_in) for name, weight in _decoder_weights(config).items()})
        writer.finish(manifest)
    return folder


def _recipes(
    config: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]]:
    """The shape of each of the transformer's tensors, and what draws it."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in Transformer(config).state_dict().items()}
    return {name: (shape, partial(_drawn, shape, device, dtype)) for name, shape in shapes.items()}


def _drawn(shape: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, device=device, dtype=dtype)
    weight: Tensor = torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5
    return weight


def _decoder_weights(config: DecoderConfig) -> dict[str, Tensor]:
    torch.manual_seed(0)
    module = Taehv(config) if isinstance(config, TaehvConfig) else WanVae(config)
    return dict(module.state_dict())
