"""The Wan 2.1 VAE: latents to pixels chunk by chunk with carried state, and pixels to latents.

Maths and parameter names are those of the published Wan 2.1 VAE (arXiv 2503.20314), so that its checkpoint loads
unchanged. What differs is how the work is laid out:

- A chunk goes through every layer once, all its frames together, and not one latent frame at a time.
- Nothing inside a module changes while it runs. Each layer takes the state it left last time and returns the next.
- Activations are [B, C, T, H, W] with the channels innermost in memory (channels_last_3d) from end to end, so that the
  work done frame by frame folds T into the batch without a copy.
- A causal convolution reads one buffer, in which the activation before it was written right behind the frames of the
  past: no concatenation and no padding in time.
- Nearest upsampling and the convolution behind it are one transposed convolution: 4/9 of the multiplications, and the
  upsampled frames never exist.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfrt.config import WanVaeConfig
from sfrt.errors import ConfigError

PAST = 2
"""Frames of the past that a convolution with a temporal kernel of 3 sees."""

ENCODE_CHUNK = 3
"""Latent frames encoded together: bounds the memory of a long clip and changes nothing in the result."""

LayerState = tuple[Tensor, ...]
"""What one layer keeps of the past, newest frame last; empty for a layer that works frame by frame."""


@dataclass(frozen=True)
class WanVaeState:
    """All that a decode leaves for the next chunk of the same video: one entry per layer, in running order."""

    layers: tuple[LayerState, ...]


class WanVae(nn.Module):
    """The whole autoencoder. For inference only: it keeps no graph for gradients."""

    mean: Tensor
    std: Tensor

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = nn.Conv3d(2 * config.latent_channels, 2 * config.latent_channels, 1)
        self.conv2 = nn.Conv3d(config.latent_channels, config.latent_channels, 1)
        self.decoder = Decoder(config)
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
    def encode(self, pixels: Tensor) -> Tensor:
        """Turn a whole clip into latents, the mean of the posterior.

        pixels: [B, F, 3, H, W] in [0, 1], any float dtype, F = 1 + 4k, H and W multiples of 8. Returns normalised
        latents [B, 1 + k, C, H/8, W/8] float32. Raises ConfigError for a clip of another length or size.
        """
        self._check_clip(pixels)
        x = pixels.transpose(1, 2).float().mul(2).sub_(1)
        x = x.to(self.conv1.weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        parts, state = [], None
        for start, stop in self._encode_spans(frames=x.shape[2]):
            part, state = self.encoder(x[:, :, start:stop], state)
            parts.append(part)
        mu: Tensor = self.conv1(torch.cat(parts, dim=2)).chunk(2, dim=1)[0]
        return ((mu.float() - self.mean) / self.std).transpose(1, 2)

    def _encode_spans(self, frames: int) -> Iterator[tuple[int, int]]:
        """Cut a clip as decoding makes it: the first chunk has one frame for its first latent frame."""
        step = 2 ** sum(self.config.temporal_downsample)
        start, stop = 0, 1 + step * (ENCODE_CHUNK - 1)
        while start < frames:
            yield start, min(stop, frames)
            start, stop = stop, stop + step * ENCODE_CHUNK

    def _check_clip(self, pixels: Tensor) -> None:
        frames, _, height, width = pixels.shape[1:]
        in_time = 2 ** sum(self.config.temporal_downsample)
        in_space = 2 ** len(self.config.temporal_downsample)
        if frames % in_time != 1 % in_time:
            raise ConfigError(f"a clip of {frames} frames cannot be encoded; its length must be 1 + {in_time}k")
        if height % in_space or width % in_space:
            raise ConfigError(f"frames of {height}×{width} cannot be encoded; both must be multiples of {in_space}")


class Coder(nn.Module, ABC):
    """What encoder and decoder share: a first convolution, a chain of layers, a head."""

    conv1: CausalConv3d
    head: nn.ModuleDict

    @abstractmethod
    def chain(self) -> Iterator[nn.Module]:
        """The layers between first convolution and head, in running order."""

    def forward(self, x: Tensor, state: tuple[LayerState, ...] | None) -> tuple[Tensor, tuple[LayerState, ...]]:
        """x: [B, C, T, H, W]; state: one entry per layer, None at the start of a video."""
        before: Iterator[LayerState | None] = repeat(None) if state is None else iter(state)
        after: list[LayerState] = []
        (past,) = next(before) or (None,)
        x, past = conv_after_past(self.conv1, x, past)
        after.append((past,))
        for layer in self.chain():
            x, kept = layer(x, next(before))
            after.append(kept)
        (past,) = next(before) or (None,)
        x, past = activated_conv(self.head["0"], self.head["2"], x, past)
        after.append((past,))
        return x, tuple(after)


class Decoder(Coder):
    """Latent features [B, C, T, h, w] to frames [B, 3, F, 8h, 8w], about −1 to 1."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = [config.dim * factor for factor in reversed(config.dim_mult)]
        doubles_time = list(reversed(config.temporal_downsample))
        self.conv1 = CausalConv3d(config.latent_channels, widths[0])
        self.middle = middle_layers(widths[0])
        self.upsamples = nn.ModuleList()
        channels = widths[0]
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks + 1):
                self.upsamples.append(ResidualBlock(channels, width))
                channels = width
            if level < len(doubles_time):
                self.upsamples.append(Upsample(channels, temporal=doubles_time[level]))
                channels //= 2
        self.head = head_layers(channels, 3)

    def chain(self) -> Iterator[nn.Module]:
        yield from self.middle
        yield from self.upsamples


