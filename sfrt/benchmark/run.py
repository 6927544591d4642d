"""A whole run of the reference cases on one runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sfrt.benchmark.cases import PROMPT, RUN, Effort, Subject
from sfrt.benchmark.cold_start import cold_start_seconds
from sfrt.benchmark.protocol import Figure, Result, environment, write
from sfrt.benchmark.roofline import matrix_rate
from sfrt.device import dtype_name, resolve_device
from sfrt.errors import SfrtError
from sfrt.nvml import Gpu
from sfrt.runtime import Runtime

COLD = "cold start"
COLD_STARTS = 3


@dataclass
class Report:
    """What came of a run. not_run says of each case that could not be why."""

    environment: dict[str, Any]
    settings: dict[str, Any]
    matrix_tflops: float
    gpu_highest: dict[str, float]
    results: list[Result] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)

    def headline(self) -> str:
        """What was measured, on what."""
        case = self.results[0].case
        machine = self.environment.get("gpu") or self.environment["cpu"]
        return (
            f"{case.model}, {case.width}×{case.height}, {len(case.steps)} + 1 passes, {case.dtype} by {case.backend} "
            f"on {case.device} ({machine}); matrix products {self.matrix_tflops:.2f} TFLOP/s"
        )

    def write(self, path: Path) -> None:
        """One JSON file."""
        beside = {"settings": self.settings, "matrix_tflops": self.matrix_tflops}
        if self.gpu_highest:
            beside["gpu_highest"] = self.gpu_highest
        write(path, self.environment, self.results, **beside, not_run=self.not_run)


def measure(
    settings: dict[str, Any],
    cases: Sequence[str],
    effort: Effort,
    progress: Callable[[str], object] = lambda doing: None,
    keep: Callable[[Report], object] = lambda report: None,
) -> Report:
    """Open a runtime of these settings, run the cases on it, then start cold.

    progress is told what is being done, keep what there is so far, after each case: a later one may be killed. The
    prompt cache is off: a prompt that is new is to be read. Raises SfrtError where there is no such runtime, or no
    case could be run.
    """
    settings = {**settings, "prompt_cache": False}
    surroundings = environment(str(resolve_device(settings["device"])))
    progress("opening the model")
    runtime = Runtime(**settings)
    device = runtime.device
    progress("the rate of matrix products")
    rate = matrix_rate(device, runtime.dtype)
    gpu = Gpu.find(str(torch.cuda.get_device_properties(device).uuid)) if device.type == "cuda" else None
    subject = Subject(runtime, rate, gpu)
    told = {"device": str(device), "dtype": dtype_name(runtime.dtype), "backend": runtime.backend}
    report = Report(
        surroundings,
        {**told, "text_encoder": runtime.text_encoder, "rounds": effort.rounds, "seconds": effort.seconds},
        rate / 1e12,
        {} if gpu is None else gpu.highest(),
    )
    for name in cases:
        try:
            report.results.append(RUN[name](subject, effort, progress))
        except SfrtError as reason:  # such as plans that are for one stream alone
            report.not_run[name] = str(reason)
        keep(report)
    if not report.results:
        raise SfrtError(next(iter(report.not_run.values())))
    progress("starting cold")
    try:
        report.results.append(_cold(subject, {**settings, **told}, min(COLD_STARTS, effort.rounds)))
    except SfrtError as reason:
        report.not_run[COLD] = str(reason)
    keep(report)
    return report


def _cold(subject: Subject, settings: dict[str, Any], times: int) -> Result:
    """The model's own stream, in processes beside this one: it has let its sessions go, but not the weights."""
    prompt = PROMPT if subject.reads_text else None
    seconds = cold_start_seconds(settings, prompt, times)
    stream = subject.runtime.stream
    return Result(subject.case(COLD, stream), (Figure("cold_start_s", seconds),))
