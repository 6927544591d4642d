"""`python -m bench.ops`: every implementation of every op, proved against float64 and timed.

On a GPU at the published model's sizes, on fresh random inputs and memory full of NaN: the error, then microseconds,
GB/s and the share of the copy bandwidth measured in the same run, beside eager torch and torch.compile of the
reference. Without one: the Triton kernels' errors under its interpreter at small sizes, and what each takes on every
GPU that it is compiled for; no time is measured, and the file says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sfrt.benchmark.protocol import environment
from sfrt.device import dtype_name
from sfrt.ops.catalogue import OPS
from sfrt.ops.choice import why_not
from sfrt.ops.interpreter import mended_interpreter
from sfrt.ops.op import Draw, Inputs, Op
from sfrt.ops.proof import errors_of, poisoned_memory

_REPLAYS = 20
_GRAPH_BYTES = 1 << 30
"""About what one timed graph moves: many calls, over inputs that together do not fit a GPU's cache."""


@dataclass(frozen=True)
class Row:
    """One implementation at one size: its error, and on a GPU its time. why says what kept it from running."""

    op: str
    implementation: str
    size: str
    dtype: str
    ran: str
    error: float | None = None
    tolerance: float | None = None
    us: float | None = None
    samples_us: tuple[float, ...] = ()
    gb_s: float | None = None
    tflop_s: float | None = None
    copy_share: float | None = None
    why: str | None = None


