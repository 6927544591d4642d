"""TAEHV, the tiny video autoencoder, in its Wan 2.1 flavour (published as taew2_1): nothing but 2D convolutions.

Time enters in three ways only: a `MemBlock` sees the frame before its own, a `TPool` folds two frames into one and a
`TGrow` unfolds one into two. A stage therefore runs over all frames of a chunk at once, and the whole state between two
chunks is one frame per `MemBlock`. Module names are those of the published files, which load unchanged.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn

from sfrt.config import TaehvConfig
from sfrt.decoders import ENCODED_TOGETHER
from sfrt.decoders.convolution import Conv2d, Convolve
from sfrt.ops.choice import Ops, torch_ops
from sfrt.ops.epilogue import EPILOGUE
from sfrt.ops.memory_input import MEMORY_INPUT
from sfrt.ops.upsample import UPSAMPLE

SPACE = 8
"""Pixels along one side of a latent cell."""
TIME = 4
"""Pixel frames in a latent frame; the first latent frame of a video shows one."""


@dataclass(frozen=True)
class TaehvState:
    """What either half remembers between chunks: the last frame [B, C, h, w] that went into each `MemBlock`."""

    memory: tuple[Tensor, ...]


def _conv(channels_in: int, channels_out: int, stride: int = 1, bias: bool = True) -> Conv2d:
    return Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=bias)


class SoftClamp(nn.Module):
    """Bends latents smoothly into (-3, 3), so that an outlier cannot burn a picture."""

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / 3) * 3


class MemBlock(nn.Module):
    """A residual block that reads every frame beside the one before it."""

    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self._convolve = Convolve(ops)
        self._input, self._finish = ops(MEMORY_INPUT), ops(EPILOGUE)
        # The numbers are the published names; ReLUs stand between them.
        self.conv = nn.ModuleDict({"0": _conv(2 * width, width), "2": _conv(width, width), "4": _conv(width, width)})

    def forward(self, frames: Tensor, memory: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
        """Frames [B · T, width, h, w], and the last of each clip [B, width, h, w] for the chunk that follows.

        memory is what the chunk before returned so, None for blank frames.
        """
        x, newest = self._input(frames, memory, batch)
        for name, shortcut in (("0", None), ("2", None), ("4", frames)):
            x, bias = self._convolve(self.conv[name], x)
            x = self._finish(x, bias, shortcut, True)
        return x, newest


class TPool(nn.Module):
    """Folds `stride` neighbouring frames into one."""

    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = Conv2d(width * stride, width, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[N·stride, width, h, w] -> [N, width, h, w]"""
        # In the order in memory (channels last), so that no later layer turns it back.
        rows = frames.permute(0, 2, 3, 1).unflatten(0, (-1, self.stride)).permute(0, 2, 3, 1, 4)
        folded: Tensor = self.conv(rows.flatten(3).permute(0, 3, 1, 2))
        return folded


class TGrow(nn.Module):
    """Unfolds every frame into `stride` of them, of twice the size.

    The published model doubles the size first; a 1×1 convolution does not mind repeated pixels and is cheaper before.
    """

    def __init__(self, width: int, stride: int, ops: Ops) -> None:
        super().__init__()
        self.stride = stride
        self._upsample = ops(UPSAMPLE)
        self.conv = Conv2d(width, width * stride, 1, bias=False)

    def forward(self, frames: Tensor) -> Tensor:
        """[N, width, h, w] -> [N·stride, width, 2h, 2w]"""
        return self._upsample(self.conv(frames), self.stride)


def _encoder(config: TaehvConfig, ops: Ops) -> nn.Sequential:
    width = config.encoder_width
    layers: list[nn.Module] = [_conv(3, width), nn.ReLU(inplace=True)]
    for stride in (2, 2, 1):
        layers += [TPool(width, stride), _conv(width, width, stride=2, bias=False)]
        layers += [MemBlock(width, ops) for _ in range(3)]
    return nn.Sequential(*layers, _conv(width, config.latent_channels))


def _decoder(config: TaehvConfig, ops: Ops) -> nn.Sequential:
    widths = config.decoder_widths
    layers: list[nn.Module] = [SoftClamp(), _conv(config.latent_channels, widths[0]), nn.ReLU(inplace=True)]
    for width, next_width, stride in zip(widths[:3], widths[1:], (1, 2, 2), strict=True):
        layers += [MemBlock(width, ops) for _ in range(3)]
        # The published upsampling stands where Identity does; it is TGrow's last step here.
        layers += [nn.Identity(), TGrow(width, stride, ops), _conv(width, next_width, bias=False)]
    return nn.Sequential(*layers, nn.ReLU(inplace=True), _conv(widths[-1], 3))


def _run(stages: nn.Sequential, video: Tensor, memory: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
    """All frames [B, T, C, h, w] through all stages; `memory` holds a frame for each `MemBlock` (None: blank ones)."""
    batch = video.shape[0]
    frames = video.flatten(0, 1).to(next(stages.parameters()).dtype).contiguous(memory_format=torch.channels_last)
    carried: Iterator[Tensor | None] = repeat(None) if memory is None else iter(memory)
    remembered: list[Tensor] = []
    for stage in stages:
        if isinstance(stage, MemBlock):
            frames, newest = stage(frames, next(carried), batch)
            remembered.append(newest)
        else:
            frames = stage(frames)
    return frames.unflatten(0, (batch, -1)), tuple(remembered)


class Taehv(nn.Module):
    """The autoencoder: both ways carry state, so that chunk after chunk gives the same as all at once."""

    def __init__(self, config: TaehvConfig, ops: Ops | None = None) -> None:
        """ops are the implementations to run with; None is plain torch, which passes gradients."""
        super().__init__()
        ops = ops or torch_ops()
        self.config = config
        self.encoder = _encoder(config, ops)
        self.decoder = _decoder(config, ops)

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

    def encode(self, pixels: Tensor, state: TaehvState | None = None) -> tuple[Tensor, TaehvState]:
        """Pixels [B, F, 3, H, W] in [0, 1] -> latents [B, T, C, H/8, W/8] and the state for the chunk that follows.

        F is 4·T, less 3 where a video starts (`state` None): its first frame stands alone in the first latent frame, so
        it is repeated to fill it.
        """
        if state is None:
            pixels = torch.cat((pixels[:, :1].expand(-1, TIME - 1, -1, -1, -1), pixels), dim=1)
        return self.encode_groups(pixels, state)

    def encode_groups(self, pixels: Tensor, state: TaehvState | None = None) -> tuple[Tensor, TaehvState]:
        """`encode` of pixels [B, 4·T, 3, H, W] wherever they stand: four frames to every latent frame."""
        latents, memory = [], state.memory if state is not None else None
        for span in pixels.split(ENCODED_TOGETHER * TIME, dim=1):
            part, memory = _run(self.encoder, span, memory)
            latents.append(part)
        assert memory is not None, "there is at least one frame"
        return torch.cat(latents, dim=1), TaehvState(memory)
