"""What a rolled-out video is judged by: distribution matching (DMD), score identity (SiD), or a relativistic GAN.

Each judges the whole video at a random noise level, the same for all its frames (arXiv 2506.08009, section 3.3). The
real score is the frozen judge (sfrt_train.flow). The critic, which starts as a copy of it, follows the generator: as
the fake score, trained by flow matching on what the generator makes now, or as the discriminator.

Shapes: B videos, G chunks, L tokens a chunk, P features a token, D the transformer's width.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt_train.clips import Told
from sfrt_train.flow import normals
from sfrt_train.forcing import ClipPass
from sfrt_train.loop import Losses
from sfrt_train.model import PromptedTransformer, untrained
from sfrt_train.settings import SelfForcingRun, SelfForcingSettings


@dataclass(frozen=True)
class Rolled:
    """Videos [B, G, L, P] and their prompts; where the first chunk is given, it is seen as it is and not judged."""

    video: Tensor
    prompts: Told
    given: bool = False

    @property
    def judged(self) -> Tensor:
        """bool [G]: the chunks that are."""
        chunks = torch.arange(self.video.shape[1], device=self.video.device)
        return chunks >= int(self.given)


class Clips(Protocol):
    """Videos [B, G, L, P] and what they were told."""

    @property
    def tokens(self) -> Tensor: ...

    @property
    def prompts(self) -> Told: ...


class Pool(Protocol):
    """Real videos, which the GAN alone compares with."""

    def __len__(self) -> int: ...

    def pick(self, index: Tensor, length: int, device: str) -> Clips:
        """The first `length` chunks of some of them, in float32."""


class Judging(Protocol):
    """A loss by name: what the generator descends, and what its critic does."""

    @property
    def critic(self) -> nn.Module:
        """What is trained beside the generator."""

    def generator_losses(self, rolled: Rolled, rng: np.random.Generator) -> Losses:
        """The gradient goes through the video."""

    def critic_losses(self, rolled: Rolled, rng: np.random.Generator) -> Losses:
        """The gradient goes to the critic alone."""


def judging_for(
    settings: SelfForcingRun,
    judge: PromptedTransformer,
    real: Callable[[bool], Pool],
    device: str,
    critic: PromptedTransformer | None = None,
) -> Judging:
    """The one that the settings name.

    real(late) is a pool of clips, which the GAN alone asks for. The critic is trained; None is a copy of the judge.
    """
    own, clip_pass = settings.self_forcing, ClipPass.of("none", settings, settings.chunks, device)
    critic = critic or copy.deepcopy(judge)
    if own.loss == "gan":
        return Gan(Discriminator(critic, clip_pass), (real(False), real(True)), own, settings.stream.shift)
    kind: type[Dmd | Sid] = Dmd if own.loss == "dmd" else Sid
    return kind(judge, critic, clip_pass, own, settings.stream.shift)


@dataclass(frozen=True)
class Noised:
    """A video at the level it is judged at: its tokens, sigma [B, G], and the noise it was mixed with."""

    tokens: Tensor
    sigma: Tensor
    noise: Tensor


def noised(rolled: Rolled, sigma: Tensor, noise: Tensor) -> Noised:
    """At levels sigma [B], but for a chunk that is given."""
    each = sigma[:, None] * rolled.judged
    return Noised(torch.lerp(rolled.video, noise, each[..., None, None]), each, noise)


def judged_levels(
    count: int, rng: np.random.Generator, own: SelfForcingSettings, shift: float, device: torch.device
) -> Tensor:
    """Sigmas [B], spread evenly over the levels, then warped by the shift."""
    low, high = own.levels
    even = low + (high - low) * (rng.permutation(count) + rng.random(count)) / count
    return torch.from_numpy(shift * even / (1 + (shift - 1) * even)).float().to(device)


class _Scores:
    """The real and the fake score, each as the clean video that a network sees in a noised one."""

    def __init__(
        self,
        judge: PromptedTransformer,
        critic: PromptedTransformer,
        clip_pass: ClipPass,
        own: SelfForcingSettings,
        shift: float,
    ) -> None:
        self.critic = critic.requires_grad_(False)
        self.critic.transformer.requires_grad_(True)
        self._judge, self._pass, self._own, self._shift = judge, clip_pass, own, shift

    def critic_losses(self, rolled: Rolled, rng: np.random.Generator) -> Losses:
        """Flow matching on the generator's videos."""
        at = self._noised(Rolled(rolled.video.detach(), rolled.prompts, rolled.given), rng)
        flow = self._flow(self.critic, at, rolled.prompts)
        error = (flow - (at.noise - rolled.video.detach())).square()
        return {"loss": error[:, rolled.judged].mean()}

    def _noised(self, rolled: Rolled, rng: np.random.Generator) -> Noised:
        device = rolled.video.device
        sigma = judged_levels(len(rolled.video), rng, self._own, self._shift, device)
        return noised(rolled, sigma, normals(tuple(rolled.video.shape), rng, device))

    def _flow(self, model: PromptedTransformer, at: Noised, prompts: Told) -> Tensor:
        text = model.text_kv(prompts)
        return self._pass.flow(model.transformer, at.tokens, 1000 * at.sigma, text)

    def _clean(self, model: PromptedTransformer, at: Noised, prompts: Told) -> Tensor:
        return at.tokens - at.sigma[..., None, None] * self._flow(model, at, prompts)

    def _real(self, at: Noised, prompts: Told) -> Tensor:
        """With classifier-free guidance, where there is any."""
        conditional = self._clean(self._judge, at, prompts)
        if not self._own.guidance:
            return conditional
        unprompted = self._clean(self._judge, at, prompts.unprompted())
        return conditional + self._own.guidance * (conditional - unprompted)


