"""The Wan 2.1 VAE: latents to pixels and pixels to latents, chunk by chunk with carried state.

Maths and parameter names are those of the published Wan 2.1 VAE (arXiv 2503.20314), so that its checkpoint loads
unchanged. What differs is how the work is laid out:

- A chunk goes through every layer once, all its frames together, and not one latent frame at a time.
- Nothing inside a module changes while it runs. Each layer takes the state it left last time and returns the next.
- Activations are [B, C, T, H, W] with the channels innermost in memory (channels_last_3d) from end to end, so that the
  work done frame by frame folds T into the batch without a copy.
- A causal convolution reads one buffer, in which the activation before it was written right behind the frames of the
  past: no concatenation and no padding in time.
- A sum (a bias, a shortcut) is left to what reads it first, which does it in passing (`Sum`).
- Nearest upsampling and the convolution behind it are one transposed convolution: 4/9 of the multiplications, and the
  upsampled frames never exist.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfrt.config import WanVaeConfig
from sfrt.decoders import spans_to_encode
from sfrt.decoders.convolution import Conv2d, Conv3d, Convolve
from sfrt.errors import ConfigError
from sfrt.ops.causal_input import CAUSAL_INPUT, EPS, PAST
from sfrt.ops.channels_last import empty_video
from sfrt.ops.choice import Ops, torch_ops
from sfrt.ops.epilogue import EPILOGUE
from sfrt.ops.interleave import INTERLEAVE

LayerState = tuple[Tensor, ...]
"""What one layer keeps of the past, newest frame last; empty for a layer that works frame by frame."""


@dataclass(frozen=True)
class WanVaeState:
    """All that either half leaves for the next chunk of the same video: one entry per layer, in running order."""

    layers: tuple[LayerState, ...]


@dataclass(frozen=True)
class Sum:
    """Activations [B, C, T, H, W] as the sum they are: x, the bias [C] of the convolution it came from, a shortcut.

    Whoever does the sum may do it in x.
    """

    x: Tensor
    bias: Tensor | None = None
    shortcut: Tensor | None = None


class WanVae(nn.Module):
    """The whole autoencoder. For inference only: it keeps no graph for gradients."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: WanVaeConfig, ops: Ops | None = None) -> None:
        """ops are the implementations to run with; None is plain torch."""
        super().__init__()
        ops = ops or torch_ops()
        self.config = config
        self.encoder = Encoder(config, ops)
        self.conv1 = Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config, ops)
        # Real values even when the weights are still on the meta device: no checkpoint holds these two.
        for name, values in (("mean", config.mean), ("std", config.std)):
            statistic = torch.tensor(values, device="cpu").view(-1, 1, 1, 1)
            self.register_buffer(name, statistic, persistent=False)

    @torch.no_grad()
    def decode(self, latents: Tensor, state: WanVaeState | None = None) -> tuple[Tensor, WanVaeState]:
        """Turn a chunk of latents into pixels.

        latents: [B, T, C, h, w] normalised, any float dtype. state: what the chunk before returned, None at the start
        of a video. Returns pixels [B, F, 3, 8h, 8w] float32 in [0, 1] and the next state; F is 4·T, or 4·T − 3 at the
        start. The pixels lie in memory as [B, F, H, W, 3]. Decoding in chunks equals decoding at once.
        """
        z = (latents.transpose(1, 2) * self.std + self.mean).to(self.conv2.weight.dtype)
        z = self.conv2(z.contiguous(memory_format=torch.channels_last_3d))
        x, layers = self.decoder(z, None if state is None else state.layers)
        pixels = x.float().contiguous(memory_format=torch.channels_last_3d).mul_(0.5).add_(0.5).clamp_(0, 1)
        return pixels.transpose(1, 2), WanVaeState(layers)

    @torch.no_grad()
    def encode(self, pixels: Tensor, state: WanVaeState | None = None) -> tuple[Tensor, WanVaeState]:
        """Turn a chunk of pixels into latents, the mean of the posterior.

        pixels: [B, F, 3, H, W] in [0, 1], any float dtype, H and W multiples of 8; F is 4·T, or 4·T − 3 at the start of
        a video. state: what the chunk before returned, None at the start. Returns normalised latents
        [B, T, C, H/8, W/8] float32 and the next state. Encoding in chunks equals encoding at once. Raises ConfigError
        for a chunk of another length or size.
        """
        self._check_chunk(pixels, start=state is None)
        x = pixels.transpose(1, 2).float().mul(2).sub_(1)
        x = x.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        parts, layers = [], None if state is None else state.layers
        for begin, end in spans_to_encode(x.shape[2], self._in_time, start=state is None):
            part, layers = self.encoder(x[:, :, begin:end], layers)
            parts.append(part)
        assert layers is not None, "there is at least one frame"
        mu: Tensor = self.conv1(torch.cat(parts, dim=2)).chunk(2, dim=1)[0]
        return ((mu.float() - self.mean) / self.std).transpose(1, 2), WanVaeState(layers)

    @property
    def _in_time(self) -> int:
        """Pixel frames in a latent frame."""
        return 1 << sum(self.config.temporal_downsample)

    def _check_chunk(self, pixels: Tensor, *, start: bool) -> None:
        frames, _, height, width = pixels.shape[1:]
        in_space, alone = 2 ** len(self.config.temporal_downsample), int(start)
        if frames < 1 or (frames - alone) % self._in_time:
            wanted = f"1 + {self._in_time}k" if start else f"{self._in_time}k"
            raise ConfigError(f"a clip of {frames} frames cannot be encoded; its length must be {wanted}")
        if height % in_space or width % in_space:
            raise ConfigError(f"frames of {height}×{width} cannot be encoded; both must be multiples of {in_space}")


