"""What every figure of this project states: its raw samples and the machine, versions and commit it was taken on."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from sfrt import machine
from sfrt.metrics import percentiles

_LIBRARIES = ("torch", "triton", "numpy", "onnxruntime", "tensorrt", "flash-attn")


@dataclass(frozen=True)
class Figure:
    """One named figure of the protocol, such as chunk_ms, with all its samples in the unit that its name ends in."""

    name: str
    samples: tuple[float, ...]

    @property
    def percentiles(self) -> dict[str, float]:
        """p50, p95 and p99."""
        return percentiles(self.samples)

    def as_json(self) -> dict[str, Any]:
        return {**self.percentiles, "samples": list(self.samples)}


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


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit, date and load, as far as they can be told. Take it before the run, which is a load."""
    cpu = machine.processor()
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
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


def write(path: Path, surroundings: dict[str, Any], measured: Sequence[tuple[Case, Sequence[Figure]]]) -> None:
    """One JSON file for one run; surroundings are what environment() said before it."""
    cases = [
        {**asdict(case), "figures": {figure.name: figure.as_json() for figure in figures}} for case, figures in measured
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": surroundings, "cases": cases}, indent=1) + "\n")


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty"]
    try:
        git = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
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
