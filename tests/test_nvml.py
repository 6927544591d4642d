"""What NVML says, of a GPU that is not there: a module of the real one's names and signatures, with numbers of ours."""

from __future__ import annotations

import inspect
import sys
import time
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from sfrt.nvml import LIMITS, Gpu, Reading, Watch, summary_of

UUID = "0f2a6ba6-3a2e-4f5e-9d0c-2b7b1c3d4e5f"


class NVMLError(Exception):
    """As the real one: of no built-in type but Exception."""


def fake(reasons: list[int], refused: tuple[str, ...] = ()) -> ModuleType:
    """A driver with one H200, whose clocks are held for these reasons, one reading after the other."""
    module: Any = ModuleType("pynvml")
    module.NVML_CLOCK_SM, module.NVML_CLOCK_MEM, module.NVML_TEMPERATURE_GPU = 1, 2, 0
    left = list(reasons)

    def nvmlInit() -> None: ...

    def nvmlDeviceGetHandleByUUID(uuid: str) -> str:
        if uuid != f"GPU-{UUID}":
            raise NVMLError("Not Found")
        return "handle"

    def nvmlDeviceGetClockInfo(handle: str, type: int) -> int:
        return {1: 1755, 2: 3201}[type]

    def nvmlDeviceGetMaxClockInfo(handle: str, type: int) -> int:
        return {1: 1980, 2: 3201}[type]

    def nvmlDeviceGetPowerUsage(handle: str) -> int:
        return 650_000

    def nvmlDeviceGetEnforcedPowerLimit(handle: str) -> int:
        return 700_000

    def nvmlDeviceGetTemperature(handle: str, sensor: int) -> int:
        return 61

    def nvmlDeviceGetMemoryInfo(handle: str, version: Any = None) -> Any:
        return SimpleNamespace(total=141 << 30, free=129 << 30, used=12 << 30)

    def nvmlDeviceGetCurrentClocksEventReasons(handle: str) -> int:
        return left.pop(0) if len(left) > 1 else left[0]

    for name, function in list(locals().items()):
        if name.startswith("nvml"):
            setattr(module, name, function)
    for name in refused:

        def refuse(*_: Any) -> Any:
            raise NVMLError("Not Supported")

        setattr(module, name, refuse)
    return module


def test_names_and_bits_are_the_real_ones() -> None:
    real = pytest.importorskip("pynvml")
    for name, function in vars(fake([0])).items():
        if name.startswith("nvml"):
            wanted = list(inspect.signature(getattr(real, name)).parameters)
            assert list(inspect.signature(function).parameters) == wanted, name
        elif name.startswith("NVML_"):
            assert getattr(real, name) == function, name
    known = {name: value for name, value in vars(real).items() if name.startswith("nvmlClocksEventReason")}
    bits = {value for name, value in known.items() if not name.endswith(("None", "All"))}
    assert bits <= LIMITS.keys()


@pytest.mark.parametrize("uuid", [UUID, f"GPU-{UUID}"])
def test_a_reading(uuid: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake([0x4 | 0x20]))
    gpu = Gpu.find(uuid)
    assert gpu is not None
    assert gpu.read() == Reading(1755, 3201, 650.0, 12.0, 61, ("power cap", "thermal slowdown"))
    assert gpu.highest() == {"sm_mhz": 1980, "memory_mhz": 3201, "watts": 700.0}


def test_what_a_driver_refuses_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = ("nvmlDeviceGetPowerUsage", "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetCurrentClocksEventReasons")
    monkeypatch.setitem(sys.modules, "pynvml", fake([0], refused))
    gpu = Gpu.find(UUID)
    assert gpu is not None
    assert gpu.read() == Reading(1755, 3201, None, 12.0, 61, ())
    assert gpu.highest().keys() == {"sm_mhz", "memory_mhz"}
    assert "watts" not in summary_of([gpu.read()])


@pytest.mark.parametrize("module", [None, ModuleType("pynvml"), fake([0], ("nvmlInit",)), fake([0])])
def test_no_gpu_is_no_error(module: ModuleType | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)  # None: it cannot be imported
    gpu = Gpu.find("of another GPU")
    assert gpu is None
    with Watch(gpu) as watch:
        pass
    assert watch.summary() is None and not watch.readings


def test_a_watch_reads_at_both_ends_and_in_between(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake([0x1, 0x0, 0x4]))
    with Watch(Gpu.find(UUID), period_s=1e3) as short:
        pass
    assert len(short.readings) == 2
    with Watch(Gpu.find(UUID), period_s=0.005) as watch:
        deadline = time.monotonic() + 20
        while len(watch.readings) < 5 and time.monotonic() < deadline:
            time.sleep(0.005)
    summary = watch.summary()
    assert summary is not None and summary["readings"] == len(watch.readings) >= 5
    assert summary["sm_mhz"] == {"min": 1755, "median": 1755, "max": 1755}
    assert summary["limited"] == {"power cap": 1.0}
    count = len(watch.readings)
    time.sleep(0.03)
    assert len(watch.readings) == count, "it stops with the work"


def test_a_summary_by_hand() -> None:
    cold, hot = Reading(1000, 2, 100.0, 1.0, 40, ()), Reading(1980, 2, None, 3.0, 80, ("power cap",))
    summary = summary_of([cold, hot, hot])
    assert summary["sm_mhz"] == {"min": 1000, "median": 1980, "max": 1980}
    assert summary["watts"] == {"min": 100.0, "median": 100.0, "max": 100.0}
    assert summary["limited"] == {"power cap": pytest.approx(2 / 3)}


@pytest.mark.gpu
def test_the_gpu_at_hand() -> None:
    pytest.importorskip("pynvml")
    gpu = Gpu.find(str(torch.cuda.get_device_properties(0).uuid))
    assert gpu is not None and gpu.read().used_gib
