"""Autoencoders between latents and pixels: (latents, state) → (frames, state).

A decoder carries state, so that decoding chunk by chunk gives the very frames of decoding the whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from sfrt.config import DecoderConfig, TaehvConfig

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Decoder(Protocol):
    """Either autoencoder. Pixels are [B, F, 3, H, W] in [0, 1], latents [B, T, C, h, w], F = 4·T - 3 from a video's start."""

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The pixels of these latents and the state to decode the next ones with; state None starts a video."""

    def encode(self, pixels: Tensor) -> Tensor:
        """The latents of a video from its start, F = 1 + 4·k."""


def load_decoder(
    config: DecoderConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Decoder:
    """The autoencoder that a bundle's decoder tensors are for, ready to run."""
    import torch

    with torch.device("meta"):
        if isinstance(config, TaehvConfig):
            from sfrt.decoders.taehv import Taehv

            decoder: Any = Taehv(config)
        else:
            from sfrt.decoders.wan_vae import WanVae

            decoder = WanVae(config)
    decoder.load_state_dict(weights, strict=True, assign=True)
    loaded: Decoder = decoder.requires_grad_(False).eval().to(device=device, dtype=dtype)
    return loaded
