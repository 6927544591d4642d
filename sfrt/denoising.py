"""From noise to a chunk's clean tokens: its passes, and the update behind each (arXiv 2506.08009, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from sfrt.device import on_device
from sfrt.noise import seed_bits
from sfrt.ops.choice import Ops
from sfrt.ops.denoise import DENOISE, FINISH, Update, predict_x0, update_after, updated
from sfrt.ops.layout import latents_from_tokens
from sfrt.ops.noise import NOISE
from sfrt.stage import PhiloxNoise, Stage
from sfrt.timesteps import Step, opening


class Mixing(Protocol):
    """How the noise of one chunk comes into its tokens.

    Tokens are float32 [frames · tokens, token_dim]; beside them comes what the model reads of them.
    """

    def start(self, given: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
        """What the first pass starts from: noise, or given tokens with noise on them."""

    def onward(self, x: Tensor, flow: Tensor, update: Update, number: int) -> tuple[Tensor, Tensor]:
        """What pass `number` starts from, from the tokens and the flow of the one before it."""


@dataclass(frozen=True, eq=False)
class DrawnNoise:
    """Normals [steps, frames · tokens, token_dim] drawn before the first pass: any source's, and faster on a CPU."""

    normals: Tensor

    def start(self, given: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
        x = self.normals[0] if given is None else updated(given, None, update, self.normals[0])
        return x, x

    def onward(self, x: Tensor, flow: Tensor, update: Update, number: int) -> tuple[Tensor, Tensor]:
        x = updated(x, flow, update, self.normals[number] if update.fresh else None)
        return x, x


class KernelNoise:
    """Normals made by the kernels that mix them in, from a seed and a frame's number, int64 [1] on the device.

    size is that of the chunk: frames, tokens of a frame, token_dim.
    """

    def __init__(self, seed: Tensor, frame: Tensor, size: tuple[int, int, int], ops: Ops) -> None:
        self._seed, self._frame, self._size = seed, frame, size
        self._noise, self._denoise = ops(NOISE), ops(DENOISE)

    def start(self, given: Tensor | None, update: Update) -> tuple[Tensor, Tensor]:
        if given is None:
            x = self._noise(self._seed, self._frame, 0, *self._size)
            return x, x
        return self._denoise(given, None, update, self._seed, self._frame, 0, self._size[1])

    def onward(self, x: Tensor, flow: Tensor, update: Update, number: int) -> tuple[Tensor, Tensor]:
        return self._denoise(x, flow, update, self._seed, self._frame, number, self._size[1])


@dataclass(frozen=True, eq=False)
class Denoised:
    """A chunk's clean tokens, for its refresh pass, and its latents float32 [T, C, h, w].

    predictions are, where they were asked for, the latents [steps, C, h, w] that each pass took its last frame to be.
    """

    tokens: Tensor
    latents: Tensor
    predictions: Tensor | None


def noise_of(stage: Stage, frames: range, steps: int) -> tuple[tuple[Tensor, ...], Callable[..., Mixing]]:
    """The noise of a chunk as numbers on the device, and what mixes by them: the faster way on that device."""
    noise = stage.noise
    if isinstance(noise, PhiloxNoise) and stage.device.type != "cpu":
        counters = on_device([seed_bits(noise.seed)], stage.device), on_device([frames.start], stage.device)
        size = (len(frames), noise.tokens, noise.token_dim)
        return counters, partial(KernelNoise, size=size, ops=stage.ops)
    return (noise(frames, steps if stage.stream.sampler == "renoise" else 1),), DrawnNoise


def denoise_chunk(
    stage: Stage,
    frames: range,
    steps: tuple[Step, ...],
    given: Tensor | None,
    between: Callable[[], None],
    *,
    watched: bool = False,
) -> Denoised:
    """Denoise the chunk that was placed last.

    given are tokens to start from instead of noise alone; between is called before every pass, or once where they are
    captured as one; watched asks for predictions.
    """
    numbers, mixing_by = noise_of(stage, frames, len(steps))
    inputs = numbers if given is None else (*numbers, given)

    def work(*inputs: Tensor) -> tuple[Tensor, ...]:
        mixing = mixing_by(*inputs[: len(numbers)])
        return _passes(stage, steps, mixing, None if given is None else inputs[-1], between, watched)

    between()
    key = ("denoise", len(frames), steps, stage.stream.sampler, given is None, watched)
    tokens, latents, *predictions = stage.rollout.launch(key, work, *inputs)
    return Denoised(tokens, latents, torch.cat((*predictions, latents[-1:])) if watched else None)


def _passes(
    stage: Stage,
    steps: tuple[Step, ...],
    mixing: Mixing,
    given: Tensor | None,
    between: Callable[[], None],
    watched: bool,
) -> tuple[Tensor, ...]:
    """Clean tokens, latents, and what all passes but the last one predict, where that is watched."""
    model, grid, predictions = stage.model, stage.grid, []
    x, read = mixing.start(given, update_after(opening(steps[0]), "renoise"))
    *others, last = steps
    for number, step in enumerate(others, start=1):
        flow = stage.rollout.flow(read, step.timestep)
        if watched:
            newest = predict_x0(x[-grid.tokens :], flow[-grid.tokens :], step)
            predictions.append(latents_from_tokens(newest, model, grid.rows, grid.columns))
        x, read = mixing.onward(x, flow, update_after(step, stage.stream.sampler), number)
        between()
    flow = stage.rollout.flow(read, last.timestep)
    return *stage.ops(FINISH)(x, flow, last.sigma, model, grid.rows, grid.columns), *predictions
