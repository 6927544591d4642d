"""Trains the narrow TAEHV on made-up clips: sharp edges, and latents of about unit size that bear some noise.

Stages: autoencoder trains all of it, and is what every later stage learns from; it leaves corners blurred. sharpening
goes on with the decoder alone, for what is shown in the end: latents stay as they are, so no other stage depends on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt.decoders.taehv import MemBlock, Taehv, TGrow, TPool
from sfrt_train.data import make_clip, split_scenes
from sfrt_train.loop import Descent, Loop, LoopSettings, Losses, Trainee, weights_of
from sfrt_train.reader import read_scene
from sfrt_train.settings import AutoencoderSettings, Settings

Stage = Literal["autoencoder", "sharpening"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def train(settings: Settings, folder: Path, device: str, until: int | None = None, stage: Stage = STAGES[0]) -> None:
    """Train to the end, or to step `until`, going on from the checkpoint in `folder`."""
    own: AutoencoderSettings = getattr(settings, stage)
    model, stream = _begin(settings, folder, device, stage)
    scenes, _ = split_scenes(settings.held_out, settings.seed)
    side = settings.stream.height // 8

    def losses_of(step: int) -> Losses:
        rng = np.random.default_rng((settings.seed, stream, step))
        length = own.lengths[step % len(own.lengths)]
        count = own.batch_frames // length
        # Chunks of one latent frame: a clip of any length, now and then with a sudden change.
        clips = [
            make_clip(rng, scenes, length, chunk=1, switch_share=0.15, free=number < own.free_share * count).pixels
            for number in range(count)
        ]
        noise = rng.standard_normal((len(clips), length, settings.taehv.latent_channels, side, side), np.float32)
        return losses(model, torch.stack(clips).to(device), torch.from_numpy(noise).to(device), own)

    Loop(Trainee(model, Descent(own.learning_rate)), LoopSettings(own.steps, own.warmup), folder, stage).descend(
        losses_of, until
    )


def _begin(settings: Settings, folder: Path, device: str, stage: Stage) -> tuple[Taehv, int]:
    """What a stage starts from, and the number of its stream of random clips."""
    if stage == "sharpening":
        model = load(settings, folder, device)
        model.train().decoder.requires_grad_(True)
        return model, 13
    torch.manual_seed(settings.seed)
    return initialise(Taehv(settings.taehv)).to(device, memory_format=torch.channels_last), 1


@torch.no_grad()
def initialise(model: Taehv) -> Taehv:
    """Starts as an autoencoder that keeps the mean colour of every cell in three of its channels.

    All other weights keep the size of a signal (there are no norms to restore it), and the blocks change little at
    first. From plain random weights, the first third of the training went into finding colours.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu" if module.kernel_size == (3, 3) else "linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in (*model.encoder, *model.decoder):
        if isinstance(module, TPool | TGrow):
            _carry_colour(module.conv)
        elif isinstance(module, nn.Conv2d):
            _carry_colour(module)
        elif isinstance(module, MemBlock):
            module.conv["4"].weight.mul_(0.1)
    spread, middle = 0.38, 0.45  # of the colours of a clip
    model.encoder[-1].weight[:3].div_(spread)
    model.encoder[-1].bias[:3].fill_(-middle / spread)
    model.encoder[-1].weight[3:].mul_(0.5)
    model.decoder[1].weight[:3].mul_(spread)
    model.decoder[1].bias[:3].fill_(middle)
    return model


def _carry_colour(conv: nn.Conv2d) -> None:
    """Let channels 0 to 2 of a convolution pass through it: averaged over what it pools, copied where it grows."""
    width = min(conv.in_channels, conv.out_channels)
    middle = conv.kernel_size[0] // 2
    for colour in range(3):
        outs, ins = range(colour, conv.out_channels, width), range(colour, conv.in_channels, width)
        if conv.kernel_size == (3, 3):
            outs, ins = range(colour, colour + 1), range(colour, colour + 1)
        taps = slice(middle, middle + conv.stride[0])
        for out in outs:
            conv.weight[out].zero_()
            for channel in ins:
                conv.weight[out, channel, taps, taps] = 1 / (len(ins) * conv.stride[0] ** 2)


def losses(model: Taehv, pixels: Tensor, noise: Tensor, own: AutoencoderSettings) -> Losses:
    """Pixels [B, F, 3, H, W] through the autoencoder and back; `noise` is shaped like the latents."""
    with torch.autocast(pixels.device.type, torch.bfloat16):
        latents, _ = model.encode(pixels)
        decoded, _ = model.decode_unclamped(latents + own.latent_noise * noise)
    difference = decoded.float() - pixels
    pixel = (_edges(pixels, own.edge_weight) * (difference.abs() + 2 * difference.square())).mean()
    gradient = _slope(difference, -1).abs().mean() + _slope(difference, -2).abs().mean()
    scale = _scale(latents.float())
    total = pixel + own.gradient_weight * gradient + own.scale_weight * scale
    return {"loss": total, "pixel": pixel, "gradient": gradient, "scale": scale}


def load(settings: Settings, folder: Path, device: str, stage: Stage = STAGES[0]) -> Taehv:
    """The autoencoder as a stage has trained it so far, frozen."""
    model = Taehv(settings.taehv)
    model.load_state_dict(weights_of(folder, stage))
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def check(settings: Settings, folder: Path, device: str, stage: Stage, clips: int = 100) -> dict[str, float]:
    """The share of reconstructed clips whose colour, shape and motion the reader still reads right."""
    model = load(settings, folder, device, stage)
    _, scenes = split_scenes(settings.held_out, settings.seed)
    right = {"colour": 0, "background": 0, "shape": 0, "motion": 0}
    for i in range(clips):
        clip = make_clip(np.random.default_rng((settings.seed, 2, i)), scenes, settings.clips.chunks)
        decoded, _ = model.decode(model.encode(clip.pixels[None].to(device))[0])
        found = read_scene(decoded[0].float().cpu())
        for part in right:
            right[part] += getattr(found, part) == getattr(clip.scenes[0], part)
    return {part: count / clips for part, count in right.items()}


def _slope(video: Tensor, axis: int) -> Tensor:
    return video.diff(dim=axis)


def _edges(pixels: Tensor, weight: float) -> Tensor:
    """1 in flat patches, up to 1 + weight around edges, [B, F, 1, H, W]."""
    steep = _slope(F.pad(pixels, (0, 1)), -1).abs().amax(2) + _slope(F.pad(pixels, (0, 0, 0, 1)), -2).abs().amax(2)
    steep[..., -1] = 0
    steep[..., -1, :] = 0
    return 1 + weight * F.max_pool2d(steep.clamp(max=1), 5, stride=1, padding=2)[:, :, None]


def _scale(latents: Tensor) -> Tensor:
    """Zero where every channel has mean 0 and variance 1 and nothing comes near the decoder's soft clamp at 3."""
    per_channel = latents.transpose(1, 2).transpose(0, 1).flatten(1)
    mean, std = per_channel.mean(1), per_channel.std(1)
    return (mean.square() + (std - 1).square()).mean() + 10 * F.relu(latents.abs() - 2).square().mean()
