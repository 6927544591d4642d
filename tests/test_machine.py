"""What the system says, and what is said where it says nothing."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from sfrt import machine


def test_here() -> None:
    here = machine.processor()
    assert here.name and here.cores >= 1
    if memory := machine.memory():
        assert 0 < memory.available <= memory.total
    assert machine.version_of("numpy") == np.__version__
    assert machine.version_of("a-library-that-nobody-wrote") is None


def test_the_first_core_speaks_for_all(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast: 3\n\nprocessor\t: 1\nmodel name\t: Slow\n")
    assert machine._fields(tmp_path / "cpuinfo") == {"processor": "0", "model name": "Fast: 3"}


def test_without_the_tables_of_linux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = machine._fields(tmp_path / "cpuinfo")
    monkeypatch.setattr(machine, "_fields", lambda table: missing)
    assert machine.memory() is None
    assert machine.processor().name == (platform.processor() or platform.machine())
    assert machine.processor().flags == frozenset()


def test_a_driver_library_that_fails_is_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    module = Path("/sys/module/nvidia/version")
    monkeypatch.setitem(sys.modules, "pynvml", ModuleType("pynvml"))  # installed, but nothing works
    assert machine.driver_version() == (module.read_text().strip() if module.exists() else None)


def test_peak_memory_is_this_programs_own() -> None:
    peak = machine.peak_memory()
    if peak is None:
        pytest.skip("the system does not say")
    script = "from sfrt.machine import peak_memory; print(peak_memory())"
    np.ones(256 << 20, np.uint8)  # a program started from here does not inherit this peak
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 1 << 20 < int(child.stdout) < 256 << 20 <= (machine.peak_memory() or 0)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what is freed as it likes")
def test_what_was_freed_is_given_back() -> None:
    """Pieces too small to be mapped each by itself, below one that stays."""
    pieces = [bytearray(100_000) for _ in range(400)]
    held, stays = machine.resident_memory(), pieces.pop()
    assert held is not None
    del pieces
    machine.give_back_memory()
    left = machine.resident_memory()
    assert left is not None and held - left > 25 << 20
    assert stays[0] == 0
