"""From noise to a chunk's clean tokens: its passes, and the update behind each (arXiv 2506.08009, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from sfrt.noise import seed_bits
from sfrt.ops.choice import Ops
from sfrt.ops.denoise import DENOISE, FINISH, Update, update_after, updated
from sfrt.ops.noise import NOISE
from sfrt.stage import NoiseSource, PhiloxNoise, Stage
from sfrt.timesteps import Step, opening


class Mixing(Protocol):
    """How the noise of one chunk comes into its tokens.

    Tokens are float32 [frames · tokens, token_dim]; beside them comes what the model reads of them.
    """

    def start(self, given: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
        """What the first pass starts from: noise, or given tokens with noise on them."""

    def onward(self, x: Tensor, flow: Tensor, update: Update, number: int) -> tuple[Tensor, Tensor]:
        """What pass `number` starts from, from the tokens and the flow of the one before it."""


class DrawnNoise:
    """Normals drawn before the first pass: any source's, and the faster way on a CPU."""

    def __init__(self, source: NoiseSource, frames: range, steps: int) -> None:
        self._normals = source(frames, steps)

    def start(self, given: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
        x = self._normals[0] if given is None else updated(given, None, update, self._normals[0])
        return x, x

    def onward(self, x: Tensor, flow: Tensor, update: Update, number: int) -> tuple[Tensor, Tensor]:
        x = updated(x, flow, update, self._normals[number] if update.fresh else None)
        return x, x


class KernelNoise:
    """Normals made by the kernels that mix them in, from a seed and a frame number on the device."""

    def __init__(self, noise: PhiloxNoise, frames: range, ops: Ops) -> None:
        device = noise.device
        self._seed = torch.tensor([seed_bits(noise.seed)], device=device)
        self._frame = torch.tensor([frames.start], device=device)
        self._size = (len(frames), noise.tokens, noise.token_dim)
        self._noise, self._denoise = ops(NOISE), ops(DENOISE)

    def start(self, given: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
        if given is None:
            x = self._noise(self._seed, self._frame, 0, *self._size)
            return x, x
        return self._denoise(given, None, update, self._seed, self._frame, 0, self._size[1])

    def onward(self, x: Tensor, flow: Tensor, update: Update, number: int) -> tuple[Tensor, Tensor]:
        return self._denoise(x, flow, update, self._seed, self._frame, number, self._size[1])


def mixing_of(stage: Stage, frames: range, steps: int) -> Mixing:
    """The way of mixing that is the faster one on this stage's device."""
    if isinstance(stage.noise, PhiloxNoise) and stage.device.type == "cuda":
        return KernelNoise(stage.noise, frames, stage.ops)
    return DrawnNoise(stage.noise, frames, steps if stage.stream.sampler == "renoise" else 1)


def denoise_chunk(
    stage: Stage, frames: range, steps: tuple[Step, ...], given: Tensor | None, between: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """A chunk's clean tokens, for its refresh pass, and its latents float32 [T, C, h, w].

    given are tokens to start from instead of noise alone; between is called before every pass.
    """
    sampler, mixing = stage.stream.sampler, mixing_of(stage, frames, len(steps))
    x, read = mixing.start(given, update_after(opening(steps[0]), "renoise"))
    *others, last = steps
    for number, step in enumerate(others, start=1):
        between()
        flow = stage.rollout.flow(read, step.timestep)
        x, read = mixing.onward(x, flow, update_after(step, sampler), number)
    between()
    flow = stage.rollout.flow(read, last.timestep)
    return stage.ops(FINISH)(x, flow, last.sigma, stage.model, stage.grid.rows, stage.grid.columns)
