"""The gap between training and inference, measured: how rollouts hold out far beyond the length they were trained at.

Models of one size are rolled out on the same held-out prompts and the same noise, to several times the trained length.
Every window of that length is read by itself: does it show what the prompt says, how far are size and colours off, and
how sharp are the edges?
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from statistics import mean, pstdev

from tqdm import tqdm

from sfrt.config import StreamConfig
from sfrt.errors import ConfigError
from sfrt.plot import Line, Panel, write_plot
from sfrt.text import Tokenizer
from sfrt_train import autoencoder
from sfrt_train.model import trained_model
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer
from sfrt_train.watching import Reading, held_out, read_all, watch

_TOGETHER = 40
"""Videos rolled out at once."""
MEASURES = {
    "colour": "right colour",
    "shape": "right shape",
    "direction": "right motion",
    "size_error": "size error",
    "colour_error": "colour error",
    "sharpness": "sharpness",
}
"""The fields of a reading, and what a plot calls them."""


@dataclass(frozen=True)
class Contestant:
    """A stage's model and the stream it is used with."""

    name: str
    stage: str
    stream: StreamConfig


@dataclass(frozen=True)
class Point:
    """The mean over the prompts of one seed, of the window that ends at this many times the trained length."""

    model: str
    seed: int
    times: int
    reading: Reading


def contestants(settings: Settings, folder: Path, listed: Sequence[float] = ()) -> list[Contestant]:
    """All models that were trained in the folder so far, with the few steps listed (by default the stream's).

    Raises ConfigError for steps that the few-step models were not trained for.
    """
    few = replace(settings.stream, steps=tuple(listed) or settings.stream.steps)
    if not set(few.steps) <= set(settings.stream.steps):
        raise ConfigError(f"models are trained for the steps {list(settings.stream.steps)}; {list(listed)} are others")
    steps = len(few.steps)
    many, as_few = settings.euler(settings.many_steps), settings.euler(steps)
    known = [
        Contestant(f"teacher forcing, {len(many.steps)} steps", "teacher_forcing", many),
        Contestant(f"teacher forcing, {steps} steps", "teacher_forcing", as_few),
        Contestant(f"diffusion forcing, {steps} steps", "diffusion_forcing", as_few),
        Contestant(f"regression, {steps} steps", "regression", few),
        Contestant(f"Self Forcing, {steps} steps", "self_forcing", few),
        Contestant(f"Self Forcing, naive rolling, {steps} steps", "naive_rolling", few),
    ]
    return [each for each in known if (folder / f"{each.stage}.pt").exists()]


def measure(
    settings: Settings,
    folder: Path,
    device: str,
    report: Path,
    *,
    prompts: int = 40,
    seeds: int = 3,
    times: int = 10,
    steps: Sequence[float] = (),
) -> str:
    """Roll out every model to `times` times the trained length; returns a table.

    Writes report (JSON: every seed's means), and beside it a .csv of the same and a .png. Every model's seed is a file
    in the folder too, rolled out only where it is missing or older than the model.
    Raises ConfigError as contestants does.
    """
    points = [
        point
        for contestant in contestants(settings, folder, steps)
        for seed in range(seeds)
        for point in _points_of(settings, folder, device, contestant, seed, prompts, times)
    ]
    report.parent.mkdir(parents=True, exist_ok=True)
    trained = settings.clips.chunks * settings.stream.chunk
    head = {"prompts": prompts, "seeds": seeds, "trained_latent_frames": trained}
    rows = [{"model": p.model, "seed": p.seed, "times": p.times, **asdict(p.reading)} for p in points]
    report.write_text(json.dumps({**head, "means": rows}, indent=1) + "\n")
    with report.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    write_plot(report.with_suffix(".png"), panels(points, trained), "latent frames")
    return table(points)


def _points_of(
    settings: Settings, folder: Path, device: str, contestant: Contestant, seed: int, prompts: int, times: int
) -> list[Point]:
    """One model, one seed: a point for every window."""
    path = folder / "gap" / f"{contestant.name}, seed {seed}, {prompts} prompts, {times} times.json"
    made_from = [folder / f"{stage}.pt" for stage in (contestant.stage, "sharpening")]
    if not path.exists() or path.stat().st_mtime < max(each.stat().st_mtime for each in made_from):
        means = _measure_one(settings, folder, device, contestant, seed, prompts, times)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps([asdict(mean) for mean in means]))
        os.replace(partial, path)
    means = [Reading(**mean) for mean in json.loads(path.read_text())]
    return [Point(contestant.name, seed, number, mean) for number, mean in enumerate(means, start=1)]


def _measure_one(
    settings: Settings, folder: Path, device: str, contestant: Contestant, seed: int, prompts: int, times: int
) -> list[Reading]:
    """The means of every window."""
    model = trained_model(settings, folder, contestant.stage, device)
    decoder = autoencoder.load(settings, folder, device, "sharpening")
    tokenizer = Tokenizer(make_tokenizer(settings, folder), settings.transformer.text_len)
    asked, ids = held_out(settings, tokenizer, prompts, seed)
    found: list[list[Reading]] = [[] for _ in range(times)]
    with tqdm(total=times * -(-prompts // _TOGETHER), desc=f"{contestant.name}, seed {seed}", mininterval=5) as bar:
        for start in range(0, prompts, _TOGETHER):
            some = slice(start, start + _TOGETHER)
            windows = watch(settings, model, decoder, contestant.stream, ids[some].to(device), seed, times)
            for readings, videos in zip(found, windows, strict=True):
                readings += read_all(videos, asked[some])
                bar.update()
    return [mean_of(each) for each in found]


def mean_of(readings: list[Reading]) -> Reading:
    """Field by field."""
    return Reading(*(mean(getattr(each, field.name) for each in readings) for field in fields(Reading)))


def panels(points: list[Point], trained: int) -> list[Panel]:
    """A panel for each measure, from zero, a line for each model: the mean over the seeds, and their spread."""
    made = []
    for measure_name, title in MEASURES.items():
        lines = []
        for model in dict.fromkeys(point.model for point in points):
            values = _by_times(points, model, measure_name)
            ends = [trained * times for times in values]
            lines.append(
                Line(model, ends, [mean(each) for each in values.values()], list(map(pstdev, values.values())))
            )
        made.append(Panel(title, lines, from_zero=True))  # else a spread of the seeds would look like a drift
    return made


def table(points: list[Point]) -> str:
    """Every model at 1, 2, 5, 10 … times the trained length: mean ± spread over the seeds; shares in per cent."""
    last = max(point.times for point in points)
    lines = [f"| model | length | {' | '.join(MEASURES.values())} |", "| --- " * (2 + len(MEASURES)) + "|"]
    for model in dict.fromkeys(point.model for point in points):
        for times in sorted({times for times in (1, 2, 5, 10, last) if times <= last}):
            cells = []
            for name in MEASURES:
                values = _by_times(points, model, name)[times]
                cells.append(f"{100 * mean(values):.1f} ± {100 * pstdev(values):.1f}")
            lines.append(f"| {model} | {times}× | {' | '.join(cells)} |")
    return "\n".join(lines)


def _by_times(points: list[Point], model: str, measure_name: str) -> dict[int, list[float]]:
    """A model's values of all seeds, by length."""
    found: dict[int, list[float]] = {}
    for point in points:
        if point.model == model:
            found.setdefault(point.times, []).append(getattr(point.reading, measure_name))
    return found
