"""Every op's kernels against its definition in double precision, on memory full of NaN; the arguments they refuse.

Without a GPU Triton's kernels run in its interpreter (see conftest), and CUDA's only compile (test_csrc).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from sfrt.ops.catalogue import OPS
from sfrt.ops.interpreter import mended_interpreter
from sfrt.ops.op import Draw, ImplementationName, Op, tensors_of
from sfrt.ops.proof import copied, errors_of, poisoned_memory

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")


PACKAGES = {"triton": "triton", "flash2": "flash_attn", "flash3": "flash_attn_interface"}
"""What an implementation needs beside torch."""


def every_case() -> Iterator[Any]:
    for op in OPS:
        for name in ("torch", *op.kernels):
            for case in op.cases:
                for dtype in op.tolerance:
                    marks = [] if name in ("torch", "triton") else [pytest.mark.gpu]
                    label = f"{op.name}-{name}-{case}-{str(dtype).removeprefix('torch.')}".replace(" ", "_")
                    yield pytest.param(op, name, case, dtype, id=label, marks=marks)


@pytest.fixture(autouse=True)
def _interpreter_is_mended() -> Iterator[None]:
    with mended_interpreter():
        yield


@pytest.mark.parametrize(("op", "name", "case", "dtype"), list(every_case()))
def test_an_implementation_is_its_definition(
    op: Op[..., Any], name: ImplementationName, case: str, dtype: torch.dtype
) -> None:
    pytest.importorskip(PACKAGES.get(name, "torch"))
    inputs = op.cases[case](Draw(dtype, DEVICE, seed=len(case)))
    function = op.load(name)
    with poisoned_memory():
        assert torch.empty(3).isnan().all()
        assert max(errors_of(op, function, inputs)) <= op.tolerance[dtype]
        found, reference = (tensors_of(run(**copied(inputs))) for run in (function, op.reference))
    assert [(out.shape, out.dtype) for out in found] == [(out.shape, out.dtype) for out in reference]


SHARED_BYTES = {80: 166912, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
"""The most shared memory a block may have, by compute capability (CUDA C++ Programming Guide)."""


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """Every Triton kernel at the published model's sizes, compiled for all GPUs where nothing is interpreted."""
    pytest.importorskip("triton")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sfrt.ops.ahead", "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("op", [op for op in OPS if "triton" in op.kernels], ids=lambda op: op.name)
def test_kernels_compile_ahead_of_time_without_spills(op: Op[..., Any], compiled: list[dict[str, Any]]) -> None:
    mine = [kernel for kernel in compiled if kernel["op"] == op.name]
    assert {(kernel["capability"], kernel["size"]) for kernel in mine} >= {
        (capability, size) for capability in (89, 90, 100, 120) for size in op.sizes
    }
    for kernel in mine:
        assert kernel["spilled"] == 0, kernel
        assert kernel["shared"] <= SHARED_BYTES[kernel["capability"]], kernel
