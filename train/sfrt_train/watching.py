"""Rolls out many held-out prompts at once, to any length, and reads them a window at a time.

What is seen is what sfrt streams (sfrt_train.rollout), only for a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.config import StreamConfig
from sfrt.decoders.taehv import Taehv
from sfrt.ops.layout import latents_from_tokens
from sfrt.text import Tokenizer
from sfrt_train.clips import Prompts, both_ids
from sfrt_train.data import COLOURS, RADIUS, Scene, coverage, say, split_scenes
from sfrt_train.model import VideoModel
from sfrt_train.reader import AREA, centres_of, read_scene
from sfrt_train.rollout import Rollout
from sfrt_train.settings import Settings

_LEAST = 30
"""Pixels below which there is no object to measure."""


@dataclass(frozen=True)
class Reading:
    """One window of one video, or the mean of many.

    colour (of object and background), shape and direction are shares: 1 where the window shows what was asked for.
    size_error is relative to the size that objects are drawn at, colour_error to the full range of a channel;
    sharpness is 1 for edges as they are drawn, less where they are blurred.
    """

    colour: float
    shape: float
    direction: float
    size_error: float
    colour_error: float
    sharpness: float


def held_out(settings: Settings, tokenizer: Tokenizer, count: int, seed: int) -> tuple[list[Scene], Tensor]:
    """Scenes that were never trained on, in words that the seed chooses, as ids [N, 2, S]."""
    _, scenes = split_scenes(settings.held_out, settings.seed)
    rng = np.random.default_rng((settings.seed, 12, seed))
    asked = [scenes[i % len(scenes)] for i in range(count)]
    prompts = [say(scene, rng) for scene in asked]
    return asked, torch.stack([both_ids(prompt, prompt, tokenizer) for prompt in prompts])


@torch.inference_mode()
def watch(
    settings: Settings, model: VideoModel, decoder: Taehv, stream: StreamConfig, ids: Tensor, seed: int, windows: int
) -> Iterator[Tensor]:
    """Videos of prompts [B, 2, S], so many windows of the trained length: their pixels [B, F, 3, H, W], in turn."""
    chunks, grid = settings.clips.chunks, Grid.of(settings.transformer, stream)
    prompts = Prompts(ids, torch.zeros(len(ids), windows * chunks, dtype=torch.int64, device=ids.device))
    seeds = [seed * 1_000_003 + number for number in range(len(ids))]
    pixels, state = [], None
    for chunk in Rollout(model, stream, prompts, seeds).run():
        latents = latents_from_tokens(chunk.tokens.flatten(0, 1), settings.transformer, grid.rows, grid.columns)
        shown, state = decoder.decode(latents.unflatten(0, (len(ids), -1)), state)
        pixels.append(shown.float().cpu())
        if len(pixels) == chunks:
            yield torch.cat(pixels, dim=1)
            pixels = []


def read(pixels: Tensor, asked: Scene) -> Reading:
    """What pixels [F, 3, SIZE, SIZE] show of the scene that was asked for."""
    seen = read_scene(pixels)
    ground, colour = (torch.tensor(COLOURS[name]).view(1, 3, 1, 1) for name in (asked.background, asked.colour))
    along = ((pixels - ground) * (colour - ground)).sum(1) / (colour - ground).square().sum()
    cover = along.clamp(0, 1)
    radius = (cover.where(cover > 0.25, 0.0).sum((1, 2)) / AREA[asked.shape]).sqrt()
    errors = [_colour_error(pixels, part, wanted) for part, wanted in ((cover > 0.75, colour), (cover < 0.25, ground))]
    return Reading(
        colour=float((seen.colour, seen.background) == (asked.colour, asked.background)),
        shape=float(seen.shape == asked.shape),
        direction=float(seen.motion == asked.motion),
        size_error=float((radius / RADIUS - 1).abs().mean()),
        colour_error=sum(errors) / len(errors),
        sharpness=_sharpness(cover, asked.shape),
    )


def read_all(videos: Sequence[Tensor] | Tensor, asked: Sequence[Scene]) -> list[Reading]:
    """A window of each of some videos."""
    return [read(video, scene) for video, scene in zip(videos, asked, strict=True)]


def _colour_error(pixels: Tensor, part: Tensor, wanted: Tensor) -> float:
    """How far the mean colour of a part of each frame is off, meaned over frames and channels; 1 where it has none."""
    count = part.sum((1, 2))
    mean = (pixels * part[:, None]).sum((2, 3)) / count.clamp(min=1)[:, None]
    error = (mean - wanted.view(1, 3)).abs().mean(1)
    return float(error.where(count > 0, 1.0).mean())


def _sharpness(cover: Tensor, shape: str) -> float:
    """How steep edges are in covers [F, SIZE, SIZE], against those of the shape drawn where it is seen."""
    seen = cover[cover.sum((1, 2)) > _LEAST]
    if not len(seen):
        return 0.0
    return _steepness(seen) / _steepness(coverage(centres_of(seen), RADIUS, shape))


def _steepness(cover: Tensor) -> float:
    """The mean slope, weighted by itself."""
    slopes = torch.cat([cover.diff(dim=axis).abs().flatten() for axis in (1, 2)])
    return float(slopes.square().sum() / slopes.sum())
