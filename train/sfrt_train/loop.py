"""The loop both trainings share: resumable, seeded, with a progress bar and a CSV log.

Every step draws its data from a generator made of (seed, step) alone, so a run that was stopped and resumed goes on
exactly as one that was not.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Losses = dict[str, Tensor]
"""Named scalars of one step; the one called "loss" is descended."""


@dataclass(frozen=True)
class LoopSettings:
    """How long and how fast to train; learning rates and decays as AdamW means them."""

    steps: int
    learning_rate: float
    warmup: int
    decay: float = 1.0
    """Share of the steps, at the end, in which the learning rate goes down."""
    weight_decay: float = 0.0
    ema: float = 0.0
    """Decay of the averaged weights; 0 keeps none."""
    checkpoint_seconds: float = 60.0
    log_every: int = 20


def learning_rate_factor(step: int, settings: LoopSettings) -> float:
    """Up in a line, level, and over the last share of the steps down in half a cosine."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    start = max(settings.warmup, round(settings.steps * (1 - settings.decay)))
    return 0.5 * (1 + math.cos(math.pi * max(0, step - start) / max(1, settings.steps - start)))


def save(path: Path, state: Any) -> None:
    """Whole or not at all: a run killed while saving leaves the file before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    torch.save(state, partial)
    os.replace(partial, path)


def _decays(parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1


class Loop:
    """Trains a module to `settings.steps` steps, from its checkpoint where there is one."""

    def __init__(self, module: nn.Module, settings: LoopSettings, folder: Path, name: str) -> None:
        self.module, self.settings, self.name = module, settings, name
        self.checkpoint, self.log = folder / f"{name}.pt", folder / f"{name}.csv"
        parameters = list(module.parameters())
        folder.mkdir(parents=True, exist_ok=True)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in parameters if _decays(p)], "weight_decay": settings.weight_decay},
                {"params": [p for p in parameters if not _decays(p)], "weight_decay": 0.0},
            ],
            betas=(0.9, 0.98),
        )
        self.averaged = {key: value.clone() for key, value in module.state_dict().items()} if settings.ema else None
        self.step = 0
        self.seconds = 0.0
        if self.checkpoint.exists():
            self._resume()

    def run(self, losses_of: Callable[[int], Losses], until: int | None = None) -> None:
        """Steps until `until` (or the end); `losses_of(step)` computes one step's losses on its own data."""
        end = self.settings.steps if until is None else min(until, self.settings.steps)
        saved, started = time.monotonic(), time.monotonic()
        recent: list[dict[str, float]] = []
        with tqdm(total=self.settings.steps, initial=self.step, desc=self.name, mininterval=5, unit="step") as bar:
            while self.step < end:
                losses = self._advance(losses_of)
                recent.append({key: float(value.detach()) for key, value in losses.items()})
                now = time.monotonic()
                self.seconds, started = self.seconds + now - started, now
                bar.update()
                if self.step % self.settings.log_every == 0:
                    means = {key: sum(each[key] for each in recent) / len(recent) for key in losses}
                    bar.set_postfix({key: f"{value:.4f}" for key, value in means.items()}, refresh=False)
                    self._write_log(means)
                    recent = []
                if now - saved > self.settings.checkpoint_seconds:
                    self.save()
                    saved = now
        self.save()

    def save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "module": self.module.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }
        save(self.checkpoint, state)

    def _advance(self, losses_of: Callable[[int], Losses]) -> Losses:
        factor = learning_rate_factor(self.step, self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.settings.learning_rate
        losses = losses_of(self.step)
        self.optimizer.zero_grad(set_to_none=True)
        losses["loss"].backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        self._average()
        return losses

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is None:
            return
        # The decay grows to its full value, so that the first weights do not linger.
        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        own = self.module.state_dict()
        torch._foreach_lerp_(list(self.averaged.values()), [own[key] for key in self.averaged], 1 - decay)

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        if self.averaged is not None:
            for key, value in state["averaged"].items():
                self.averaged[key].copy_(value)

    def _write_log(self, losses: dict[str, float]) -> None:
        fresh = not self.log.exists()
        with self.log.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(["step", "seconds", *losses])
            writer.writerow([self.step, f"{self.seconds:.1f}", *(f"{value:.6g}" for value in losses.values())])


def weights_of(folder: Path, name: str) -> dict[str, Tensor]:
    """The weights a finished or running training would be used with: averaged ones where it keeps them."""
    state = torch.load(folder / f"{name}.pt", weights_only=True, map_location="cpu")
    weights: dict[str, Tensor] = state["averaged"] or state["module"]
    return weights
