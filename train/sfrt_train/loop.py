"""The loop that all trainings share: resumable, seeded, with a progress bar, a CSV log and a plot of it.

Every step draws its data from a generator made of (seed, step) alone, so a run that was stopped and resumed goes on
exactly as one that was not.
"""

from __future__ import annotations

import csv
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from sfrt_train.plot import plot_log

Losses = dict[str, Tensor]
"""Named scalars of one step; the one called "loss" is descended."""


@dataclass(frozen=True)
class LoopSettings:
    """How long to train, and how the learning rate goes up and down."""

    steps: int
    warmup: int
    decay: float = 1.0
    """Share of the steps, at the end, in which the learning rate goes down."""
    checkpoint_seconds: float = 60.0
    log_every: int = 20


@dataclass(frozen=True)
class Descent:
    """AdamW's settings, and the averaging of weights."""

    learning_rate: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.98)
    ema: float = 0.0
    """Decay of the averaged weights; 0 keeps none."""
    ema_from: int = 0
    """The update from which on they are averaged; until then they are the newest."""


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


class Trainee:
    """A module with its optimizer and, where asked for, its averaged weights."""

    def __init__(self, module: nn.Module, descent: Descent) -> None:
        self.module, self.descent = module, descent
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices, vectors = [p for p in trained if p.ndim > 1], [p for p in trained if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": descent.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            betas=descent.betas,
        )
        self.averaged = {key: value.clone() for key, value in module.state_dict().items()} if descent.ema else None
        self.updates = 0

    def descend(self, loss: Tensor, factor: float) -> None:
        """One update against the loss' gradient; factor scales the learning rate."""
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.descent.learning_rate
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.updates += 1
        self._average()

    @torch.no_grad()
    def _average(self) -> None:
        if self.averaged is None:
            return
        # The decay grows to its full value, so that the first weights do not linger.
        averages = max(0, self.updates - self.descent.ema_from)
        decay = min(self.descent.ema, (1 + averages) / (10 + averages)) if averages else 0.0
        own = self.module.state_dict()
        torch._foreach_lerp_(list(self.averaged.values()), [own[key] for key in self.averaged], 1 - decay)

    def state(self) -> dict[str, Any]:
        """All there is to go on from."""
        return {
            "updates": self.updates,
            "module": self.module.state_dict(),
            "averaged": self.averaged,
            "optimizer": self.optimizer.state_dict(),
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.updates = state["updates"]
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.averaged is not None:
            for key, value in state["averaged"].items():
                self.averaged[key].copy_(value)


class Loop:
    """Trains to `settings.steps` steps, from its checkpoint where there is one.

    model is what the training is for; beside are others that are trained with it, by name.
    """

    def __init__(
        self,
        model: Trainee,
        settings: LoopSettings,
        folder: Path,
        name: str,
        beside: Mapping[str, Trainee] | None = None,
    ) -> None:
        self.model, self.beside, self.settings, self.name = model, beside or {}, settings, name
        self.checkpoint, self.log = folder / f"{name}.pt", folder / f"{name}.csv"
        folder.mkdir(parents=True, exist_ok=True)
        self.step = 0
        self.seconds = 0.0
        if self.checkpoint.exists():
            self._resume()

    def descend(self, losses_of: Callable[[int], Losses], until: int | None = None) -> None:
        """Steps until `until` (or the end); `losses_of(step)` computes one step's losses on its own data."""

        def advance(step: int, factor: float) -> Losses:
            losses = losses_of(step)
            self.model.descend(losses["loss"], factor)
            return losses

        self.run(advance, until)

    def run(self, advance: Callable[[int, float], Losses], until: int | None = None) -> None:
        """The same where a step is more than one update: `advance(step, factor)` makes them all.

        factor is that of the learning rates.
        """
        end = self.settings.steps if until is None else min(until, self.settings.steps)
        saved, started = time.monotonic(), time.monotonic()
        recent: list[dict[str, float]] = []
        with tqdm(total=self.settings.steps, initial=self.step, desc=self.name, mininterval=5, unit="step") as bar:
            while self.step < end:
                losses = advance(self.step, learning_rate_factor(self.step, self.settings))
                self.step += 1
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
        if self.log.exists():
            plot_log(self.log)

    def save(self) -> None:
        """Write the checkpoint."""
        beside = {name: trainee.state() for name, trainee in self.beside.items()}
        save(self.checkpoint, {"step": self.step, "seconds": self.seconds, **self.model.state(), "beside": beside})

    def _resume(self) -> None:
        state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.resume(state)
        for name, trainee in self.beside.items():
            trainee.resume(state["beside"][name])

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
