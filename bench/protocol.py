"""What every figure of this project states: its raw samples and the machine, versions and commit it was taken on."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import resource
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

RESULTS = Path(__file__).parent / "results"
_LIBRARIES = ("torch", "triton", "numpy", "onnxruntime", "tensorrt", "flash-attn")


@dataclass(frozen=True)
class Figure:
    """One named figure of the protocol, such as chunk_ms, with all its samples in the unit that its name ends in."""

    name: str
    samples: tuple[float, ...]

    def quantile(self, share: float) -> float:
        return float(np.quantile(self.samples, share))

    def as_json(self) -> dict[str, Any]:
        quantiles = {f"p{round(share * 100)}": self.quantile(share) for share in (0.5, 0.95, 0.99)}
        return {**quantiles, "samples": list(self.samples)}


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
    shift: float
    decoder: str | None


def environment(device: str) -> dict[str, Any]:
    """Machine, versions, commit and date, as far as they can be told."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "load_before": os.getloadavg()[0],
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        **(_gpu() if device.startswith("cuda") else {}),
    }


def peak_gib(device: str) -> float:
    """Peak memory in GiB: of the device on a GPU, of this process on a CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write(path: Path, device: str, measured: Sequence[tuple[Case, Sequence[Figure]]]) -> None:
    """One JSON file for one run."""
    cases = [
        {**asdict(case), "figures": {figure.name: figure.as_json() for figure in figures}} for case, figures in measured
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(device), "cases": cases}, indent=1) + "\n")


def _commit() -> str | None:
    git = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent)
    return git.stdout.strip() or None


def _cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        if cpuinfo.is_file()
        else []
    )
    return f"{len(os.sched_getaffinity(0))} × {names[0].split(':')[1].strip()}" if names else platform.processor()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    told: dict[str, Any] = {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}"}
    try:
        import pynvml

        pynvml.nvmlInit()
        told["driver"] = pynvml.nvmlSystemGetDriverVersion()
    except (ImportError, pynvml.NVMLError):
        told["driver"] = None
    return told
