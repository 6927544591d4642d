"""What every figure of this project states: its raw samples and the machine, versions and commit it was taken on."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sfrt import __version__, machine
from sfrt.config import StreamConfig
from sfrt.metrics import percentiles

_LIBRARIES = ("torch", "triton", "numpy", "onnxruntime", "tensorrt", "flash-attn", "nvidia-ml-py")
_CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Figure:
    """One named figure of the protocol, such as chunk_ms, with all its samples in the unit that its name ends in.

    gpu is what the GPU was doing meanwhile (`sfrt.nvml.Watch.summary`), where it can be asked.
    """

    name: str
    samples: tuple[float, ...]
    gpu: Mapping[str, Any] | None = None

    @property
    def percentiles(self) -> dict[str, float]:
        """p50, p95 and p99."""
        return percentiles(self.samples)

    def as_json(self) -> dict[str, Any]:
        beside = {} if self.gpu is None else {"gpu": self.gpu}
        return {**self.percentiles, "samples": list(self.samples), **beside}


@dataclass(frozen=True)
class Case:
    """What was measured: the settings that a figure is meaningless without."""

    name: str
    model: str
    backend: str
    dtype: str
    device: str
    height: int
    width: int
    chunk: int
    window: int | None
    sink: int
    steps: tuple[float, ...]
    sampler: str
    shift: float
    decoder: str | None


@dataclass(frozen=True)
class Result:
    """A case and its figures.

    stated_bytes is what it was said to take before it ran, by part; stream_ms the latency of each chunk of a stream, in
    order from its first one on.
    """

    case: Case
    figures: tuple[Figure, ...]
    stated_bytes: Mapping[str, int] = field(default_factory=dict)
    stream_ms: tuple[float, ...] = ()

    def figure(self, name: str) -> Figure | None:
        """The figure of this name, if there is one."""
        return next((figure for figure in self.figures if figure.name == name), None)

    def as_json(self) -> dict[str, Any]:
        figures = {figure.name: figure.as_json() for figure in self.figures}
        told = {"stated_bytes": dict(self.stated_bytes), "stream_ms": list(self.stream_ms)}
        return {**asdict(self.case), **{name: value for name, value in told.items() if value}, "figures": figures}


def case_of(
    name: str, model: str, stream: StreamConfig, backend: str, dtype: str, device: str, decoder: str | None
) -> Case:
    """A case of this stream."""
    stated = {
        field: getattr(stream, field)
        for field in ("height", "width", "chunk", "window", "sink", "steps", "sampler", "shift")
    }
    return Case(name=name, model=model, backend=backend, dtype=dtype, device=device, decoder=decoder, **stated)


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit, date and load, as far as they can be told. Take it before the run, which is a load."""
    cpu = machine.processor()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "sfrt": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": f"{cpu.cores} × {cpu.name}",
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version for name in _LIBRARIES if (version := machine.version_of(name))},
        **(_gpu(device) if device.startswith("cuda") else {}),
    }


def forget_peak(device: str) -> None:
    """Begin a case: on a GPU its peak memory counts from here."""
    if device.startswith("cuda"):
        torch.cuda.init()  # resetting needs what other calls make as they come
        torch.cuda.reset_peak_memory_stats(device)


def peak(device: str) -> Figure:
    """Peak memory in GiB: of the case on a GPU, of this process since it began on a CPU."""
    if device.startswith("cuda"):
        return Figure("peak_gib", (torch.cuda.max_memory_allocated(device) / 2**30,))
    return Figure("process_peak_gib", ((machine.peak_memory() or math.nan) / 2**30,))


def write(path: Path, surroundings: Mapping[str, Any], results: Sequence[Result], **beside: Any) -> None:
    """One JSON file for one run; surroundings are what environment() said before it, beside what else is to be said."""
    report = {"environment": surroundings, **beside, "cases": [result.as_json() for result in results]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def _commit() -> str | None:
    """Of the checkout that this file lies in; an installed package may lie in anybody's repository."""
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=_CHECKOUT)
    except OSError:  # no git here
        return None
    return git.stdout.strip() or None


def _gpu(device: str) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "driver": machine.driver_version(),
    }