class Dmd(_Scores):
    """Distribution matching distillation (arXiv 2311.18828): against the gradient of the two distributions' KL."""

    def generator_losses(self, rolled: Rolled, rng: np.random.Generator) -> Losses:
        with torch.no_grad():
            at = self._noised(rolled, rng)
            real, fake = self._real(at, rolled.prompts), self._clean(self.critic, at, rolled.prompts)
        loss, apart = dmd_loss(rolled.video[:, rolled.judged], real[:, rolled.judged], fake[:, rolled.judged])
        return {"loss": loss, "apart": apart}


class Sid(_Scores):
    """Score identity distillation (arXiv 2404.04057), whose gradient goes through the scores as well."""

    def generator_losses(self, rolled: Rolled, rng: np.random.Generator) -> Losses:
        at = self._noised(rolled, rng)
        with untrained(self.critic):
            real, fake = self._real(at, rolled.prompts), self._clean(self.critic, at, rolled.prompts)
        video, real, fake = (part[:, rolled.judged] for part in (rolled.video, real, fake))
        loss, apart = sid_loss(video, real, fake, self._own.sid_alpha)
        return {"loss": loss, "apart": apart}


def dmd_loss(video: Tensor, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, how far the scores are apart) from videos and what the scores see in them, each [B, …].

    The loss' gradient by the video is (fake - real) / mean |video - real|, over the number of elements: its value says
    nothing.
    """
    with torch.no_grad():
        gradient = (fake - real) / _scale(video, real)
    loss = 0.5 * (video - (video - gradient).detach()).square().mean()
    return loss, gradient.abs().mean()


def sid_loss(video: Tensor, real: Tensor, fake: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """(loss, how far the scores are apart): (real - fake)·((real - video) - alpha·(real - fake)), scaled as for DMD."""
    between, scale = real - fake, _scale(video, real)
    loss = (between * ((real - video) - alpha * between) / scale).mean()
    return loss, (between / scale).detach().abs().mean()


@torch.no_grad()
def _scale(video: Tensor, real: Tensor) -> Tensor:
    """The mean |video - real| of each video, of a shape that broadcasts against it."""
    return (video - real).abs().flatten(1).mean(1).clamp(min=1e-6).view(-1, *[1] * (video.ndim - 1))


class Discriminator(nn.Module):
    """Logits of whole noised videos: a register token for each tapped layer gathers from all tokens what it needs."""

    def __init__(self, critic: PromptedTransformer, clip_pass: ClipPass) -> None:
        """What it learns from the critic's features, and the critic itself, are trained together."""
        super().__init__()
        self.model = critic.requires_grad_(False)
        self.model.transformer.requires_grad_(True)
        self._pass = clip_pass
        config = critic.transformer.config
        count, dim = config.num_layers, config.dim
        self._tapped = sorted({(count - 1) // 3, 2 * (count - 1) // 3, count - 1})
        self.registers = nn.ParameterList(nn.Parameter(0.02 * torch.randn(1, 1, dim)) for _ in self._tapped)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in self._tapped)
        self.gathers = nn.ModuleList(
            nn.MultiheadAttention(dim, config.num_heads, batch_first=True) for _ in self._tapped
        )
        self.head = nn.Sequential(
            nn.LayerNorm(len(self._tapped) * dim), nn.Linear(len(self._tapped) * dim, dim), nn.SiLU(), nn.Linear(dim, 1)
        )
        self.to(next(critic.parameters()).device)

    def forward(self, tokens: Tensor, sigma: Tensor, prompts: Told) -> Tensor:
        """[B] from noised videos [B, G, L, P], their levels [B, G] and prompts."""
        text = self.model.text_kv(prompts)
        found = self._pass.features(self.model.transformer, tokens, 1000 * sigma, text, self._tapped)
        gathered = []
        for features, register, norm, gather in zip(found, self.registers, self.norms, self.gathers, strict=True):
            seen = norm(features.flatten(1, 2))
            gathered.append(gather(register.expand(len(seen), -1, -1), seen, seen, need_weights=False)[0].squeeze(1))
        logits: Tensor = self.head(torch.cat(gathered, dim=-1)).squeeze(-1)
        return logits.float()


class Gan:
    """A relativistic GAN (arXiv 2501.05441) with R1 and R2 in their approximate form (arXiv 2501.08316)."""

    def __init__(self, critic: Discriminator, pools: tuple[Pool, Pool], own: SelfForcingSettings, shift: float) -> None:
        """The pools are clips as they begin, and clips from the middle of longer ones."""
        self.critic = critic
        self._pools, self._own, self._shift = pools, own, shift

    def generator_losses(self, rolled: Rolled, rng: np.random.Generator) -> Losses:
        with untrained(self.critic):
            real, fake, _, _ = self._logits(rolled, rng)
        return {"loss": F.softplus(real.detach() - fake).mean(), "apart": (real - fake).mean()}

    def critic_losses(self, rolled: Rolled, rng: np.random.Generator) -> Losses:
        """Real videos are to look more real than generated ones, and either as real as the same with a little noise."""
        real, fake, real_at, fake_at = self._logits(Rolled(rolled.video.detach(), rolled.prompts, rolled.given), rng)
        pairing = F.softplus(fake - real).mean()
        penalty = self._roughness(real, *real_at, rng) + self._roughness(fake, *fake_at, rng)
        return {"loss": pairing + self._own.penalty * penalty, "penalty": penalty}

    def _logits(
        self, rolled: Rolled, rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, tuple[Noised, Told], tuple[Noised, Told]]:
        """Of real and generated videos, in pairs of one noise level; and what they were given for."""
        count, chunks = rolled.video.shape[:2]
        device, pool = rolled.video.device, self._pools[rolled.given]
        picked = pool.pick(torch.from_numpy(rng.integers(len(pool), size=count)), chunks, str(device))
        sigma = judged_levels(count, rng, self._own, self._shift, device)
        pair = []
        for one in (Rolled(picked.tokens, picked.prompts, rolled.given), rolled):
            at = noised(one, sigma, normals(tuple(one.video.shape), rng, device))
            pair.append((at, one.prompts))
        real, fake = (self.critic(at.tokens, at.sigma, prompts) for at, prompts in pair)
        return real, fake, pair[0], pair[1]

    def _roughness(self, logits: Tensor, at: Noised, prompts: Told, rng: np.random.Generator) -> Tensor:
        """How much the logits change with a little noise, for its size."""
        amount = self._own.penalty_noise
        moved = at.tokens + amount * normals(tuple(at.tokens.shape), rng, at.tokens.device)
        changes: Tensor = (self.critic(moved, at.sigma, prompts) - logits) / amount
        return changes.square().mean()
