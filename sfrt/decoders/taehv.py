"""TAEHV, the tiny video autoencoder, in its Wan 2.1 flavour (published as taew2_1): nothing but 2D convolutions.

Time enters in three ways only: a `MemBlock` sees the frame before its own, a `TPool` folds two frames into one and a
`TGrow` unfolds one into two. A stage therefore runs over all frames of a chunk at once, and the whole state between two
chunks is one frame per `MemBlock`. Module names are those of the published files, which load unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt.config import TaehvConfig

SPACE = 8
"""Pixels along one side of a latent cell."""
TIME = 4
"""Pixel frames in a latent frame; the first latent frame of a video shows one."""
ENCODED_TOGETHER = 4 * TIME
"""Pixel frames encoded at once: bounds the memory of a long clip and changes nothing in the result."""


@dataclass(frozen=True)
class TaehvState:
    """What the decoder remembers between chunks: the last frame [B, C, h, w] that went into each `MemBlock`."""

    memory: tuple[Tensor, ...]


def _conv(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Bends latents smoothly into (-3, 3), so that an outlier cannot burn a picture."""

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / 3) * 3


class MemBlock(nn.Module):
    """A residual block that reads every frame beside the one before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            _conv(2 * width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)
        )

    def forward(self, frames: Tensor, before: Tensor) -> Tensor:
        """Both [N, width, h, w]; `before` holds the predecessor of each frame."""
        mixed: Tensor = self.conv(torch.cat((frames, before), dim=1))
        return F.relu(mixed + frames)


class TPool(nn.Module):
    """Folds `stride` neighbouring frames into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width * stride, width, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[N·stride, width, h, w] -> [N, width, h, w]"""
        _, width, height, columns = frames.shape
        folded: Tensor = self.conv(frames.reshape(-1, self.stride * width, height, columns))
        return folded


class TGrow(nn.Module):
    """Unfolds every frame into `stride` of them."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = nn.Conv2d(width, width * stride, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[N, width, h, w] -> [N·stride, width, h, w]"""
        grown: Tensor = self.conv(frames)
        if self.stride == 1:
            return grown
        # Unfolded in the order the convolution left in memory (channels last), so that no later layer turns it back.
        count, _, height, columns = grown.shape
        cells = grown.permute(0, 2, 3, 1).unflatten(3, (self.stride, -1)).permute(0, 3, 1, 2, 4)
        unfolded: Tensor = cells.reshape(count * self.stride, height, columns, -1).permute(0, 3, 1, 2)
        return unfolded


def _encoder(config: TaehvConfig) -> nn.Sequential:
    width = config.encoder_width
    layers: list[nn.Module] = [_conv(3, width), nn.ReLU()]
    for stride in (2, 2, 1):
        layers += [TPool(width, stride), _conv(width, width, stride=2, bias=False)]
        layers += [MemBlock(width) for _ in range(3)]
    return nn.Sequential(*layers, _conv(width, config.latent_channels))


def _decoder(config: TaehvConfig) -> nn.Sequential:
    widths = config.decoder_widths
    layers: list[nn.Module] = [SoftClamp(), _conv(config.latent_channels, widths[0]), nn.ReLU()]
    for width, next_width, stride in zip(widths[:3], widths[1:], (1, 2, 2), strict=True):
        layers += [MemBlock(width) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), TGrow(width, stride), _conv(width, next_width, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(), _conv(widths[-1], 3))


def _run(stages: nn.Sequential, video: Tensor, memory: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All frames [B, T, C, h, w] through all stages; `memory` holds a frame for each `MemBlock` (None: blank ones)."""
    batch = video.shape[0]
    frames = video.flatten(0, 1).to(next(stages.parameters()).dtype).contiguous(memory_format=torch.channels_last)
    carried = iter(memory) if memory is not None else None
    remembered: list[Tensor] = []
    for stage in _cheapest_order(stages):
        if not isinstance(stage, MemBlock):
            frames = stage(frames)
            continue
        clips = frames.unflatten(0, (batch, -1))
        first = torch.zeros_like(clips[:, 0]) if carried is None else next(carried)
        before = torch.cat((first[:, None], clips[:, :-1]), dim=1).flatten(0, 1)
        # A copy: a view would keep the chunk's whole activation alive until the next chunk.
        remembered.append(clips[:, -1].clone())
        frames = stage(frames, before)
    return frames.unflatten(0, (batch, -1)), tuple(remembered)


def _cheapest_order(stages: nn.Sequential) -> Iterator[nn.Module]:
    """The stages with each `TGrow` before the upsampling it follows: 1×1 convolutions do not mind repeated pixels."""
    waiting: nn.Module | None = None
    for stage in stages:
        if isinstance(stage, nn.Upsample):
            waiting = stage
            continue
        yield stage
        if waiting is not None:
            yield waiting
            waiting = None


class Taehv(nn.Module):
    """The autoencoder: `decode` carries state, so that chunk after chunk gives the same video as all at once."""

    def __init__(self, config: TaehvConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)

    def decode(self, latents: Tensor, state: TaehvState | None = None) -> tuple[Tensor, TaehvState]:
        """Latents [B, T, C, h, w] -> pixels [B, F, 3, 8h, 8w] in [0, 1] and the state for the chunk that follows.

        F is 4·T, less the 3 frames that are not part of the video where it starts (`state` None).
        """
        pixels, after = self.decode_unclamped(latents, state)
        return pixels.clamp(0, 1), after

    def decode_unclamped(self, latents: Tensor, state: TaehvState | None = None) -> tuple[Tensor, TaehvState]:
        """`decode` before the pixels are cut to [0, 1], for losses: a cut pixel would pass no gradient."""
        pixels, memory = _run(self.decoder, latents, state.memory if state is not None else None)
        return (pixels if state is not None else pixels[:, TIME - 1 :]), TaehvState(memory)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, F, 3, H, W] in [0, 1], F = 1 + 4·k, -> latents [B, 1 + k, C, H/8, W/8].

        The first frame stands alone in the first latent frame, so it is repeated to fill it.
        """
        return self.encode_groups(torch.cat((pixels[:, :1].expand(-1, TIME - 1, -1, -1, -1), pixels), dim=1))

    def encode_groups(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 4·T, 3, H, W] -> latents [B, T, C, H/8, W/8]: the plain encoder, four frames to a latent frame."""
        latents, memory = [], None
        for span in pixels.split(ENCODED_TOGETHER, dim=1):
            part, memory = _run(self.encoder, span, memory)
            latents.append(part)
        return torch.cat(latents, dim=1)
