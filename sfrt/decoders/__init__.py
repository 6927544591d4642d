"""Autoencoders between latents and pixels: (latents, state) → (frames, state).

A decoder carries state, so that decoding chunk by chunk gives the very frames of decoding the whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sfrt.config import DecoderConfig, TaehvConfig
from sfrt.weights import assign


class Decoder(Protocol):
    """Either autoencoder: pixels [B, F, 3, H, W] in [0, 1], latents [B, T, C, h, w], F = 4·T - 3 from the start on."""

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The pixels of these latents and the state to decode the next ones with; state None starts a video."""

    def encode(self, pixels: Tensor) -> Tensor:
        """The latents of a video from its start, F = 1 + 4·k."""


@dataclass(frozen=True)
class LoadedDecoder:
    """An autoencoder on its device, in the dtype it runs in; takes tensors of any device and float dtype."""

    module: Decoder
    device: torch.device
    dtype: torch.dtype

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """As Decoder.decode."""
        with exact_convolutions():
            return self.module.decode(latents.to(self.device), state)

    def encode(self, pixels: Tensor) -> Tensor:
        """As Decoder.encode; latents come in float32."""
        with exact_convolutions():
            return self.module.encode(pixels.to(self.device)).float()


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Float32 convolutions in float32: with cuDNN's TensorFloat-32 the same seed would not be the same video."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
        yield


def decoder_dtype(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype an autoencoder runs in beside a model in `dtype`.

    TAEHV has no norms, so bfloat16's rounding adds up to several per cent of its pixels; it runs in float16, as it was
    published, where that is fast, and in float32 on a CPU.
    """
    if isinstance(config, TaehvConfig) and dtype == torch.bfloat16:
        return torch.float16 if device.type == "cuda" else torch.float32
    return dtype


def load_decoder(
    config: DecoderConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> LoadedDecoder:
    """The autoencoder that these weights are for, ready to run beside a model in `dtype`."""
    with torch.device("meta"):
        if isinstance(config, TaehvConfig):
            from sfrt.decoders.taehv import Taehv

            module: Any = Taehv(config)
        else:
            from sfrt.decoders.wan_vae import WanVae

            module = WanVae(config)
    dtype = decoder_dtype(config, device, dtype)
    moved = {name: _channels_last(weight.to(device, dtype)) for name, weight in weights.items()}
    assign(module, moved, "the decoder")
    # Buffers follow in their own dtype: the statistics of latents are not weights to be rounded.
    return LoadedDecoder(module.requires_grad_(False).eval().to(device), device, dtype)


def _channels_last(weight: Tensor) -> Tensor:
    """Convolution weights in the layout of the activations, so that no call has to turn them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.contiguous(memory_format=formats[weight.ndim]) if weight.ndim in formats else weight