class Encoder(Coder):
    """Frames [B, 3, F, H, W], −1 to 1, to the mean and log variance of latents [B, 2C, T, H/8, W/8]."""

    def __init__(self, config: WanVaeConfig) -> None:
        super().__init__()
        widths = [config.dim * factor for factor in config.dim_mult]
        self.conv1 = CausalConv3d(3, config.dim)
        self.downsamples = nn.ModuleList()
        channels = config.dim
        for level, width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                self.downsamples.append(ResidualBlock(channels, width))
                channels = width
            if level < len(config.temporal_downsample):
                self.downsamples.append(Downsample(channels, temporal=config.temporal_downsample[level]))
        self.middle = middle_layers(channels)
        self.head = head_layers(channels, 2 * config.latent_channels)

    def chain(self) -> Iterator[nn.Module]:
        yield from self.downsamples
        yield from self.middle


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and causal convolution, around them a shortcut. The numbers are the published names."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(
            {
                "0": RmsNorm(channels, 1, 1, 1),
                "2": CausalConv3d(channels, out_channels),
                "3": RmsNorm(out_channels, 1, 1, 1),
                "6": CausalConv3d(out_channels, out_channels),
            }
        )
        self.shortcut = nn.Identity() if channels == out_channels else nn.Conv3d(channels, out_channels, 1)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        part = self.residual
        first, second = state or (None, None)
        y, first = activated_conv(part["0"], part["2"], x, first)
        y, second = activated_conv(part["3"], part["6"], y, second)
        return y.add_(self.shortcut(x)), (first, second)


