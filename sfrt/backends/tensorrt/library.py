"""The TensorRT library and the GPU it runs on: there and new enough, or one sentence that says what is missing."""

from __future__ import annotations

from typing import Any

import torch

from sfrt.backends.tensorrt.plans import Target
from sfrt.errors import DeviceError

OLDEST = 11
"""The first TensorRT whose networks are always strongly typed and whose bindings this is written for."""


def require_tensorrt(device: torch.device) -> Any:
    """The module `tensorrt`. Raises DeviceError where it, or an NVIDIA GPU, is missing or it is too old."""
    if device.type != "cuda":
        raise DeviceError(f"TensorRT builds and runs plans on an NVIDIA GPU, not on {device}; `sfrt doctor` says more")
    try:
        import tensorrt
    except (ImportError, OSError) as error:  # OSError: its libraries want others that are not there
        reason = str(error).splitlines()[0]
        raise DeviceError(f"TensorRT is not to be had here ({reason}); pip install 'sfrt[tensorrt]'") from None
    version = tensorrt.__version__
    if int(version.split(".")[0]) < OLDEST:
        raise DeviceError(f"TensorRT {version} is too old for these plans; install {OLDEST} or newer")
    return tensorrt


def target_of(trt: Any, device: torch.device) -> Target:
    """What plans for this device have to be built for."""
    major, minor = torch.cuda.get_device_capability(device)
    return Target(torch.cuda.get_device_name(device), f"{major}.{minor}", trt.__version__)


def error_log(trt: Any) -> Any:
    """An ILogger that keeps quiet; `last` is what TensorRT last complained of."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.last = "it gave no reason"

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("ERROR", "INTERNAL_ERROR"):
                self.last = msg.strip().splitlines()[0]

    return Log()