class Coder(nn.Module, ABC):
    """What encoder and decoder share: a first convolution, a chain of layers, a head."""

    conv1: CausalConv3d
    head: nn.ModuleDict

    def __init__(self, ops: Ops) -> None:
        super().__init__()
        self._finish = ops(EPILOGUE)

    @abstractmethod
    def chain(self) -> Iterator[nn.Module]:
        """The layers between first convolution and head, in running order."""

    def forward(self, x: Tensor, state: tuple[LayerState, ...] | None) -> tuple[Tensor, tuple[LayerState, ...]]:
        """x: [B, C, T, H, W]; state: one entry per layer, None at the start of a video."""
        before: Iterator[LayerState | None] = repeat(None) if state is None else iter(state)
        after: list[LayerState] = []
        (past,) = next(before) or (None,)
        y, past, _ = self.conv1.behind_past(Sum(x), past)
        after.append((past,))
        for layer in self.chain():
            y, kept = layer(y, next(before))
            after.append(kept)
        (past,) = next(before) or (None,)
        y, past, _ = cast(CausalConv3d, self.head["2"]).behind_past(y, past, self.head["0"])
        after.append((past,))
        return self._finish(y.x, y.bias, y.shortcut, False), tuple(after)


class Decoder(Coder):
    """Latent features [B, C, T, h, w] to frames [B, 3, F, 8h, 8w], about −1 to 1."""

    def __init__(self, config: WanVaeConfig, ops: Ops) -> None:
        super().__init__(ops)
        widths = [config.dim * factor for factor in reversed(config.dim_mult)]
        doubles_time = list(reversed(config.temporal_downsample))
        self.conv1 = CausalConv3d(config.latent_channels, widths[0], ops)
        self.middle = middle_layers(widths[0], ops)
        self.upsamples = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, width, ops))
                channels = width
            if level < len(doubles_time):
                self.upsamples.append(Upsample(channels, doubles_time[level], ops))
                channels //= 2
        self.head = head_layers(channels, 3, ops)

    def chain(self) -> Iterator[nn.Module]:
        yield from self.middle
        yield from self.upsamples


