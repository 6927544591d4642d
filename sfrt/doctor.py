"""What this machine can run, and why not the rest.

Every probe runs in a child process: a library that raises, exits, hangs or crashes while it is imported costs one line
of the report, never the report.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

from sfrt import machine
from sfrt.errors import SfrtError

Status = Literal["ok", "absent", "broken"]

CHILD_SECONDS = 120
"""How long a child process may take over its probes before the one it is at is called broken."""

_GIB = 2**30
# In bfloat16: weights of the 1.3B DiT 2.6, of UMT5-XXL 10.6, keys and values of 21 frames at 480x832 5.6.
_PUBLISHED_GIB = 20


@dataclass(frozen=True)
class Probe:
    """One line of the report: what was found, what that means for the reader, and details where there are any."""

    name: str
    status: Status
    found: str
    meaning: str
    details: tuple[str, ...] = ()


def _ok(name: str, found: str, meaning: str) -> Probe:
    return Probe(name, "ok", found, meaning)


def _absent(name: str, found: str, meaning: str) -> Probe:
    return Probe(name, "absent", found, meaning)


def _python() -> Probe:
    found = f"{platform.python_implementation()} {platform.python_version()} at {sys.executable}"
    return _ok("python", found, "sfrt runs on 3.10 and newer")


def _system() -> Probe:
    return _ok("system", platform.platform(), "the kernels in csrc/ are built on Linux only; the rest runs anywhere")


def _cpu() -> Probe:
    cpu = machine.processor()
    wanted = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    found = ", ".join([cpu.name, f"{cpu.cores} cores", *(flag for flag in wanted if flag in cpu.flags)])
    if cpu.flags & {"avx512_bf16", "amx_bf16"}:
        return _ok("cpu", found, "float32, and bfloat16 in hardware")
    return _ok("cpu", found, "float32; bfloat16 works but is emulated, so slower")


def _memory() -> Probe:
    memory = machine.memory()
    if memory is None:
        return _absent("memory", "unknown", "this system does not say (no /proc/meminfo)")
    total, free = memory.total / _GIB, memory.available / _GIB
    room = "room for" if free >= _PUBLISHED_GIB else "too little for"
    return _ok(
        "memory",
        f"{total:.1f} GiB, {free:.1f} free",
        f"{room} the published 1.3B model with its text encoder (about {_PUBLISHED_GIB} GiB in bfloat16)",
    )


def _torch() -> Probe:
    torch = importlib.import_module("torch")
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    found = f"{torch.__version__} ({build}, {torch.get_num_threads()} threads)"
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        return Probe("torch", "broken", found, "sfrt needs torch 2.11 or newer: pip install -U torch")
    return _ok("torch", found, "the torch backend runs")


def _cuda() -> Probe:
    torch = importlib.import_module("torch")
    driver = machine.driver_version()
    if torch.cuda.is_available():
        names = [_describe_device(torch, index) for index in range(torch.cuda.device_count())]
        return _ok("cuda", "; ".join([*names, f"driver {driver or 'unknown'}"]), "--device cuda works")
    if driver is None:
        return _absent("cuda", "no NVIDIA driver", "runs on the CPU; for a GPU install NVIDIA's driver")
    if torch.version.cuda is None:
        return _absent("cuda", f"driver {driver}", "this torch is a CPU build: install one with CUDA, see pytorch.org")
    return _absent(
        "cuda", f"driver {driver}", f"torch wants CUDA {torch.version.cuda}: update the driver, or free a GPU"
    )


def _describe_device(torch: Any, index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    return f"{properties.name} ({capability}, {total / _GIB:.1f} GiB, {free / _GIB:.1f} free)"


def _package(name: str, package: str, use: str, remedy: str) -> Probe:
    """An optional library that only has to import."""
    try:
        module = importlib.import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        return _absent(name, "not installed", remedy)
    version = machine.version_of(name) or getattr(module, "__version__", "version unknown")
    return _ok(name, str(version), use)


def _triton() -> Probe:
    return _package(
        "triton",
        "triton",
        "kernels written in Triton can be compiled",
        "optional, for compiled kernels on a GPU: pip install 'sfrt[cuda]'",
    )


def _flash_attn() -> Probe:
    return _package(
        "flash-attn",
        "flash_attn",
        "measured against the other attention kernels when a model is opened on a GPU",
        "optional: attention runs as the fastest of torch's, cuDNN's and sfrt's own kernels",
    )


def _onnxruntime() -> Probe:
    probe = _package(
        "onnxruntime", "onnxruntime", "runs ONNX graphs", "optional, to run ONNX graphs: pip install 'sfrt[onnx]'"
    )
    if probe.status == "ok":
        providers = importlib.import_module("onnxruntime").get_available_providers()
        return _ok(probe.name, f"{probe.found} ({', '.join(providers)})", probe.meaning)
    return probe


def _tensorrt() -> Probe:
    return _package(
        "tensorrt",
        "tensorrt",
        "builds and runs TensorRT plans, given a GPU",
        "optional, for TensorRT plans on an NVIDIA GPU: pip install 'sfrt[tensorrt]'",
    )


def _pyav() -> Probe:
    probe = _package("av", "av", "writes mp4, gif and y4m", "only png pictures without it: pip install av")
    if probe.status != "ok":
        return probe
    codecs = importlib.import_module("av.codec").codecs_available
    if "libx264" not in codecs:
        return Probe(
            "av",
            "broken",
            f"{probe.found} without libx264",
            "no mp4 (gif, png and y4m work): pip install --force-reinstall av",
        )
    return _ok("av", f"{probe.found} with libx264", probe.meaning)


def _kernels() -> Probe:
    from sfrt.ops.cuda_kernels.library import library_path

    library = library_path()
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    if library is not None:
        importlib.import_module("ctypes").CDLL(str(library))
        return _ok("kernels", library.name, "the CUDA kernels of csrc/ are built")
    if compiler is not None:
        return _absent(
            "kernels",
            f"not built; nvcc is at {compiler}",
            "optional, for a GPU: pip install . from a clone builds them",
        )
    return _absent("kernels", "not built; no nvcc", "optional: CUDA kernels of csrc/, beside those written in Triton")


def _ops() -> Probe:
    from sfrt.device import resolve_device
    from sfrt.ops.choice import Ops

    device = resolve_device("auto")
    choices = Ops(device).choices
    counted = Counter(choice.implementation for choice in choices)
    found = ", ".join(f"{count} in {name}" for name, count in counted.most_common())
    details = tuple(f"{choice.op}: {choice.implementation} ({choice.reason})" for choice in choices)
    return Probe("ops", "ok", f"on {device}: {found}", "what each operation of the model runs as", details)


def _model() -> Probe:
    from sfrt.bundle import Bundle, resolve_model

    try:
        Bundle.open(resolve_model())
    except SfrtError as error:
        return Probe("built-in model", "broken", str(error), "reinstall sfrt, or give sfrt generate another --model")
    return _ok("built-in model", "hashes match", "sfrt generate works without a download")


_PROBES: dict[str, Callable[[], Probe]] = {
    "python": _python,
    "system": _system,
    "cpu": _cpu,
    "memory": _memory,
    "torch": _torch,
    "cuda": _cuda,
    "triton": _triton,
    "flash-attn": _flash_attn,
    "onnxruntime": _onnxruntime,
    "tensorrt": _tensorrt,
    "av": _pyav,
    "kernels": _kernels,
    "ops": _ops,
    "built-in model": _model,
}


def report() -> list[Probe]:
    """Every probe, in the order of the table. Never raises for what it finds."""
    probes: list[Probe] = []
    waiting = list(_PROBES)
    while waiting:
        answered, end = _run_child(waiting)
        probes += answered
        waiting = waiting[len(answered) :]
        if waiting:  # the child fell over the next one
            probes.append(Probe(waiting.pop(0), "broken", end, "reinstall it, or remove it from this environment"))
    return probes


def _run_child(names: list[str]) -> tuple[list[Probe], str]:
    """Probes up to the first that takes the child process down with it, and how the child ended."""
    source = (
        "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from sfrt.doctor import answer; answer(sys.argv[2:])"
    )
    command = [sys.executable, "-c", source, json.dumps(sys.path), *names]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=CHILD_SECONDS)
        output, end = done.stdout, f"the process died of {_cause(done.returncode)}"
    except subprocess.TimeoutExpired as expired:
        output, end = expired.stdout or b"", f"no answer within {CHILD_SECONDS} seconds"
    except OSError as error:
        output, end = b"", f"no child process: {error}"
    # A line without its end was cut off with the process.
    return [Probe(**json.loads(line)) for line in output.splitlines(keepends=True) if line.endswith(b"\n")], end


def _cause(returncode: int) -> str:
    if returncode >= 0:
        return f"exit code {returncode}"
    try:
        return signal.Signals(-returncode).name
    except ValueError:  # a real-time signal has no name
        return f"signal {-returncode}"


def answer(names: Iterable[str]) -> None:
    """The child's side: one JSON line per probe, each sent before the next one runs."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints while it is imported is no part of the answer
    for name in names:
        out.write(json.dumps(asdict(_guarded(name))) + "\n")
        out.flush()


