"""Triton kernels compiled ahead of time for GPUs that are not here: does each compile, in how many registers, spilling?

`python -m sfrt.ops.ahead` prints the table; it needs Triton and no GPU. The tensors lie on the meta device: a plan asks
only for their shapes, strides and dtypes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch

from sfrt.device import dtype_name
from sfrt.errors import DeviceError
from sfrt.ops.catalogue import OPS
from sfrt.ops.op import Draw, Op
from sfrt.ops.triton_kernels.launch import Launch, Launches

CAPABILITIES = (80, 89, 90, 100, 120)
"""Compute capabilities of the GPUs that kernels are compiled for, 90 meaning 9.0."""


@dataclass(frozen=True)
class Resources:
    """One compiled kernel: registers per thread, bytes of shared memory per block, bytes spilled to memory."""

    op: str
    size: str
    dtype: str
    kernel: str
    capability: int
    warps: int
    registers: int
    shared: int
    spilled: int


def launches_of(op: Op[..., Any]) -> Iterator[tuple[str, torch.dtype, Launch]]:
    """(size, dtype, launch) of an op's Triton kernels at the published model's sizes; nothing where it has none."""
    if "triton" not in op.kernels:
        return
    kernel = cast("Launches[..., Any]", op.kernel("triton"))
    for dtype in op.tolerance:
        for size, make in op.sizes.items():
            launches, _ = kernel.plan(**make(Draw(dtype, torch.device("meta"))))
            for launch in launches:
                yield size, dtype, launch


def compile_all(ops: Iterable[Op[..., Any]] = OPS, capabilities: Iterable[int] = CAPABILITIES) -> Iterator[Resources]:
    """Every launch of every op, for every compute capability that has its dtypes.

    Raises DeviceError for a kernel that Triton or its assembler refuses.
    """
    capabilities = tuple(capabilities)
    for op in ops:
        for size, dtype, launch in launches_of(op):
            for capability in capabilities:
                if capability >= launch.needs:
                    yield _compile(op.name, size, dtype, launch, capability)


def _compile(op: str, size: str, dtype: torch.dtype, launch: Launch, capability: int) -> Resources:
    name = launch.kernel.__name__
    try:
        compiled = launch.compile(capability)
    except Exception as error:  # Triton's compiler raises what it likes
        raise DeviceError(f"{op}'s kernel {name} does not compile for sm_{capability}: {error}") from error
    registers, spilled = _assembled(compiled.asm["ptx"], capability)
    return Resources(
        op=op,
        size=size,
        dtype=dtype_name(dtype),
        kernel=name,
        capability=capability,
        warps=launch.warps,
        registers=registers,
        shared=compiled.metadata.shared,
        spilled=spilled,
    )


@lru_cache  # sizes often share a kernel
def _assembled(ptx: str, capability: int) -> tuple[int, int]:
    """Registers per thread and spilled bytes, as the assembler that Triton brings tells them."""
    from triton import knobs
    from triton.backends.nvidia.compiler import sm_arch_from_capability

    assembler = (knobs.nvidia.ptxas_blackwell if capability >= 100 else knobs.nvidia.ptxas).path
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        architecture = sm_arch_from_capability(capability)
        command = [assembler, "-v", f"--gpu-name={architecture}", source, "-o", source.with_suffix(".cubin")]
        log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    used = re.search(r"Used (\d+) registers", log)
    spilled = re.findall(r"(\d+) bytes spill", log)
    if used is None or not spilled:
        raise DeviceError(f"{assembler} does not say what a kernel uses: {log.strip()}")
    return int(used[1]), sum(map(int, spilled))


def main() -> None:
    """Print the table, or JSON lines with --json; exit with 1 where a kernel spills."""
    as_json = "--json" in sys.argv[1:]
    names = [field.name for field in fields(Resources)]
    if not as_json:
        print(*names, sep="\t")
    worst = 0
    for resources in compile_all():
        row = asdict(resources)
        print(json.dumps(row) if as_json else "\t".join(map(str, row.values())), flush=True)
        worst = max(worst, resources.spilled)
    sys.exit(1 if worst else 0)


if __name__ == "__main__":
    main()
