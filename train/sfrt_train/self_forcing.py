"""Self Forcing (arXiv 2506.08009): the few-step model is trained on its own rollouts, as inference makes them.

A step of the training is some updates of the critic, each on a fresh rollout, then one of the generator. No video is
needed, only prompts (but for the GAN, which compares with clips). Some rollouts go on beyond the length that the judge
knows; of these the last part is judged, its first frame encoded anew as the picture that a clip begins with, and its
first chunk given to the judge, not judged: the model learns to stream on when its first frames have left the window.

Stages: self_forcing is trained with the window that streams roll in; naive_rolling, for comparison, sees its whole
video while it is trained, and first meets a window when it streams (section 3.4 of the paper).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.config import StreamConfig
from sfrt.ops.layout import latents_from_tokens, tokens_from_latents
from sfrt.text import Tokenizer
from sfrt_train import autoencoder, pairs
from sfrt_train.clips import draw_prompts, make_clips
from sfrt_train.data import split_scenes
from sfrt_train.judging import Rolled, judging_for
from sfrt_train.loop import Descent, Loop, LoopSettings, Losses, Trainee
from sfrt_train.model import VideoModel, fresh_model, plain_attention, trained_model
from sfrt_train.rollout import Rollout, Trained
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer

Stage = Literal["self_forcing", "naive_rolling"]
STAGES: tuple[Stage, ...] = get_args(Stage)
JUDGE = "judge"

LossesOf = Callable[[Rolled, np.random.Generator], Losses]


class Roller:
    """Rolls the generator out on made-up prompts."""

    def __init__(self, settings: Settings, folder: Path, device: str, stream: StreamConfig, long_share: float) -> None:
        self._settings, self._device, self._stream, self._long_share = settings, device, stream, long_share
        self._tokenizer = Tokenizer(make_tokenizer(settings, folder), settings.transformer.text_len)
        self._scenes, _ = split_scenes(settings.held_out, settings.seed)
        self._autoencoder = autoencoder.load(settings, folder, device)

    def roll(self, generator: VideoModel, rng: np.random.Generator, *, trained: bool) -> Rolled:
        """A batch of videos of the judged length; they carry gradients where they are to be trained.

        Every sample ends its chunks at a step of its own, drawn evenly over the batch.
        """
        own, chunks = self._settings.self_forcing, self._settings.clips.chunks
        long = rng.random() < self._long_share
        extra = int(rng.integers(1, own.longest - chunks + 1)) if long else 0
        prompts = draw_prompts(rng, self._scenes, self._tokenizer, own.batch, chunks + extra, own.switch_share)
        seeds = [int(seed) for seed in rng.integers(2**63, size=own.batch)]
        steps, first = len(self._stream.steps), int(rng.integers(len(self._stream.steps)))
        ends = sorted((first + number) % steps for number in range(own.batch))
        with torch.set_grad_enabled(trained):
            rollout = Rollout(generator, self._stream, prompts.to(self._device), seeds)
            video = rollout.video(Trained(ends, gradient=chunks - int(long) if trained else 0))
        if long:
            video = self._begun_anew(video, chunks)
        return Rolled(video, prompts.last(chunks).to(self._device), given=long)

    @torch.no_grad()
    def _encoded_anew(self, tokens: Tensor) -> Tensor:
        """The last frame of tokens [B, T·tokens, P] as the first one of a video: a picture, [B, tokens, P]."""
        model, grid = self._settings.transformer, Grid.of(self._settings.transformer, self._stream)
        latents = latents_from_tokens(tokens.flatten(0, 1), model, grid.rows, grid.columns)
        pixels, _ = self._autoencoder.decode(latents.unflatten(0, (len(tokens), -1)))
        again, _ = self._autoencoder.encode(pixels[:, -1:])
        picture: Tensor = tokens_from_latents(again.flatten(0, 1).float(), model).unflatten(0, (len(tokens), -1))
        return picture

    def _begun_anew(self, video: Tensor, chunks: int) -> Tensor:
        """The last chunks of a longer video [B, G, L, P], as a video that begins there."""
        frame = Grid.of(self._settings.transformer, self._stream).tokens
        before = video.detach()[:, : video.shape[1] - chunks].flatten(1, 2)
        first = video.detach()[:, -chunks]
        picture = self._encoded_anew(torch.cat((before, first[:, :frame]), dim=1))
        first = torch.cat((picture, first[:, frame:]), dim=1)
        return torch.cat((first[:, None], video[:, 1 - chunks :]), dim=1)


def train(settings: Settings, folder: Path, device: str, until: int | None = None, stage: Stage = STAGES[0]) -> None:
    """Train to the end, or to step `until`, going on from the checkpoint in `folder`."""
    own = settings.self_forcing
    generator = fresh_model(settings, folder, pairs.NAME, device)
    judge = trained_model(settings, folder, JUDGE, device)
    judging = judging_for(settings, judge, lambda late: make_clips(settings, folder, device, late=late), device)
    whole = settings.clips.chunks * settings.stream.chunk
    rolling = stage == "self_forcing"
    stream = settings.stream if rolling else replace(settings.stream, window=whole)
    roller = Roller(settings, folder, device, stream, own.long_share if rolling else 0.0)
    model = Trainee(
        generator, Descent(own.learning_rate, own.weight_decay, own.betas, ema=own.ema, ema_from=own.ema_from)
    )
    critic = Trainee(judging.critic, Descent(own.critic_learning_rate, own.weight_decay, own.betas))

    def judged(losses_of: LossesOf, rng: np.random.Generator, *, trained: bool) -> Losses:
        """Those of a fresh rollout."""
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            rolled = roller.roll(generator, rng, trained=trained)
            with plain_attention(device):
                return losses_of(rolled, rng)

    def advance(step: int, factor: float) -> Losses:
        rng = np.random.default_rng((settings.seed, 11, step))
        for _ in range(own.critic_updates):
            critic_losses = judged(judging.critic_losses, rng, trained=False)
            critic.descend(critic_losses["loss"], factor)
        losses = judged(judging.generator_losses, rng, trained=True)
        model.descend(losses["loss"], factor)
        return {**losses, **{f"critic {name}": value for name, value in critic_losses.items()}}

    loop = LoopSettings(own.steps, own.warmup, own.decay, log_every=5)
    Loop(model, loop, folder, stage, beside={"critic": critic}).run(advance, until)
