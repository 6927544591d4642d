"""`python -m bench.switching --json FILE`: does the built-in model show what it is told while it runs, and how soon?

A stream of a held-out scene runs until its window has rolled; then its prompt is switched, in every way that there is,
to a scene of another colour, of another shape, or another one altogether. What the coming chunks show is read from
their pixels (sfrt_train.reader), each by itself. Two controls say how much of what is missing has nothing to do with
switching: the same prompts from the start of a stream, and true clips of the same scenes that went through the model's
autoencoder, which no model behind it can do better than.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from sfrt import Runtime
from sfrt.benchmark.protocol import Figure, case_of, environment
from sfrt.config import Positions, StreamConfig
from sfrt.switching import How
from sfrt_train.data import COLOURS, SHAPES, Scene, chunk_lengths, make_clip, plain, say, split_scenes
from sfrt_train.reader import read_scene
from sfrt_train.settings import Settings

CHANGES = ("colour", "shape", "all")
LOOKED_AT = 3
"""Chunks that are read after a switch."""
IN_TIME = 2
"""Chunks within which it has to show."""
SHOWN = f"shown_within_{IN_TIME}_chunks"
PARTS = {"colours": ("colour", "background"), "shape": ("shape",), "both": ("colour", "background", "shape")}
WAYS: dict[str, tuple[How, int]] = {"recache": ("recache", 1), "cross": ("cross", 1), "blend": ("blend", 2)}


@dataclass(frozen=True)
class Trial:
    """One switch; the target may differ from the start in a part of the scene or in all of them.

    readable says whether a true clip of the target is still read as such behind the autoencoder.
    """

    changed: str
    start: str
    target: str
    scene: Scene
    seed: int
    readable: bool


@dataclass(frozen=True)
class Outcome:
    """What the chunks after a switch showed, and milliseconds: of the receipt, and from the switch to each of them."""

    trial: Trial
    seen: tuple[Scene, ...]
    receipt_ms: float
    chunk_ms: tuple[float, ...]

    def shown(self, part: str) -> int | None:
        """How many chunks it took until this showed; None where it did not."""
        return next((number for number, seen in enumerate(self.seen, 1) if right(self.trial.scene, seen, part)), None)

    def in_time(self, part: str) -> bool:
        return (self.shown(part) or LOOKED_AT) <= IN_TIME

    @property
    def switch_ms(self) -> float | None:
        """From the switch to the first frames that show all of it."""
        shown = self.shown("both")
        return None if shown is None else self.chunk_ms[shown - 1]


def trials(runtime: Runtime, count: int) -> list[Trial]:
    """So many, a third of each change, over held-out scenes."""
    settings = Settings()
    _, scenes = split_scenes(settings.held_out, settings.seed)
    made = []
    for number in range(count):
        rng = np.random.default_rng((settings.seed, 11, number))
        changed = CHANGES[number % len(CHANGES)]
        first, other = (scenes[int(i)] for i in rng.choice(len(scenes), 2, replace=False))
        if changed == "colour":
            free = [name for name in COLOURS if name not in (first.colour, first.background)]
            other = replace(first, colour=str(rng.choice(free)))
        elif changed == "shape":
            other = replace(first, shape=str(rng.choice([name for name in SHAPES if name != first.shape])))
        prompts = say(first, rng), say(other, rng)
        made.append(Trial(changed, *prompts, other, number, readable(runtime, other, rng)))
    return made


def right(asked: Scene, seen: Scene, part: str) -> bool:
    """Whether this part of the scene is as it was asked for."""
    return all(getattr(asked, name) == getattr(seen, name) for name in PARTS[part])


def read(frames: npt.NDArray[np.uint8]) -> Scene:
    """What a chunk's frames show by themselves."""
    return read_scene(torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255)


def readable(runtime: Runtime, scene: Scene, rng: np.random.Generator) -> bool:
    """Whether a true clip of the scene that went through the autoencoder is read as such, by the rule of a switch."""
    clip = make_clip(rng, [scene], 1 + IN_TIME)
    with runtime.session(plain(scene), initial=clip.pixels) as session:
        assert session.initial_frames is not None
        chunks = np.split(session.initial_frames, np.cumsum(chunk_lengths(1 + IN_TIME, 3))[:-1])
    return any(right(scene, read(frames), "both") for frames in chunks[1:])