class AttentionBlock(nn.Module):
    """Single-head self-attention inside each frame, across all its positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RmsNorm(channels, 1, 1)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        height, width = x.shape[3:]
        tokens = self.norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, H·W, C]
        qkv = F.linear(tokens, self.to_qkv.weight.flatten(1), self.to_qkv.bias)
        q, k, v = qkv.chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v)  # frames stand where heads usually do
        y = F.linear(y, self.proj.weight.flatten(1), self.proj.bias)
        return y.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3).add_(x), ()


class Upsample(nn.Module):
    """Twice the height and width with half the channels; if temporal, also twice the frames."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": UpsampleConv2d(channels, channels // 2, 3)})
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        kept: LayerState = ()
        if self.time_conv is not None:
            x, kept = self._double_frames(self.time_conv, x, state)
        return per_frame(self.resample["1"], x), kept

    @staticmethod
    def _double_frames(conv: CausalConv3d, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        """Two frames for each but the first of a video, which stays single.

        The convolution never sees that first frame: its past begins with zeros behind it.
        """
        single = 1 if state is None else 0
        (past,) = state or (None,)
        later = x[:, :, single:]
        buffer = past_buffer(later, past)
        buffer[:, :, PAST:] = later
        out = frame_buffer(x, frames=single + 2 * later.shape[2])
        out[:, :, :single] = x[:, :, :single]
        if later.shape[2]:
            out[:, :, single::2], out[:, :, single + 1 :: 2] = conv(buffer).chunk(2, dim=1)
        return out, (newest(buffer, PAST),)


class Downsample(nn.Module):
    """Half the height and width; if temporal, also half the frames."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": DownsampleConv2d(channels, channels, 3, stride=2)})
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, state: LayerState | None) -> tuple[Tensor, LayerState]:
        x = per_frame(self.resample["1"], x)
        if self.time_conv is None:
            return x, ()
        kept = (newest(x, 1),)
        if state is not None:
            return self.time_conv(torch.cat((*state, x), dim=2)), kept
        if x.shape[2] == 1:  # the first frame of a video passes as it is
            return x, kept
        return torch.cat((x[:, :, :1], self.time_conv(x)), dim=2), kept


class UpsampleConv2d(nn.Conv2d):
    """Nearest upsampling by 2 and a 3×3 convolution with padding 1, as one 4×4 transposed convolution of stride 2.

    Along one axis, each input pixel stands twice in the upsampled row. An even output pixel meets its left neighbour
    with tap 0 and itself with taps 1 and 2; an odd one meets itself with taps 0 and 1 and the right neighbour with 2.
    """

    def forward(self, input: Tensor) -> Tensor:
        kernel = self.weight.float()
        for axis in (2, 3):
            left, centre, right = kernel.unbind(axis)
            kernel = torch.stack((right, centre + right, left + centre, left), dim=axis)
        kernel = kernel.to(self.weight.dtype).transpose(0, 1)  # transposed convolutions want [in, out, 4, 4]
        return F.conv_transpose2d(input, kernel, self.bias, stride=2, padding=1)


class DownsampleConv2d(nn.Conv2d):
    """A strided convolution that pads below and on the right only."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the present and the past, which its input brings along.

    [B, C, 2 + T, H, W] to [B, C', T, H, W].
    """

    def __init__(self, channels: int, out_channels: int, kernel: tuple[int, int, int] = (1 + PAST, 3, 3)) -> None:
        super().__init__(channels, out_channels, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))


class RmsNorm(nn.Module):
    """Every pixel's channels brought to root mean square 1, times gamma, whose shape is [C, 1, ...]."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = F.rms_norm(x.movedim(1, -1), (x.shape[1],), self.gamma.flatten(), eps=1e-24)
        return y.movedim(-1, 1)


def middle_layers(channels: int) -> nn.ModuleList:
    """The part at the lowest resolution, the only one with attention."""
    return nn.ModuleList(
        [ResidualBlock(channels, channels), AttentionBlock(channels), ResidualBlock(channels, channels)]
    )


def head_layers(channels: int, out_channels: int) -> nn.ModuleDict:
    """The last norm and convolution, under their published numbers."""
    return nn.ModuleDict({"0": RmsNorm(channels, 1, 1, 1), "2": CausalConv3d(channels, out_channels)})


def activated_conv(norm: nn.Module, conv: nn.Module, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """conv(silu(norm(x))) and the past for the next chunk; the SiLU writes straight into the convolution's input."""
    buffer = past_buffer(x, past)
    torch.ops.aten.silu.out(norm(x), out=buffer[:, :, PAST:])
    return conv(buffer), newest(buffer, PAST)


def conv_after_past(conv: nn.Module, x: Tensor, past: Tensor | None) -> tuple[Tensor, Tensor]:
    """conv(x) and the past for the next chunk."""
    buffer = past_buffer(x, past)
    buffer[:, :, PAST:] = x
    return conv(buffer), newest(buffer, PAST)


def past_buffer(x: Tensor, past: Tensor | None) -> Tensor:
    """Memory [B, C, 2 + T, H, W] for frames like x's behind the past (zeros if there is none), which is in place."""
    buffer = frame_buffer(x, frames=PAST + x.shape[2])
    buffer[:, :, :PAST] = 0 if past is None else past
    return buffer


def frame_buffer(x: Tensor, frames: int) -> Tensor:
    """Uninitialised memory for so many frames like those of x."""
    batch, channels, _, height, width = x.shape
    shape = (batch, channels, frames, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)


def newest(x: Tensor, frames: int) -> Tensor:
    """The last frames of x, copied: a view would keep the whole chunk in memory until the next one."""
    return x[:, :, -frames:].clone(memory_format=torch.channels_last_3d)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Run a two-dimensional layer over every frame of [B, C, T, H, W]."""
    frames = x.transpose(1, 2)
    y: Tensor = layer(frames.flatten(0, 1))
    y = y.unflatten(0, frames.shape[:2])
    return y.transpose(1, 2)