def _guarded(name: str) -> Probe:
    try:
        return _PROBES[name]()
    except (Exception, SystemExit) as error:
        first_line = next(iter(str(error).splitlines()), "")
        return Probe(name, "broken", f"{type(error).__name__}: {first_line}", "reinstall it, or remove it")


def verdicts(probes: Iterable[Probe]) -> dict[str, str]:
    """What can be run here: a device → "yes", or the reason why not."""
    by_name = {probe.name: probe for probe in probes}
    result: dict[str, str] = {}
    for device, needs in (("cpu", ("python", "torch")), ("cuda", ("python", "torch", "cuda"))):
        missing = next((by_name[name] for name in needs if by_name[name].status != "ok"), None)
        result[device] = "yes" if missing is None else f"no ({missing.name}: {missing.found})"
    return result


def as_text(probes: list[Probe]) -> str:
    """The report as a table for people, one line per probe and one per device."""
    marks = {"ok": "+", "absent": "-", "broken": "!"}
    width = max(len(probe.name) for probe in probes)
    lines = []
    for probe in probes:
        below = f"  {'':{width}}  "
        lines += [f"{marks[probe.status]} {probe.name:{width}}  {probe.found}", below + probe.meaning]
        lines += [f"{below}  {detail}" for detail in probe.details]
    lines += ["", *(f"torch backend on {device}: {word}" for device, word in verdicts(probes).items())]
    return "\n".join(lines)


def as_json(probes: list[Probe]) -> str:
    """The report for machines: {"probes": [...], "runs": {device: "yes" or why not}}."""
    return json.dumps({"probes": [asdict(probe) for probe in probes], "runs": verdicts(probes)}, indent=2)
