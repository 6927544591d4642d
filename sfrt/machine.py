"""What the system says about this machine; needs no torch, so that it can be told where torch is broken."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Processor:
    """The CPU: its name, the cores this process may use, and what instructions it has (where the system says)."""

    name: str
    cores: int
    flags: frozenset[str]


@dataclass(frozen=True)
class Memory:
    """Main memory in bytes: all of it, and what can be had now without swapping."""

    total: int
    available: int


def processor() -> Processor:
    """This machine's CPU."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    fields = _fields(Path("/proc/cpuinfo"))
    name = fields.get("model name") or platform.processor() or platform.machine()
    return Processor(name, cores, frozenset(fields.get("flags", "").split()))


def memory() -> Memory | None:
    """This machine's memory; None where the system does not say."""
    fields = _fields(Path("/proc/meminfo"))
    if not fields:
        return None
    total, available = (int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    return Memory(total, available)


def peak_memory() -> int | None:
    """The most bytes this program has held in main memory since it began; None where the system does not say.

    Not what getrusage tells, which starts from the peak of the program that started this one.
    """
    peak = _fields(Path("/proc/self/status")).get("VmHWM")
    return None if peak is None else int(peak.split()[0]) * 1024


def resident_memory() -> int | None:
    """Bytes of main memory that this program holds now; None where the system does not say."""
    now = _fields(Path("/proc/self/status")).get("VmRSS")
    return None if now is None else int(now.split()[0]) * 1024


def give_back_memory() -> None:
    """Let the system have what this program has freed; some milliseconds. The C library keeps it otherwise.

    Nothing happens where there is another C library than glibc.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def driver_version() -> str | None:
    """The NVIDIA driver's version from NVML, or from the kernel module's own file; None where there is no driver."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
        return str(nvml.nvmlSystemGetDriverVersion())
    except Exception:  # the binding is optional, and raises its own types where there is no driver
        module = Path("/sys/module/nvidia/version")
        return module.read_text().strip() if module.exists() else None


def version_of(distribution: str) -> str | None:
    """The installed version of a library; None where it is not installed as a package."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _fields(table: Path) -> dict[str, str]:
    """The first value of each name in a table of /proc; empty where there is no such table."""
    if not table.is_file():
        return {}
    fields: dict[str, str] = {}
    for line in table.read_text("utf-8", "replace").splitlines():
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), value.strip())
    return fields
