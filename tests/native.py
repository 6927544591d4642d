"""Building csrc/ in a test."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"


def build_library(compiler: Sequence[str], sources: Iterable[Path], folder: Path) -> Path:
    """A shared library of these sources, in `folder`; each is compiled by a process of its own."""

    def run(*arguments: object) -> None:
        done = subprocess.run([*compiler, *map(str, arguments)], capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stderr[:4000]

    def compiled(source: Path) -> Path:
        run("-c", source, "-o", folder / f"{source.stem}.o")
        return folder / f"{source.stem}.o"

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compiled, sources))
    library = folder / "libsfrt_kernels.so"
    run("-shared", *objects, "-o", library)
    return library
