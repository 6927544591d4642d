"""Autoencoders between latents and pixels: (latents, state) → (frames, state).

Both ways carry state, so that decoding or encoding chunk by chunk gives the very values of doing it at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from sfrt.bundle.manifest import DTypeName, dtype_beside
from sfrt.config import DecoderConfig, TaehvConfig
from sfrt.device import DTYPES, dtype_name
from sfrt.ops.choice import Ops
from sfrt.weights import assign

ENCODED_TOGETHER = 3
"""Latent frames encoded at once: bounds the memory of a long clip and changes nothing in the result."""


class Decoder(Protocol):
    """Either autoencoder: pixels [B, F, 3, H, W] in [0, 1], latents [B, T, C, h, w].

    F is 4·T, less 3 where a video starts, which is what state None means. What one call returns as state is for the
    next one of the same direction.
    """

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The pixels of these latents and the state to decode the next ones with."""

    def encode(self, pixels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """The latents of these pixels and the state to encode the next ones with."""


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

    def encode(self, pixels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As Decoder.encode; latents come in float32."""
        with exact_convolutions():
            latents, after = self.module.encode(pixels.to(self.device), state)
        return latents.float(), after


def spans_to_encode(frames: int, in_time: int, *, start: bool) -> Iterator[tuple[int, int]]:
    """Cut pixel frames into [begin, end) of ENCODED_TOGETHER latent frames, `in_time` pixel frames each.

    At the start of a video, the first latent frame is a single pixel frame.
    """
    begin, end = 0, in_time * ENCODED_TOGETHER - (in_time - 1 if start else 0)
    while begin < frames:
        yield begin, min(end, frames)
        begin, end = end, end + in_time * ENCODED_TOGETHER


@contextmanager
def exact_convolutions() -> Iterator[None]:
    """Float32 convolutions in float32: with cuDNN's TensorFloat-32 the same seed would not be the same video."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=torch.backends.cudnn.benchmark, allow_tf32=False):
        yield


def decoder_dtype(config: DecoderConfig, device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype an autoencoder runs in beside a model in `dtype`: `sfrt.bundle.manifest.dtype_beside` for a device."""
    return DTYPES[dtype_beside(config, cast("DTypeName", dtype_name(dtype)), on_gpu=device.type == "cuda")]


def load_decoder(
    config: DecoderConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    ops: Ops | None = None,
) -> LoadedDecoder:
    """The autoencoder that these weights are for, ready to run beside a model in `dtype`.

    ops are the implementations to run with; None lets the device decide.
    """
    ops = ops or Ops(device)
    with torch.device("meta"):
        if isinstance(config, TaehvConfig):
            from sfrt.decoders.taehv import Taehv

            module: Any = Taehv(config, ops)
        else:
            from sfrt.decoders.wan_vae import WanVae

            module = WanVae(config, ops)
    dtype = decoder_dtype(config, device, dtype)
    moved = {name: _channels_last(weight.to(device, dtype)) for name, weight in weights.items()}
    assign(module, moved, "the decoder")
    # Buffers follow in their own dtype: the statistics of latents are not weights to be rounded.
    return LoadedDecoder(module.requires_grad_(False).eval().to(device), device, dtype)


def _channels_last(weight: Tensor) -> Tensor:
    """Convolution weights in the layout of the activations, so that no call has to turn them."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return weight.contiguous(memory_format=formats[weight.ndim]) if weight.ndim in formats else weight
