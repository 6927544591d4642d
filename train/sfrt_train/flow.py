"""Flow matching over whole clips: the baselines (teacher and diffusion forcing) and the judge of Self Forcing.

They are one training under three names, told apart by the past that a chunk sees (sfrt_train.forcing). The judge sees
a clip as a whole, at one noise level, as the bidirectional teacher of the paper does; it starts from teacher forcing's
weights, which know pictures, motions and prompts already, so that it has only to learn to look ahead.

Shapes: B clips, G chunks, L tokens a chunk, P features a token.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from sfrt_train.clips import Clips, Prompts, make_clips
from sfrt_train.forcing import ClipPass
from sfrt_train.loop import Descent, Loop, LoopSettings, Losses, Trainee
from sfrt_train.model import VideoModel, fresh_model, plain_attention
from sfrt_train.settings import FlowSettings, Settings

Stage = Literal["teacher_forcing", "diffusion_forcing", "judge"]
STAGES: tuple[Stage, ...] = get_args(Stage)


def train(settings: Settings, folder: Path, device: str, until: int | None = None, stage: Stage = STAGES[0]) -> None:
    """Train to the end, or to step `until`, going on from the checkpoint in `folder`."""
    own: FlowSettings = getattr(settings, stage)
    clips = make_clips(settings, folder, device)
    late = make_clips(settings, folder, device, late=True) if own.given else None
    model = fresh_model(settings, folder, own.start, device)
    passes = {length: ClipPass.of(own.forcing, settings, length, device) for length in own.lengths}

    def losses_of(step: int) -> Losses:
        rng = np.random.default_rng((settings.seed, 5, step))
        length = own.lengths[step % len(own.lengths)]
        given = late is not None and rng.random() < own.given
        pool = late if given and late is not None else clips
        count = own.batch_chunks // (length + passes[length].clean)
        batch = pool.pick(torch.from_numpy(rng.integers(len(pool), size=count)), length, device)
        with torch.autocast(batch.tokens.device.type, torch.bfloat16), plain_attention(device):
            return losses(model, passes[length], batch, rng, own, settings.stream.shift, given=given)

    trainee = Trainee(model, Descent(own.learning_rate, own.weight_decay, ema=own.ema))
    Loop(trainee, LoopSettings(own.steps, own.warmup, own.decay), folder, stage).descend(losses_of, until)


def losses(
    model: VideoModel,
    clip_pass: ClipPass,
    clips: Clips,
    rng: np.random.Generator,
    own: FlowSettings,
    shift: float,
    *,
    given: bool = False,
) -> Losses:
    """The squared error of the flow: every chunk at a noise level of its own, or all of a clip at one (the judge).

    Where the first chunk is given, it is seen as it is, at level 0, and counts for nothing.
    """
    clean = clips.tokens
    count, chunks = clean.shape[:2]
    levels = noise_levels((count, 1 if own.forcing == "none" else chunks), rng, shift)
    sigma = levels.expand(count, chunks).clone().to(clean.device)
    if given:
        sigma[:, 0] = 0
    noise = normals(clean.shape, rng, clean.device)
    noisy = torch.lerp(clean, noise, sigma[..., None, None])
    amount = own.context_noise * torch.from_numpy(rng.random(clean.shape[:2], np.float32)).to(clean.device)
    context = torch.lerp(clean, normals(clean.shape, rng, clean.device), amount[..., None, None])
    text = model.text_kv(_some_left_out(clips.prompts, rng, own.unprompted))
    flow = clip_pass.flow(model.transformer, noisy, 1000 * sigma, text, context)
    error = (flow - (noise - clean)).square().mean(dim=(2, 3))
    counted = sigma > 0
    return {
        "loss": _mean_where(error, counted),
        "high": _mean_where(error, sigma > 0.8).detach(),
        "low": _mean_where(error, counted & (sigma <= 0.5)).detach(),
    }


def noise_levels(shape: tuple[int, ...], rng: np.random.Generator, shift: float) -> Tensor:
    """Sigmas in (0, 1), warped by the shift; spread evenly over the batch, which steadies the loss."""
    count = int(np.prod(shape))
    even = (rng.permutation(count) + rng.random(count)) / count
    return torch.from_numpy(shift * even / (1 + (shift - 1) * even)).float().view(shape)


def normals(shape: tuple[int, ...], rng: np.random.Generator, device: torch.device) -> Tensor:
    """Standard normals, float32."""
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(device)


def _some_left_out(prompts: Prompts, rng: np.random.Generator, share: float) -> Prompts:
    """The same with a share of the videos' prompts replaced by padding."""
    if not share:
        return prompts
    kept = torch.from_numpy(rng.random(len(prompts.ids)) >= share).to(prompts.ids.device)
    return Prompts(prompts.ids * kept[:, None, None], prompts.chunks)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values * where).sum() / where.sum().clamp(min=1)
