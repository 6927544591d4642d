"""The few-step initialisation: regression on the trajectories of the many-step model (arXiv 2412.07772, section 4.3).

The model that was trained by teacher forcing is rolled out with many Euler steps, as a stream, so that what lies behind
a chunk is its own making. Of every chunk's way from noise to picture, the places are kept from which the few-step
model sets out, and the end. The few-step model then learns to see the end from any of those places.

Shapes: N videos of G chunks of L tokens of P features; S few steps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sfrt.errors import ConfigError
from sfrt.text import Tokenizer
from sfrt.timesteps import steps_of
from sfrt_train.clips import Prompts, draw_prompts
from sfrt_train.data import split_scenes
from sfrt_train.flow import normals
from sfrt_train.forcing import ClipPass
from sfrt_train.loop import Descent, Loop, LoopSettings, Losses, Trainee, save
from sfrt_train.model import VideoModel, fresh_model, plain_attention, trained_model
from sfrt_train.rollout import Rollout
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer

NAME = "regression"
TEACHER = "teacher_forcing"


def make_pairs(settings: Settings, folder: Path, device: str) -> tuple[Tensor, Prompts]:
    """Trajectories [N, G, S + 1, L, P] in half precision, the end last, and the prompts they follow.

    Each batch is a file in the folder, made only where it is missing.
    """
    own, parts = settings.pairs, folder / "pairs"
    tokenizer = Tokenizer(make_tokenizer(settings, folder), settings.transformer.text_len)
    scenes, _ = split_scenes(settings.held_out, settings.seed)
    model: VideoModel | None = None
    made = []
    for start in tqdm(range(0, own.videos, own.batch), desc="pairs", unit=f"{own.batch} videos", mininterval=5):
        path = parts / f"{start:06d}.pt"
        if not path.exists():
            model = model or trained_model(settings, folder, TEACHER, device)
            count = min(own.batch, own.videos - start)
            rng = np.random.default_rng((settings.seed, 9, start))
            prompts = draw_prompts(
                rng, scenes, tokenizer, count, settings.clips.chunks, settings.clips.switch_share
            ).to(device)
            seeds = [int(seed) for seed in rng.integers(2**63, size=count)]
            found = trajectories(settings, model, prompts, seeds)
            save(path, {"tokens": found.half().cpu(), "ids": prompts.ids.cpu(), "chunks": prompts.chunks.cpu()})
        made.append(torch.load(path, weights_only=True))
    tokens, ids, chunks = (torch.cat([part[name] for part in made]) for name in ("tokens", "ids", "chunks"))
    return tokens, Prompts(ids, chunks)


@torch.no_grad()
def trajectories(settings: Settings, model: VideoModel, prompts: Prompts, seeds: list[int]) -> Tensor:
    """Some videos' [N, G, S + 1, L, P]: where the few steps set out on the many-step model's way, and its end.

    Raises ConfigError where a few-step timestep is none of the many.
    """
    stream = settings.euler(settings.pairs.teacher_steps)
    levels = [step.sigma for step in steps_of(stream)]
    missing = [step.timestep for step in steps_of(settings.stream) if step.sigma not in levels]
    if missing:
        raise ConfigError(
            f"{settings.pairs.teacher_steps} Euler steps do not pass the timesteps {missing}; choose a multiple"
        )
    kept = [levels.index(step.sigma) for step in steps_of(settings.stream)]
    with torch.autocast(prompts.ids.device.type, torch.bfloat16):
        rollout = Rollout(model, stream, prompts, seeds)
        chunks = [torch.stack([*(chunk.starts[at] for at in kept), chunk.tokens], dim=1) for chunk in rollout.run()]
    return torch.stack(chunks, dim=1)


def train(settings: Settings, folder: Path, device: str, until: int | None = None) -> None:
    """Train to the end, or to step `until`, going on from the checkpoint in `folder`."""
    own, chunks = settings.pairs, settings.clips.chunks
    tokens, prompts = make_pairs(settings, folder, device)
    model = fresh_model(settings, folder, TEACHER, device)
    clip_pass = ClipPass.of("teacher", settings, chunks, device)

    def losses_of(step: int) -> Losses:
        rng = np.random.default_rng((settings.seed, 10, step))
        picked = torch.from_numpy(rng.integers(len(tokens), size=own.batch_chunks // (chunks + clip_pass.clean)))
        batch = Prompts(prompts.ids[picked], prompts.chunks[picked]).to(device)
        with torch.autocast(batch.ids.device.type, torch.bfloat16), plain_attention(device):
            return losses(model, clip_pass, tokens[picked].float().to(device), batch, rng, settings)

    trainee = Trainee(model, Descent(own.learning_rate, own.weight_decay, ema=own.ema))
    Loop(trainee, LoopSettings(own.steps, own.warmup, own.decay), folder, NAME).descend(losses_of, until)


def losses(
    model: VideoModel, clip_pass: ClipPass, ways: Tensor, prompts: Prompts, rng: np.random.Generator, settings: Settings
) -> Losses:
    """The squared error of the end as seen from one of the places on each chunk's way, ways [B, G, S + 1, L, P]."""
    count, chunks = ways.shape[:2]
    steps = steps_of(settings.stream)
    at = torch.from_numpy(rng.integers(len(steps), size=(count, chunks))).to(ways.device)
    sigma = torch.tensor([step.sigma for step in steps], device=ways.device)[at]
    clean = ways[:, :, -1]
    noisy = ways.gather(2, at[..., None, None, None].expand(-1, -1, 1, *ways.shape[3:])).squeeze(2)
    amount = settings.pairs.context_noise * torch.from_numpy(rng.random((count, chunks), np.float32)).to(ways.device)
    context = torch.lerp(clean, normals(clean.shape, rng, ways.device), amount[..., None, None])
    text = model.text_kv(prompts)
    flow = clip_pass.flow(model.transformer, noisy, 1000 * sigma, text, context)
    error = (noisy - sigma[..., None, None] * flow - clean).square().mean(dim=(2, 3))
    by_step = {f"step {i}": error.detach()[at == i].sum() / (at == i).sum().clamp(min=1) for i in range(len(steps))}
    return {"loss": error.mean(), **by_step}
