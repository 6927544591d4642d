"""The fastest of an op's implementations on the GPU at hand: measured once on the real shapes, then remembered.

What is remembered lies in one small JSON file in the user's cache folder. It is only ever a saving: a file that cannot
be read or written means measuring again.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sfrt import __version__, machine
from sfrt.device import dtype_name
from sfrt.ops.op import Draw, Inputs, Maker, Op, tensors_of
from sfrt.user_cache import user_folder, write_whole

WARM_UPS = 5
RUNS = 10

_LIBRARIES = ("triton", "flash_attn", "flash_attn_3")

Candidates = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Ranking:
    """What came of each candidate: its median time in milliseconds, or in words why it is out."""

    trials: Mapping[str, float | str]

    @property
    def winner(self) -> str:
        """The fastest; of equals the first."""
        times = {name: trial for name, trial in self.trials.items() if not isinstance(trial, str)}
        return min(times, key=times.__getitem__)

    def __str__(self) -> str:
        times = sorted((trial, name) for name, trial in self.trials.items() if not isinstance(trial, str))
        reasons = [f"no {name}: {trial}" for name, trial in self.trials.items() if isinstance(trial, str)]
        return "; ".join([", ".join(f"{name} {trial:.3f} ms" for trial, name in times), *reasons])


class Stopwatch(Protocol):
    """Tells how long what was done between its marks took."""

    def mark(self) -> None:
        """The present, in the order of what was done or queued."""

    def laps(self) -> list[float]:
        """Milliseconds from each mark to the next; waits until they are known."""


class Clock:
    """A stopwatch for what is done when its call returns, by a clock that counts seconds."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._marks: list[float] = []

    def mark(self) -> None:
        self._marks.append(self._clock())

    def laps(self) -> list[float]:
        return [1e3 * (end - start) for start, end in pairwise(self._marks)]


class Events:
    """A stopwatch for what is queued on the current stream of a CUDA device."""

    def __init__(self) -> None:
        self._marks: list[torch.cuda.Event] = []

    def mark(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def laps(self) -> list[float]:
        self._marks[-1].synchronize()
        return [start.elapsed_time(end) for start, end in pairwise(self._marks)]


class Memory:
    """Rankings in a JSON file, by what they depend on; where there is no such place, it remembers nothing."""

    def __init__(self, path: Path | None) -> None:
        self._path = path

    def recall(self, key: str) -> Ranking | None:
        """What was kept under this key; None where there is nothing that makes sense."""
        return _ranking(self._read().get(key))

    def keep(self, key: str, ranking: Ranking) -> None:
        """Add a ranking to what the file holds by now, in one step: no reader ever sees half a file."""
        if self._path is None:
            return
        content = json.dumps(self._read() | {key: dict(ranking.trials)}, indent=1)
        with suppress(OSError):
            write_whole(self._path, content.encode())

    def _read(self) -> dict[str, Any]:
        if self._path is None:
            return {}
        try:
            kept = json.loads(self._path.read_text("utf-8"))
        except (OSError, ValueError, RecursionError):
            return {}
        return kept if isinstance(kept, dict) else {}


def _ranking(kept: object) -> Ranking | None:
    """A ranking as it was kept; None for anything else."""
    if not isinstance(kept, dict) or not all(type(trial) in (float, str) for trial in kept.values()):
        return None
    return Ranking(kept) if any(type(trial) is float for trial in kept.values()) else None


def user_memory() -> Memory:
    """The user's own: fastest.json in their cache folder."""
    folder = user_folder()
    return Memory(None if folder is None else folder / "fastest.json")


def surroundings(device: torch.device) -> dict[str, str]:
    """What else times on a CUDA device depend on: the GPU, its driver, and the versions of what runs on it."""
    versions = {name: machine.version_of(name) or "none" for name in _LIBRARIES}
    return {
        "gpu": torch.cuda.get_device_name(device),
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "driver": machine.driver_version() or "unknown",
        "sfrt": __version__,
        "torch": torch.__version__,
        "cudnn": str(torch.backends.cudnn.version()),
        **versions,
    }


def key_of(op: str, candidates: Sequence[str], inputs: Inputs, around: Mapping[str, str]) -> str:
    """What a ranking is kept under: all that it depends on, as JSON."""
    described = {name: _described(value) for name, value in inputs.items()}
    return json.dumps({"op": op, "candidates": sorted(candidates), "inputs": described, **around}, sort_keys=True)


def _described(value: object) -> str:
    return f"{dtype_name(value.dtype)} {list(value.shape)}" if isinstance(value, Tensor) else repr(value)


def measure(
    op: Op[..., Any], candidates: Candidates, make: Maker, draw: Draw, stopwatch: Callable[[], Stopwatch] = Events
) -> Ranking:
    """Time implementations of an op on inputs that `make` draws, each held against the reference before it may win.

    candidates are those that can be loaded here, the reference among them: what it raises is raised, what others raise
    puts them out.
    """
    inputs = make(draw)
    expected = tensors_of(op.reference(**inputs))
    # Two that are each within the tolerance of the truth are within twice that of each other.
    tolerance = 2 * op.tolerance[draw.dtype]
    trials: dict[str, float | str] = {}
    for name, function in candidates.items():
        try:
            error = max(map(_difference, tensors_of(function(**inputs)), expected))
            wrong = not error <= tolerance  # NaN too
            trials[name] = f"off by {error:.1e}" if wrong else _time(function, inputs, stopwatch())
        except Exception as failure:  # libraries raise what they like
            if function is op.reference:
                raise
            trials[name] = (str(failure).splitlines() or [type(failure).__name__])[0]
    return Ranking(trials)


def _time(function: Callable[..., Any], inputs: Inputs, stopwatch: Stopwatch) -> float:
    for _ in range(WARM_UPS):
        function(**inputs)
    stopwatch.mark()
    for _ in range(RUNS):
        function(**inputs)
        stopwatch.mark()
    return statistics.median(stopwatch.laps())


def _difference(out: Tensor, expected: Tensor) -> float:
    """‖out − expected‖ / ‖expected‖; infinite where they cannot be compared."""
    if (out.shape, out.dtype) != (expected.shape, expected.dtype):
        return float("inf")
    wanted = expected.float()
    return float((out.float() - wanted).norm() / wanted.norm())


def fastest(
    op: Op[..., Any],
    candidates: Candidates,
    make: Maker,
    dtype: torch.dtype,
    device: torch.device,
    *,
    around: Mapping[str, str],
    memory: Memory,
    stopwatch: Callable[[], Stopwatch] = Events,
) -> Ranking:
    """The candidates' ranking on inputs that `make` draws: remembered, else measured now and kept.

    around is what else it depends on. Where it is remembered, nothing is drawn or run on the device.
    """
    key = key_of(op.name, list(candidates), make(Draw(dtype, torch.device("meta"))), around)
    ranking = memory.recall(key)
    if ranking is None or ranking.winner not in candidates:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            ranking = measure(op, candidates, make, Draw(dtype, device), stopwatch)
        memory.keep(key, ranking)
    return ranking