def switched(runtime: Runtime, trial: Trial, way: str, stream: StreamConfig, before: int) -> Outcome:
    """One trial, after so many chunks of the first prompt."""
    how, over = WAYS[way]
    with runtime.session(trial.start, seed=trial.seed, stream=stream) as session:
        list(itertools.islice(session, before))
        session.refresh()
        began = time.perf_counter()
        session.switch(trial.target, how, over)
        chunks, ms = [], []
        for chunk in itertools.islice(session, LOOKED_AT):
            ms.append((time.perf_counter() - began) * 1e3)
            chunks.append(chunk)
    assert chunks[0].receipt is not None
    return Outcome(trial, tuple(read(chunk.frames) for chunk in chunks), chunks[0].receipt.ms, tuple(ms))


def from_the_start(runtime: Runtime, trial: Trial, stream: StreamConfig, before: int) -> bool:
    """Whether the target's own stream shows it in either of two chunks, as far on as after a switch."""
    with runtime.session(trial.target, seed=trial.seed, stream=stream, limit=before + IN_TIME) as session:
        return any(right(trial.scene, read(chunk.frames), "both") for chunk in list(session)[before:])


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Shares of the switches that showed in time, by what is looked for and what was changed, and the milliseconds."""
    groups = {"every switch": outcomes, "readable": [one for one in outcomes if one.trial.readable]}
    groups |= {f"{name} changed": [one for one in outcomes if one.trial.changed == name] for name in CHANGES}
    return {
        SHOWN: {
            name: {"switches": len(group)} | {part: mean(one.in_time(part) for one in group) for part in PARTS}
            for name, group in groups.items()
        },
        "shown_in_the_first_chunk": {part: mean(one.shown(part) == 1 for one in outcomes) for part in PARTS},
        "receipt_ms": Figure("receipt_ms", tuple(one.receipt_ms for one in outcomes)).as_json(),
        "switch_ms": Figure("switch_ms", tuple(one.switch_ms for one in outcomes if one.switch_ms)).as_json(),
        "missed": [asdict(one) for one in outcomes if not one.in_time("both")],
    }


def main() -> None:
    """Measure, print the shares, and write them all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--count", type=int, default=60, help="switches of each way")
    parser.add_argument("--before", type=int, default=4, help="chunks before the switch")
    parser.add_argument("--positions", choices=get_args(Positions))
    parser.add_argument("--sink", type=int)
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()
    runtime = Runtime(device="cpu", backend=arguments.backend)
    stream = runtime.stream
    stream = replace(
        stream,
        positions=arguments.positions or stream.positions,
        sink=stream.sink if arguments.sink is None else arguments.sink,
    )
    report: dict[str, Any] = {"environment": environment("cpu")}
    decoder = runtime.manifest.decoder
    names = (runtime.backend, "float32", "cpu")
    case = case_of("switching", runtime.manifest.name, stream, *names, decoder=decoder.kind if decoder else None)
    report |= {"case": asdict(case), "positions": stream.positions, "chunks_before": arguments.before}
    chosen = trials(runtime, arguments.count)
    report["readable_behind_the_autoencoder"] = mean(trial.readable for trial in chosen)
    report["right_from_the_start"] = mean(
        from_the_start(runtime, trial, stream, arguments.before) for trial in tqdm(chosen, desc="from the start")
    )
    print(", ".join(f"{name} {report[name]:.1%}" for name in list(report)[-2:]))
    for way in WAYS:
        outcomes = [switched(runtime, trial, way, stream, arguments.before) for trial in tqdm(chosen, desc=way)]
        report[way] = summary(outcomes)
        for group, shares in report[way][SHOWN].items():
            print(f"{way:8} {group:16} " + ", ".join(f"{part} {shares[part]:.1%}" for part in PARTS))
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
