"""Self Forcing (arXiv 2506.08009): the few-step model is trained on its own rollouts, as inference makes them.

A step of the training is some updates of the critic, each on a fresh rollout, then one of the generator. No video is
needed, only prompts (but for the GAN, which compares with clips). Some rollouts go on beyond the length that the judge
knows; of these the last part is judged, its first frame encoded anew as the picture that a clip begins with, and its
first chunk given to the judge, not judged: the model learns to stream on when its first frames have left the window.

What it starts from and is fed with is its material (sfrt_train.material): of the recipe's stages here, or of a
fine-tuning (sfrt_train.finetune). Stages: self_forcing is trained with the window that streams roll in; naive_rolling,
for comparison, sees its whole video while it is trained, and first meets a window when it streams (section 3.4 of the
paper).
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
from sfrt.errors import ConfigError
from sfrt.ops.layout import latents_from_tokens, tokens_from_latents
from sfrt_train.judging import Rolled, judging_for
from sfrt_train.loop import Descent, Loop, LoopSettings, Losses, Trainee
from sfrt_train.material import MadeUp, Material
from sfrt_train.model import PromptedTransformer, plain_attention
from sfrt_train.rollout import Rollout, Trained
from sfrt_train.settings import SelfForcingRun, SelfForcingSettings, Settings

Stage = Literal["self_forcing", "naive_rolling"]
STAGES: tuple[Stage, ...] = get_args(Stage)

LossesOf = Callable[[Rolled, np.random.Generator], Losses]


class Roller:
    """Rolls the generator out on the material's prompts."""

    def __init__(self, settings: SelfForcingRun, material: Material, device: str) -> None:
        """Raises ConfigError where a rollout could not be as long, or change its prompt, as the settings want."""
        own = settings.self_forcing
        if own.long_share and own.longest <= settings.chunks:
            raise ConfigError(
                f"longest is {own.longest} chunks and videos are judged at {settings.chunks}; "
                "make it more, or long_share 0"
            )
        if own.switch_share and settings.chunks < 2:
            raise ConfigError("a video of one chunk cannot change its prompt; make chunks more, or switch_share 0")
        self._settings, self._material, self._device = settings, material, device
        self._coder = material.coder() if own.long_share else None

    def roll(self, generator: PromptedTransformer, rng: np.random.Generator, *, trained: bool) -> Rolled:
        """A batch of videos of the judged length; they carry gradients where they are to be trained.

        Every sample ends its chunks at a step of its own, drawn evenly over the batch.
        """
        own, stream, chunks = self._settings.self_forcing, self._settings.stream, self._settings.chunks
        long = rng.random() < own.long_share
        extra = int(rng.integers(1, own.longest - chunks + 1)) if long else 0
        prompts = self._material.prompts(rng, own.batch, chunks + extra)
        seeds = [int(seed) for seed in rng.integers(2**63, size=own.batch)]
        steps, first = len(stream.steps), int(rng.integers(len(stream.steps)))
        ends = sorted((first + number) % steps for number in range(own.batch))
        with torch.set_grad_enabled(trained):
            rollout = Rollout(generator, stream, prompts.to(self._device), seeds)
            video = rollout.video(Trained(ends, gradient=chunks - int(long) if trained else 0))
        if long:
            video = self._begun_anew(video, chunks)
        return Rolled(video, prompts.last(chunks).to(self._device), given=long)

    @torch.no_grad()
    def _encoded_anew(self, tokens: Tensor) -> Tensor:
        """The last frame of tokens [B, T·tokens, P] as the first one of a video: a picture, [B, tokens, P]."""
        assert self._coder is not None, "only longer rollouts begin anew"
        model, grid = self._settings.transformer, Grid.of(self._settings.transformer, self._settings.stream)
        latents = latents_from_tokens(tokens.flatten(0, 1), model, grid.rows, grid.columns)
        pixels, _ = self._coder.decode(latents.unflatten(0, (len(tokens), -1)), None)
        again, _ = self._coder.encode(pixels[:, -1:])
        picture: Tensor = tokens_from_latents(again.flatten(0, 1).float(), model).unflatten(0, (len(tokens), -1))
        return picture

    def _begun_anew(self, video: Tensor, chunks: int) -> Tensor:
        """The last chunks of a longer video [B, G, L, P], as a video that begins there."""
        frame = Grid.of(self._settings.transformer, self._settings.stream).tokens
        before = video.detach()[:, : video.shape[1] - chunks].flatten(1, 2)
        first = video.detach()[:, -chunks]
        picture = self._encoded_anew(torch.cat((before, first[:, :frame]), dim=1))
        first = torch.cat((picture, first[:, frame:]), dim=1)
        return torch.cat((first[:, None], video[:, 1 - chunks :]), dim=1)


def train(settings: Settings, folder: Path, device: str, until: int | None = None, stage: Stage = STAGES[0]) -> None:
    """Train to the end, or to step `until`, going on from the checkpoint in `folder`."""
    if stage == "naive_rolling":
        whole = replace(settings.stream, window=settings.chunks * settings.stream.chunk)
        settings = replace(settings, stream=whole, self_forcing=replace(settings.self_forcing, long_share=0.0))
    run(settings, MadeUp(settings, folder, device), folder, stage, device, until)


def descents(own: SelfForcingSettings) -> tuple[Descent, Descent]:
    """The generator's and the critic's."""
    generator = Descent(own.learning_rate, own.weight_decay, own.betas, ema=own.ema, ema_from=own.ema_from)
    return generator, Descent(own.critic_learning_rate, own.weight_decay, own.betas)


def run(
    settings: SelfForcingRun, material: Material, folder: Path, name: str, device: str, until: int | None = None
) -> None:
    """The loop itself: its checkpoint and log are called `name` in the folder. Raises ConfigError as Roller does."""
    own = settings.self_forcing
    generator, judge = material.generator(), material.judge()
    judging = judging_for(settings, judge, material.clips, device, material.critic())
    roller = Roller(settings, material, device)
    of_model, of_critic = descents(own)
    model, critic = Trainee(generator, of_model), Trainee(judging.critic, of_critic)
    halves = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=own.precision == "bfloat16")

    def judged(losses_of: LossesOf, rng: np.random.Generator, *, trained: bool) -> Losses:
        """Those of a fresh rollout."""
        with halves:
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

    loop = LoopSettings(own.steps, own.warmup, own.decay, own.checkpoint_seconds, own.log_every)
    Loop(model, loop, folder, name, beside={"critic": critic}).run(advance, until)
