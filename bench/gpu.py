"""`python -m bench.gpu --out DIR`: all that needs a GPU, in one command of under eight minutes, from a bare checkout.

Builds csrc/ with nvcc, runs the tests marked `gpu`, measures every op (bench.ops) and the reference cases of the model
with either decoder (`sfrt bench`, random weights at the published size). Needs torch, Triton, a CUDA compiler and what
the tests import; nothing is installed or fetched. Each stage is a process of its own, so that one that fails, hangs or
crashes costs its own figures only; what it wrote stays in DIR.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from sfrt.benchmark.protocol import environment

ROOT = Path(__file__).parent.parent
SECONDS = 470
"""What all stages together may take."""


@dataclass(frozen=True)
class Stage:
    """A command, how long it may take, and the JSON file that it writes."""

    name: str
    command: tuple[str, ...]
    seconds: float
    figures: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a stage ended, and the last lines it printed."""

    stage: str
    ended: str
    seconds: float
    tail: str


def main() -> None:
    """Run the stages one after the other, print what they found, and exit with 1 where one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and figures")
    parser.add_argument("--only", action="append", help="only these stages")
    arguments = parser.parse_args()
    out: Path = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + SECONDS
    outcomes = [
        run(stage, out, deadline) for stage in stages(out) if not arguments.only or stage.name in arguments.only
    ]
    report = {"environment": environment("cuda"), "stages": [asdict(outcome) for outcome in outcomes]}
    (out / "gpu-stages.json").write_text(json.dumps(report, indent=1) + "\n")
    for outcome in outcomes:
        print(f"=== {outcome.stage}: {outcome.ended} after {outcome.seconds:.0f} s\n{outcome.tail}")
    print(summary(out))
    sys.exit(any(outcome.ended != "done" for outcome in outcomes))


def stages(out: Path) -> list[Stage]:
    """In the order of what matters most: whether the kernels are right, how fast they are, how fast the model is."""
    python = sys.executable
    parallel = ("-n", "8") if _has("xdist") else ()
    measured = (python, "-m", "bench.reference", "--device", "cuda")
    eight_bits = (python, "-m", "bench.float8", "--device", "cuda", "--random", "1.3b", "--seeds", "1")
    # Only the files that ask for a GPU: others import what a bare machine does not have.
    tests = [str(file) for file in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in file.read_text("utf-8")]
    return [
        Stage("build", build_command(), 150),
        Stage(
            "tests",
            (python, "-m", "pytest", "-m", "gpu", "-q", "--continue-on-collection-errors", *parallel, *tests),
            180,
        ),
        Stage("ops", (python, "-m", "bench.ops", "--json", str(out / "ops.json"), "--compile-seconds", "60"), 200),
        Stage("taehv", (*measured, "--decoder", "taehv", "--json", str(out / "taehv.json")), 150),
        Stage("wan", (*measured, "--decoder", "wan_vae", "--seconds", "20", "--json", str(out / "wan.json")), 120),
        Stage("float8", (*eight_bits, "--json", str(out / "float8.json")), 90),
    ]


def build_command() -> tuple[str, ...]:
    """All of csrc/ for this machine's GPU, as the library that an install would put beside the package."""
    import torch

    major, minor = torch.cuda.get_device_capability()
    number = f"{major}{minor}" + ("a" if major >= 9 else "")
    compiler = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    target = ROOT / "sfrt" / "_native" / "libsfrt_kernels.so"
    target.parent.mkdir(exist_ok=True)
    flags = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "-Xptxas", "-v", "--threads", "0")
    sources = sorted(str(path) for path in (ROOT / "csrc").glob("*.cu"))
    return (compiler, *flags, f"-gencode=arch=compute_{number},code=sm_{number}", *sources, "-o", str(target))


def run(stage: Stage, out: Path, deadline: float) -> Outcome:
    """One stage; its output goes to a log of its own."""
    started = time.monotonic()
    limit = min(stage.seconds, deadline - started)
    if limit < 5:
        return Outcome(stage.name, "not begun: out of time", 0.0, "")
    log = out / f"{stage.name}.log"
    surroundings = {**os.environ, "PYTHONPATH": os.pathsep.join(_folders()), "PYTHONUNBUFFERED": "1"}
    with log.open("w") as file:
        try:
            done = subprocess.run(
                stage.command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=surroundings, timeout=limit
            )
            ended = "done" if done.returncode == 0 else f"exit code {done.returncode}"
        except (subprocess.TimeoutExpired, OSError) as error:
            ended = f"{type(error).__name__} (limit {limit:.0f} s)"
    tail = "\n".join(log.read_text("utf-8", "replace").splitlines()[-12:])[-2000:]
    return Outcome(stage.name, ended, time.monotonic() - started, tail)


def summary(out: Path) -> str:
    """The medians that were written, a line each."""
    lines = []
    for name in ("taehv", "wan"):
        path = out / f"{name}.json"
        for case in json.loads(path.read_text())["cases"] if path.exists() else []:
            figures = ", ".join(f"{figure} {values['p50']:.3g}" for figure, values in case["figures"].items())
            lines.append(f"{case['name']} {case['decoder']}: {figures}")
    path = out / "ops.json"
    if path.exists():
        report = json.loads(path.read_text())
        lines.append(f"copy {report['copy_gb_s'] or 0:.0f} GB/s")
        lines += map(_op_line, report["ops"])
    return "\n".join(lines)


def _op_line(row: dict[str, object]) -> str:
    stated = f"{row['op']:18} {row['implementation']:14} {row['size']:16}"
    if row["us"] is None:
        return f"{stated} {row['ran']}: {row['why']}"
    return f"{stated} {row['us']:9.1f} µs {row['copy_share']:6.1%} of copy, error {row['error']:.1e}"


def _folders() -> Sequence[str]:
    return [str(ROOT), str(ROOT / "export"), str(ROOT / "train")]


def _has(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None


if __name__ == "__main__":
    main()