class Encoder(Coder):
    """Frames [B, 3, F, H, W], −1 to 1, to the mean and log variance of latents [B, 2C, T, H/8, W/8]."""

    def __init__(self, config: WanVaeConfig, ops: Ops) -> None:
        super().__init__(ops)
        widths = [config.dim * factor for factor in config.dim_mult]
        self.conv1 = CausalConv3d(3, config.dim, ops)
        self.downsamples = nn.ModuleList()
        channels = config.dim
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, width, ops))
                channels = width
            if level < len(config.temporal_downsample):
                self.downsamples.append(Downsample(channels, config.temporal_downsample[level], ops))
        self.middle = middle_layers(channels, ops)
        self.head = head_layers(channels, 2 * config.latent_channels, ops)

    def chain(self) -> Iterator[nn.Module]:
        yield from self.downsamples
        yield from self.middle


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and causal convolution, around them a shortcut. The numbers are the published names."""

    def __init__(self, channels: int, out_channels: int, ops: Ops) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RmsNorm(channels, 1, 1, 1),
                "2": CausalConv3d(channels, out_channels, ops),
                "3": RmsNorm(out_channels, 1, 1, 1),
                "6": CausalConv3d(out_channels, out_channels, ops),
            }
        )
        self.shortcut = nn.Identity() if channels == out_channels else Conv3d(channels, out_channels, 1)

    def forward(self, x: Sum, state: LayerState | None) -> tuple[Sum, LayerState]:
        part = self.residual
        first, second = state or (None, None)
        y, first, total = cast(CausalConv3d, part["2"]).behind_past(x, first, part["0"], keep=True)
        y, second, _ = cast(CausalConv3d, part["6"]).behind_past(y, second, part["3"])
        return Sum(y.x, y.bias, self.shortcut(total)), (first, second)


class AttentionBlock(nn.Module):
    """Single-head self-attention inside each frame, across all its positions."""

    def __init__(self, channels: int, ops: Ops) -> None:
        super().__init__()
        self._finish = ops(EPILOGUE)
        self.norm = RmsNorm(channels, 1, 1)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Sum, state: LayerState | None) -> tuple[Sum, LayerState]:
        total = self._finish(x.x, x.bias, x.shortcut, False)
        height, width = total.shape[3:]
        tokens = self.norm(total).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, H·W, C]
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)  # frames stand where heads usually do
        y = F.linear(y, self.proj.weight.flatten(1), self.proj.bias)
        return Sum(y.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3), shortcut=total), ()


class Upsample(nn.Module):
    """Twice the height and width with half the channels; if temporal, also twice the frames."""

    def __init__(self, channels: int, temporal: bool, ops: Ops) -> None:
        super().__init__()
        self._convolve = Convolve(ops)
        self._finish, self._interleave = ops(EPILOGUE), ops(INTERLEAVE)
        self.resample = nn.ModuleDict({"1": UpsampleConv2d(channels, channels // 2, 3)})
        self.time_conv = CausalConv3d(channels, 2 * channels, ops, (1 + PAST, 1, 1)) if temporal else None

    def forward(self, x: Sum, state: LayerState | None) -> tuple[Sum, LayerState]:
        kept: LayerState = ()
        if self.time_conv is None:
            total = self._finish(x.x, x.bias, x.shortcut, False)
        else:
            total, kept = self._double_frames(self.time_conv, x, state)
        y, bias = self._convolve(self.resample["1"], as_frames(total))
        return Sum(as_videos(y, len(total)), bias), kept

    def _double_frames(self, conv: CausalConv3d, x: Sum, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Two frames for each but the first of a video, which stays single.

        The convolution never sees that first frame: its past begins with zeros behind it.
        """
        if state is not None:
            (past,) = state
            y, past, _ = conv.behind_past(x, past)
            return self._interleave(y.x, y.bias, None), (past,)
        total = self._finish(x.x, x.bias, x.shortcut, False)
        first, later = total[:, :, :1], total[:, :, 1:]
        if not later.shape[2]:
            return total, (empty_video(total, total.shape[1], PAST).zero_(),)
        y, past, _ = conv.behind_past(Sum(later), None)
        return self._interleave(y.x, y.bias, first), (past,)


