"""`python -m bench.endless --json FILE`: what ten thousand chunks of the built-in model do to memory, time and picture.

One long stream says whether memory stays and chunks take as long at the end as at the beginning, and whether the ring
shows: the change from one pixel frame to the next is compared where the ring begins a new turn, at the other borders of
chunks, and within chunks. Shorter streams of several held-out scenes, one set for each way to roll, say how much of
what was asked for is still seen late, read from the pixels of single chunks (sfrt_train.reader).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from bench.switching import read as read_frames
from bench.switching import right
from sfrt import Runtime
from sfrt.benchmark.protocol import case_of, environment
from sfrt.config import Positions, StreamConfig
from sfrt.metrics import percentiles
from sfrt_train.data import Scene, plain, split_scenes
from sfrt_train.settings import Settings

WAYS: tuple[tuple[Positions, int], ...] = (("absolute", 0), ("absolute", 3), ("window", 3))
"""Positions and sinks. Without sinks no distance in view ever changes, and both positions give the same video."""
BLOCK = 1000
READ_EVERY = 20


Samples = npt.NDArray[np.float64]


class Log:
    """One stream: of each chunk, its wall and processor milliseconds and the changes of its frames, in 8-bit steps.

    border is the mean change from the last frame of the chunk before, within that from frame to frame. rss is that of
    the process in MiB, every READ_EVERY chunks; right, whether the chunk read there shows what was asked for. All of it
    is filled in advance, so that no growth of the process is that of its log.
    """

    def __init__(self, chunks: int) -> None:
        self.chunk_ms, self.cpu_ms, self.border, self.within = np.full((4, chunks), np.nan)
        self.rss, self.right = np.full((2, chunks // READ_EVERY), np.nan)


def run(runtime: Runtime, stream: StreamConfig, scene: Scene, chunks: int, seed: int) -> Log:
    """A stream of so many chunks."""
    log, last = Log(chunks), None
    with runtime.session(plain(scene), seed=seed, stream=stream) as session:
        for number in tqdm(range(chunks), desc=f"{stream.positions}, sink {stream.sink}", mininterval=10):
            began = time.process_time()
            chunk = next(session)
            log.cpu_ms[number] = (time.process_time() - began) * 1e3
            log.chunk_ms[number] = chunk.timings.chunk_ms
            frames = chunk.frames.astype(np.int16)
            log.within[number] = np.abs(np.diff(frames, axis=0)).mean()
            if last is not None:
                log.border[number] = np.abs(frames[0] - last).mean()
            last = frames[-1]
            if number % READ_EVERY == READ_EVERY - 1:
                log.rss[number // READ_EVERY] = resident_mib()
                log.right[number // READ_EVERY] = right(scene, read_frames(chunk.frames), "both")
    return log


def resident_mib() -> float:
    """Main memory that this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def summary(log: Log, stream: StreamConfig) -> dict[str, Any]:
    """By blocks of a thousand chunks: time, memory, what is right; and the changes of frames, by where they are."""
    blocks = [slice(start, start + BLOCK) for start in range(0, len(log.chunk_ms), BLOCK)]
    reads = [slice(block.start // READ_EVERY, block.stop // READ_EVERY) for block in blocks]
    return {
        "chunks": len(log.chunk_ms),
        "chunk_ms": [percentiles(log.chunk_ms[block].tolist()) for block in blocks],
        "cpu_ms": [percentiles(log.cpu_ms[block].tolist()) for block in blocks],
        "rss_mib": [float(log.rss[block].mean()) for block in reads],
        "right": [float(log.right[block].mean()) for block in reads],
        "frame_change": seams(log, stream),
    }


def seams(log: Log, stream: StreamConfig) -> dict[str, Any]:
    """Mean changes from frame to frame, with the standard errors of those at borders, once the window rolls.

    A turn of the ring is as many chunks as its rolling region holds; its first chunk begins at the first slot there.
    """
    assert stream.window is not None
    turn = (stream.window - stream.sink) // stream.chunk
    first = 2 * stream.window // stream.chunk
    borders = log.border
    kept = np.arange(first, len(borders))
    starts = (kept - stream.sink // stream.chunk) % turn == 0
    by_place = {"where_a_turn_begins": borders[kept[starts]], "at_other_borders": borders[kept[~starts]]}
    means = {name: {"mean": float(part.mean()), "error": error(part)} for name, part in by_place.items()}
    return {**means, "within_chunks": float(log.within[first:].mean())}


def error(samples: Samples) -> float:
    """The standard error of a mean."""
    return float(samples.std() / max(1, len(samples)) ** 0.5)


def late(runtime: Runtime, scenes: Sequence[Scene], chunks: int) -> list[dict[str, Any]]:
    """How much is right by quarters of the stream, for each way to roll."""
    rows = []
    for positions, sink in WAYS:
        stream = replace(runtime.stream, positions=positions, sink=sink)
        logs = [run(runtime, stream, scene, chunks, seed) for seed, scene in enumerate(scenes)]
        quarters = np.array_split(np.stack([log.right for log in logs]), 4, axis=1)
        shares = [float(quarter.mean()) for quarter in quarters]
        change = [seams(log, stream) for log in logs]
        row: dict[str, Any] = {"positions": positions, "sink": sink, "right_by_quarter": shares}
        for place in ("where_a_turn_begins", "at_other_borders"):
            row[place] = mean(one[place]["mean"] for one in change)
        rows.append({**row, "within_chunks": mean(one["within_chunks"] for one in change)})
        print(json.dumps(rows[-1]))
    return rows


def main() -> None:
    """Run the long stream and the shorter ones, and write what they came to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--chunks", type=int, default=10_000, help="of the long stream")
    parser.add_argument("--scenes", type=int, default=6, help="streams of each way to roll")
    parser.add_argument("--late", type=int, default=160, help="chunks of each of those")
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()
    surroundings = environment("cpu")
    runtime = Runtime(device="cpu", backend=arguments.backend)
    settings = Settings()
    _, held_out = split_scenes(settings.held_out, settings.seed)
    scenes = held_out[: arguments.scenes]
    decoder = runtime.manifest.decoder
    names = (runtime.backend, "float32", "cpu")
    kind = decoder.kind if decoder else None
    case = case_of("endless", runtime.manifest.name, runtime.stream, *names, decoder=kind)
    report: dict[str, Any] = {"environment": surroundings, "case": asdict(case), "scenes": [*map(plain, scenes)]}
    report["ways"] = late(runtime, scenes, arguments.late)
    log = run(runtime, runtime.stream, scenes[0], arguments.chunks, seed=1)
    report["long"] = summary(log, runtime.stream)
    print(json.dumps(report["long"], indent=1))
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