def main() -> None:
    """Measure, print a table, write JSON; exit with 1 where an implementation is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write everything to a file")
    parser.add_argument("--op", action="append", help="only these ops")
    parser.add_argument("--compile-seconds", type=float, default=150, help="no torch.compile is begun after so long")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    surroundings = environment(str(device))
    ops = [op for op in OPS if not arguments.op or op.name in arguments.op]
    copied = copy_rate(device) if device.type == "cuda" else None
    rows = list(on_gpu(ops, device, copied, arguments.compile_seconds) if copied else interpreted(ops))
    print(table(rows))
    if arguments.json is not None:
        report = {
            "environment": surroundings,
            "timed_on_a_gpu": copied is not None,
            "copy_gb_s": copied,
            "ops": [asdict(row) for row in rows],
            "compiled": compiled_ahead(),
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    sys.exit(any(row.error is not None and not row.error <= (row.tolerance or 0) for row in rows))


def on_gpu(ops: list[Op[..., Any]], device: torch.device, copied: float, compile_seconds: float) -> Iterator[Row]:
    """Every implementation at the published sizes in bfloat16."""
    deadline = time.monotonic() + compile_seconds
    for op in ops:
        dtype = torch.bfloat16 if torch.bfloat16 in op.tolerance else next(iter(op.tolerance))
        for size, make in op.sizes.items():
            for name in ("torch", "torch.compile", *op.kernels):
                reason = None if name.startswith("torch") else why_not(op, name, device)
                if name == "torch.compile" and time.monotonic() > deadline:
                    reason = "out of time"
                if reason is not None:
                    yield Row(op.name, name, size, dtype_name(dtype), ran="not", why=reason)
                    continue
                yield _measured(op, name, size, make, dtype, device, copied)
            torch.cuda.empty_cache()


def _measured(
    op: Op[..., Any],
    name: str,
    size: str,
    make: Callable[[Draw], Inputs],
    dtype: torch.dtype,
    device: torch.device,
    copied: float,
) -> Row:
    stated: dict[str, Any] = {"op": op.name, "implementation": name, "size": size, "dtype": dtype_name(dtype)}
    try:
        function = torch.compile(op.reference, dynamic=False) if name == "torch.compile" else op.load(name)  # type: ignore[arg-type]
        inputs = make(Draw(dtype, device, seed=int.from_bytes(os.urandom(4), "little")))
        with poisoned_memory():
            error = max(errors_of(op, function, inputs))
        samples = _microseconds(function, [inputs, *_more_inputs(op, make, dtype, device, inputs)], op)
    except Exception as failure:  # one broken kernel must not end the run
        return Row(**stated, ran="failed", why=f"{type(failure).__name__}: {failure}".splitlines()[0][:300])
    cost, us = op.cost(**inputs), statistics.median(samples)
    return Row(
        **stated,
        ran="gpu",
        error=error,
        tolerance=op.tolerance[dtype],
        us=us,
        samples_us=samples,
        gb_s=cost.bytes / us / 1e3,
        tflop_s=cost.operations / us / 1e6,
        copy_share=cost.bytes / us / 1e3 / copied,
    )


def _more_inputs(
    op: Op[..., Any], make: Callable[[Draw], Inputs], dtype: torch.dtype, device: torch.device, inputs: Inputs
) -> list[Inputs]:
    """So many more sets of inputs that no cache holds what the first ones left there."""
    count = min(7, _GRAPH_BYTES // 4 // max(1, op.cost(**inputs).bytes))
    return [make(Draw(dtype, device, seed=number)) for number in range(1, 1 + count)]


def _microseconds(function: Callable[..., Any], sets: list[Inputs], op: Op[..., Any]) -> tuple[float, ...]:
    """One call's time, from replays of a graph of many calls: no launch overhead, the caches cold."""
    rounds = max(1, min(50, _GRAPH_BYTES // max(1, len(sets) * op.cost(**sets[0]).bytes)))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for inputs in sets:
            function(**inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(rounds):
            for inputs in sets:
                function(**inputs)
    for _ in range(3):
        graph.replay()
    samples = []
    for _ in range(_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / (rounds * len(sets)))
    return tuple(samples)


def copy_rate(device: torch.device) -> float:
    """GB/s of a large copy on the device, read and written bytes both counted."""
    source = torch.randn(1 << 30, device=device)
    target = torch.empty_like(source)
    times = []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * source.numel() * source.element_size() / statistics.median(times[2:]) / 1e6


def interpreted(ops: list[Op[..., Any]]) -> Iterator[Row]:
    """The Triton kernels' errors under its interpreter, which must have been asked for before Triton is imported."""
    os.environ["TRITON_INTERPRET"] = "1"
    for op in ops:
        for name in ("torch", *op.kernels):
            for case, make in op.cases.items():
                for dtype, tolerance in op.tolerance.items():
                    stated: dict[str, Any] = {"op": op.name, "implementation": name, "size": case}
                    stated |= {"dtype": dtype_name(dtype), "tolerance": tolerance}
                    reason = None if name == "torch" else why_not(op, name, torch.device("cpu"))
                    if reason is not None:
                        yield Row(**stated, ran="not", why=reason)
                        continue
                    with poisoned_memory(), mended_interpreter():
                        error = max(errors_of(op, op.load(name), make(Draw(dtype, torch.device("cpu")))))
                    yield Row(**stated, ran="cpu" if name == "torch" else "interpreted", error=error)


def compiled_ahead() -> list[dict[str, Any]]:
    """What every Triton kernel takes on every GPU it is compiled for; in a process that interprets nothing."""
    plain = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "sfrt.ops.ahead", "--json"]
    done = subprocess.run(command, env=plain, stdout=subprocess.PIPE, text=True, check=False)
    return [json.loads(line) for line in done.stdout.splitlines()]


def table(rows: list[Row]) -> str:
    """Short: times where they were measured, else the worst error of each implementation."""
    if any(row.us for row in rows):
        return "\n".join(f"{row.op:18} {row.implementation:14} {row.size:16} {_figures(row)}" for row in rows)
    worst: dict[tuple[str, str, str], float] = {}
    for row in rows:
        key = (row.op, row.implementation, row.why or row.ran)
        worst[key] = max(worst.get(key, 0.0), (row.error or 0.0) / (row.tolerance or 1.0))
    return "\n".join(
        f"{op:18} {name:8} {ran}" + (f", error at most {share:.0%} of its tolerance" if share else "")
        for (op, name, ran), share in worst.items()
    )


def _figures(row: Row) -> str:
    if row.us is None:
        return f"{row.ran}: {row.why}"
    return (
        f"{row.us:9.1f} µs {row.gb_s:7.0f} GB/s {row.copy_share:5.0%} {row.tflop_s:6.1f} TFLOP/s error {row.error:.1e}"
    )


if __name__ == "__main__":
    main()
