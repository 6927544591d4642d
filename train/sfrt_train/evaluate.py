"""Does the model do what the prompt says? Held-out prompts through the real runtime, read back from the pixels."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from sfrt import Runtime
from sfrt_train.data import SHAPES, Scene, say, split_scenes
from sfrt_train.reader import read_scene
from sfrt_train.settings import Settings

CHUNKS = 5


@dataclass(frozen=True)
class Result:
    """One prompt, what it asked for and what the pixels showed."""

    prompt: str
    seed: int
    asked: Scene
    seen: Scene

    def right(self, *parts: str) -> bool:
        return all(getattr(self.asked, part) == getattr(self.seen, part) for part in parts)


COLUMNS: dict[str, tuple[str, ...]] = {
    "colour": ("colour", "background"),
    "shape": ("shape",),
    "direction": ("motion",),
    "all three": ("colour", "background", "shape", "motion"),
}
"""A column of the table and the parts of a scene that must all be right for it; colour means object and background."""


def evaluate(
    settings: Settings, model: Path | None, device: str, prompts: int = 200, skip: int = 0, report: Path | None = None
) -> str:
    """Roll out `prompts` held-out prompts, each with a seed of its own, and read the chunks after the first `skip`.

    model is a bundle, None the built-in one. Returns the table; writes every single result to `report` as JSON.
    """
    runtime = Runtime(model, device=device)
    _, scenes = split_scenes(settings.held_out, settings.seed)
    results = []
    for i in tqdm(range(prompts), desc="evaluate", unit="prompt"):
        scene = scenes[i % len(scenes)]
        prompt = say(scene, np.random.default_rng((settings.seed, 6, i)))
        with runtime.session(prompt, seed=i, limit=skip + CHUNKS) as session:
            frames = [chunk.frames for chunk in session][skip:]
        results.append(Result(prompt, i, scene, read_scene(_pixels(frames))))
    if report is not None:
        report.parent.mkdir(parents=True, exist_ok=True)
        report.write_text(json.dumps(summary(results, skip), indent=1) + "\n")
    return table(results)


def table(results: list[Result]) -> str:
    """Shares of right answers in per cent: all prompts, then by shape and by motion."""
    lines = [f"| prompts | count | {' | '.join(COLUMNS)} |", "| --- | --- |" + " --- |" * len(COLUMNS)]
    for name, group in groups(results).items():
        shares = " | ".join(f"{100 * share:.1f}" for share in _shares(group).values())
        lines.append(f"| {name} | {len(group)} | {shares} |")
    return "\n".join(lines)


def summary(results: list[Result], skip: int) -> dict[str, object]:
    """The shares of the table and every single result, as JSON takes it."""
    return {
        "prompts": len(results),
        "chunks_read": CHUNKS,
        "chunks_skipped": skip,
        "share_right": {name: _shares(group) for name, group in groups(results).items()},
        "results": [asdict(result) for result in results],
    }


def groups(results: list[Result]) -> dict[str, list[Result]]:
    """All results, and those of each shape and each motion."""
    tests: dict[str, Callable[[Result], bool]] = {"all": lambda result: True}
    tests |= {shape: lambda result, shape=shape: result.asked.shape == shape for shape in SHAPES}  # type: ignore[misc]
    motions = dict.fromkeys(sorted(result.asked.motion for result in results))
    tests |= {name: lambda result, name=name: result.asked.motion == name for name in motions}  # type: ignore[misc]
    picked = {name: [result for result in results if test(result)] for name, test in tests.items()}
    return {name: group for name, group in picked.items() if group}


def _shares(results: list[Result]) -> dict[str, float]:
    return {name: sum(r.right(*parts) for r in results) / len(results) for name, parts in COLUMNS.items()}


def _pixels(frames: list[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate(frames)).permute(0, 3, 1, 2).float() / 255
