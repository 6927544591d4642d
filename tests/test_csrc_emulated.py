"""The CUDA kernels run without a GPU, their threads as fibers (simt.h), and held to their definitions like all others.

The sources of csrc/ are what runs, called through sfrt's own binding; launches, shared memory and single instructions
are spelled in C++ first. Speed is not seen here, nor what goes wrong between blocks.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfrt.ops.catalogue import OPS
from sfrt.ops.cuda_kernels import library
from sfrt.ops.gelu import GELU_FLOAT8, QUANTIZE_ROWS
from sfrt.ops.modulate import MODULATE, MODULATE_FLOAT8
from sfrt.ops.op import Draw, Op
from sfrt.ops.proof import errors_of, poisoned_memory
from tests.native import CSRC, build_library

SIMT = Path(__file__).parent / "simt.h"
CPU = torch.device("cpu")

IN_CPP = (
    (r"(\w+(?:<[^<>;]*>)?)<<<(.*?)>>>(\(.*?\));", r"simt::launch(\2, [=] { \1\3; });"),
    (r"extern __shared__ (?:__align__\(\d+\) )?([\w ]+) (\w+)\[\];", r"\1 *\2 = (\1 *)simt::dynamic_shared;"),
    (r"__shared__ ([^;]*?) (\w+)((?:\[[^\]]*\])*);", r"static \1 \2\3; simt::begin_with_nan(\2);"),
    (r'asm\("(\w+)[^"]*" : "=f"\((\w+)\) : "f"\((\w+)\)\);', r"\2 = \1(\3);"),
)
"""What CUDA has and C++ has not: (pattern, replacement)."""


def emulated(nvcc: str, folder: Path, *kernels: str, without: str | None = None) -> Path:
    """csrc/, or only these files of it, as a library of the CPU, built in `folder`; a text is left out everywhere."""
    named = [CSRC / kernel for kernel in kernels] or CSRC.glob("*.cu")
    for source in (*CSRC.glob("*.h"), *CSRC.glob("*.cuh"), *named):
        text = source.read_text("utf-8")
        for cuda, cpp in IN_CPP:
            text = re.sub(cuda, cpp, text, flags=re.DOTALL)
        name = f"{source.stem}.cpp" if source.suffix == ".cu" else source.name
        (folder / name).write_text(text if without is None else text.replace(without, ""), "utf-8")
    flags = ["-std=c++17", "-O1", "-cudart", "none", "-include", str(SIMT), "-Xcompiler", "-fPIC,-w"]
    return build_library([nvcc, *flags], sorted(folder.glob("*.cpp")), folder)


@contextmanager
def kernels_of(path: Path) -> Iterator[None]:
    """The CUDA kernels are those of this library, and the CPU their device, in here."""

    def forget() -> None:
        library._open.cache_clear()
        for name in [name for name in sys.modules if name.startswith(f"{library.__package__}.")]:
            if name != library.__name__:
                del sys.modules[name]  # it holds functions of a library

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "library_path", lambda: path)
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=None))
        forget()
        yield
    forget()


@pytest.fixture(scope="module")
def emulated_kernels(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with kernels_of(emulated(nvcc, tmp_path_factory.mktemp("emulated"))):
        yield


def every_case() -> Iterator[Any]:
    for op in OPS:
        for case in op.cases if "cuda" in op.kernels else ():
            for dtype in op.tolerance:
                label = f"{op.name}-{case}-{str(dtype).removeprefix('torch.')}".replace(" ", "_")
                yield pytest.param(op, case, dtype, id=label)


@pytest.mark.usefixtures("emulated_kernels")
@pytest.mark.parametrize(("op", "case", "dtype"), list(every_case()))
def test_a_cuda_kernel_is_its_definition(op: Op[..., Any], case: str, dtype: torch.dtype) -> None:
    inputs = op.cases[case](Draw(dtype, CPU, seed=len(case)))
    with poisoned_memory():
        errors = errors_of(op, op.load("cuda"), inputs)
    assert all(error <= op.tolerance[dtype] for error in errors), errors


@pytest.mark.usefixtures("emulated_kernels")
@pytest.mark.parametrize("width", [2056, 5120, 12289, 16384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_every_layout(width: int, dtype: torch.dtype) -> None:
    draw = Draw(dtype, CPU, seed=width)
    rows = {"x": draw.normal(2, width)}
    vectors = {name: draw.normal(width) for name in ("gate", "scale", "shift")}
    stream = rows | vectors | {"branch": draw.normal(2, width), "eps": 1e-6}
    for op, inputs in ((MODULATE, stream), (MODULATE_FLOAT8, stream), (GELU_FLOAT8, rows), (QUANTIZE_ROWS, rows)):
        with poisoned_memory():
            errors = errors_of(op, op.load("cuda"), inputs)
        assert all(error <= op.tolerance.get(dtype, 4e-2) for error in errors), (op.name, errors)


def test_a_missing_barrier_shows(nvcc: str, tmp_path: Path) -> None:
    inputs = MODULATE.cases["1.3B"](Draw(torch.float32, CPU))
    with kernels_of(emulated(nvcc, tmp_path, "modulate.cu", "noise.cu", without="__syncthreads();")):
        _, error = errors_of(MODULATE, MODULATE.load("cuda"), inputs)
    assert not error <= 0.1  # NaN, as shared memory begins