class Downsample(nn.Module):
    """Half the height and width; if temporal, also half the frames."""

    def __init__(self, channels: int, temporal: bool, ops: Ops) -> None:
        super().__init__()
        self._finish = ops(EPILOGUE)
        self.resample = nn.ModuleDict({"1": DownsampleConv2d(channels, channels, 3, stride=2)})
        self.time_conv = Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Sum, state: LayerState | None) -> tuple[Sum, LayerState]:
        frames = as_frames(self._finish(x.x, x.bias, x.shortcut, False))
        y = as_videos(self.resample["1"](frames), len(x.x))
        if self.time_conv is None:
            return Sum(y), ()
        # A copy: a view would keep the whole chunk in memory until the next one.
        kept = (y[:, :, -1:].clone(memory_format=torch.channels_last_3d),)
        if state is not None:
            return Sum(self.time_conv(torch.cat((*state, y), dim=2))), kept
        if y.shape[2] == 1:  # the first frame of a video passes as it is
            return Sum(y), kept
        return Sum(torch.cat((y[:, :, :1], self.time_conv(y)), dim=2)), kept


class UpsampleConv2d(Conv2d):
    """Nearest upsampling by 2 and a 3×3 convolution with padding 1, as one 4×4 transposed convolution of stride 2.

    Along one axis, each input pixel stands twice in the upsampled row. An even output pixel meets its left neighbour
    with tap 0 and itself with taps 1 and 2; an odd one meets itself with taps 0 and 1 and the right neighbour with 2.
    """

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        kernel = weight.float()
        for axis in (2, 3):
            left, centre, right = kernel.unbind(axis)
            kernel = torch.stack((right, centre + right, left + centre, left), dim=axis)
        kernel = kernel.to(weight.dtype).transpose(0, 1)  # transposed convolutions want [in, out, 4, 4]
        y = F.conv_transpose2d(input, kernel, bias, stride=2, padding=1)
        return y.contiguous(memory_format=torch.channels_last)


class DownsampleConv2d(Conv2d):
    """A strided convolution that pads below and on the right only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class CausalConv3d(Conv3d):
    """A convolution that sees the present and the past, T + 2 frames for T of its own."""

    def __init__(
        self, channels: int, out_channels: int, ops: Ops, kernel: tuple[int, int, int] = (1 + PAST, 3, 3)
    ) -> None:
        super().__init__(channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self._input = ops(CAUSAL_INPUT)
        self._convolve = Convolve(ops)

    def behind_past(
        self, x: Sum, past: Tensor | None, norm: nn.Module | None = None, keep: bool = False
    ) -> tuple[Sum, Tensor, Tensor | None]:
        """(the convolution of SiLU(norm(x)), or of x if there is no norm; the past for the next chunk; x's total).

        The total is there only if asked for (keep).
        """
        gamma = None if norm is None else cast(RmsNorm, norm).gamma.flatten()
        frames, past, total = self._input(x.x, x.bias, x.shortcut, gamma, past, keep)
        return Sum(*self._convolve(self, frames)), past, total


class RmsNorm(nn.Module):
    """Every pixel's channels brought to root mean square 1, times gamma, whose shape is [C, 1, ...]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten(), eps=EPS)
        return y.movedim(-1, 1)


def middle_layers(channels: int, ops: Ops) -> nn.ModuleList:
    """The part at the lowest resolution, the only one with attention."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels, ops), AttentionBlock(channels, ops), ResidualBlock(channels, channels, ops)]
    )


def head_layers(channels: int, out_channels: int, ops: Ops) -> nn.ModuleDict:
    """The last norm and convolution, under their published numbers."""
    return nn.ModuleDict({"0": RmsNorm(channels, 1, 1, 1), "2": CausalConv3d(channels, out_channels, ops)})


def as_frames(videos: Tensor) -> Tensor:
    """[B, C, T, H, W] as [B · T, C, H, W], channels-last as torch knows it even where B · T is 1."""
    return videos.permute(0, 2, 3, 4, 1).flatten(0, 1).permute(0, 3, 1, 2)


def as_videos(frames: Tensor, batch: int) -> Tensor:
    """The inverse of as_frames."""
    videos: Tensor = frames.unflatten(0, (batch, -1))
    return videos.transpose(1, 2)
