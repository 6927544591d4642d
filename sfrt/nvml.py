"""What NVIDIA's management library (NVML) says of a GPU while it works: clocks, power, memory, heat, and what holds it.

nvidia-ml-py is optional: without it, without a driver or under one that does not say, there is simply less to read.
"""

from __future__ import annotations

import importlib
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from threading import Event, Thread
from types import TracebackType
from typing import Any

PERIOD_S = 0.2
"""Between two readings: each is some calls into the driver, far below a millisecond of a core."""

LIMITS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown",
    0x40: "hardware thermal slowdown",
    0x80: "hardware power brake",
    0x100: "display clocks",
}
"""The bits of nvmlClocksEventReasons: why clocks are not the highest."""


@dataclass(frozen=True)
class Reading:
    """One moment of a GPU; None where the driver does not say. Used memory is that of all processes."""

    sm_mhz: int | None
    memory_mhz: int | None
    watts: float | None
    used_gib: float | None
    celsius: int | None
    limits: tuple[str, ...]


class Gpu:
    """One GPU, to be asked."""

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml = nvml
        self._handle = handle

    @classmethod
    def find(cls, uuid: str) -> Gpu | None:
        """That of this UUID, as CUDA gives it; None where NVML cannot be asked.

        By UUID, because CUDA may have been shown some of a machine's GPUs only, and numbers those itself.
        """
        try:
            nvml = importlib.import_module("pynvml")
            nvml.nvmlInit()
            name = uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}"
            return cls(nvml, nvml.nvmlDeviceGetHandleByUUID(name))
        except Exception:  # the binding raises types of its own
            return None

    def read(self) -> Reading:
        """This moment."""
        nvml, handle = self._nvml, self._handle
        used = _asked(lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used)
        milliwatts = _asked(lambda: nvml.nvmlDeviceGetPowerUsage(handle))
        reasons = _asked(lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle)) or 0
        return Reading(
            sm_mhz=_asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            memory_mhz=_asked(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            watts=None if milliwatts is None else milliwatts / 1e3,
            used_gib=None if used is None else used / 2**30,
            celsius=_asked(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            limits=tuple(name for bit, name in LIMITS.items() if reasons & bit),
        )

    def highest(self) -> dict[str, float]:
        """The highest clocks and the power limit, as far as the driver says."""
        nvml, handle = self._nvml, self._handle
        milliwatts = _asked(lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        found = {
            "sm_mhz": _asked(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "memory_mhz": _asked(lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "watts": None if milliwatts is None else milliwatts / 1e3,
        }
        return {name: value for name, value in found.items() if value is not None}


class Watch:
    """A context in which a GPU is read by a thread beside the work: once at its beginning and end, and in between."""

    def __init__(self, gpu: Gpu | None, period_s: float = PERIOD_S) -> None:
        """Without a GPU nothing is read."""
        self.readings: list[Reading] = []
        self._gpu = gpu
        self._period_s = period_s
        self._ended = Event()
        self._thread: Thread | None = None

    def __enter__(self) -> Watch:
        if self._gpu is not None:
            self.readings.append(self._gpu.read())
            self._thread = Thread(target=self._run, args=(self._gpu,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()

    def _run(self, gpu: Gpu) -> None:
        while not self._ended.wait(self._period_s):
            self.readings.append(gpu.read())
        self.readings.append(gpu.read())

    def summary(self) -> dict[str, Any] | None:
        """Lowest, median and highest of what was read, and the share of readings that each limit was seen in.

        None where nothing was read.
        """
        return summary_of(self.readings) if self.readings else None


def summary_of(readings: Sequence[Reading]) -> dict[str, Any]:
    """As Watch.summary, of one reading at least."""
    rows = [asdict(reading) for reading in readings]
    limits = Counter(limit for reading in readings for limit in reading.limits)
    summary: dict[str, Any] = {"readings": len(readings)}
    for name in ("sm_mhz", "memory_mhz", "watts", "used_gib", "celsius"):
        values = [row[name] for row in rows if row[name] is not None]
        if values:
            summary[name] = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {**summary, "limited": {limit: count / len(readings) for limit, count in limits.items()}}


def _asked(question: Callable[[], Any]) -> Any:
    """The answer, or None where this GPU or its driver has none."""
    try:
        return question()
    except Exception:  # NVMLError, whose types the binding makes as it is imported
        return None
