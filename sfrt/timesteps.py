"""The few-step schedule as plain numbers: which timestep each step runs at and how its result is mixed on.

Flow matching with 1000 sigmas from 1 down to (not including) 0, moved by the shift s: σ' = s·σ / (1 + (s - 1)·σ),
t = 1000·σ' (arXiv 2506.08009, section 3.4, and the scheduler its published code uses).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sfrt.config import TRAIN_TIMESTEPS, StreamConfig


@dataclass(frozen=True)
class Step:
    """One denoising step: x0 = x - sigma·v, then x = (1 - next_sigma)·x0 + next_sigma·noise; next_sigma ends at 0."""

    timestep: float
    sigma: float
    next_sigma: float


@lru_cache(maxsize=16)
def sigma_table(shift: float) -> tuple[float, ...]:
    """The shifted training table, 1000 entries descending from 1; float32 values, as the models were trained with."""
    sigma = np.linspace(1.0, 0.0, TRAIN_TIMESTEPS + 1, dtype=np.float64)[:-1].astype(np.float32)
    shifted = np.float32(shift) * sigma / (np.float32(1) + np.float32(shift - 1) * sigma)
    return tuple(float(value) for value in shifted)


def sigma_at(timestep: float, shift: float) -> float:
    """σ of the nearest entry of the shifted table."""
    table = np.asarray(sigma_table(shift), dtype=np.float64)
    return float(table[np.abs(table * TRAIN_TIMESTEPS - timestep).argmin()])


def warp(timestep: float, shift: float) -> float:
    """The timestep that `timestep` of the plain table means under a shift: entry 1000 - timestep of the shifted one."""
    index = round(TRAIN_TIMESTEPS - timestep)
    return sigma_table(shift)[index] * TRAIN_TIMESTEPS


def steps_of(config: StreamConfig, *, first_chunk: bool = False, strength: float | None = None) -> tuple[Step, ...]:
    """The denoising steps of a chunk; the first chunk of a stream may have a list of its own.

    strength, in (0, 1], is the sigma to start from instead of the list's own: a step there, then the listed ones below.
    """
    listed = config.first_steps if first_chunk and config.first_steps else config.steps
    timesteps = [warp(step, config.shift) if config.warp else step for step in listed]
    pairs = [(timestep, sigma_at(timestep, config.shift)) for timestep in timesteps]
    if strength is not None:
        pairs = [(strength * TRAIN_TIMESTEPS, strength), *(pair for pair in pairs if pair[1] < strength)]
    ends = [*(sigma for _, sigma in pairs[1:]), 0.0]
    return tuple(Step(timestep, sigma, end) for (timestep, sigma), end in zip(pairs, ends, strict=True))


def opening(first: Step) -> Step:
    """The step that seems to lie before the first one where a chunk starts from given latents, not from noise."""
    return Step(float(TRAIN_TIMESTEPS), 1.0, first.sigma)


def timesteps_of(config: StreamConfig, strength: float | None = None) -> tuple[float, ...]:
    """Every timestep that a stream's passes run at, without repeats: all its steps, and the refresh pass."""
    steps = (*steps_of(config, first_chunk=True, strength=strength), *steps_of(config, strength=strength))
    return tuple(dict.fromkeys((*(step.timestep for step in steps), config.context_noise)))
