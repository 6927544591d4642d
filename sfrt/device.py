"""Which device and dtype a name means on this machine, and how much memory is free there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from sfrt import machine
from sfrt.errors import ConfigError, DeviceError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(name: str) -> torch.device:
    """The device called "auto" (a GPU where there is one), "cpu", "cuda" or "cuda:N". Raises DeviceError."""
    if name == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"{name!r} is no device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type != "cuda":
        raise DeviceError(f"sfrt does not run on {device.type!r} devices; use auto, cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = device.index or 0
    if index >= count:
        there = f"there are {count}, numbered from 0" if count else "torch sees no GPU here; `sfrt doctor` says why"
        raise DeviceError(f"there is no device {name}: {there}")
    return torch.device("cuda", index)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called "auto" (bfloat16 on a GPU, float32 on a CPU) or by its name. Raises ConfigError."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"{name!r} is no dtype sfrt runs in; use auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def dtype_name(dtype: torch.dtype) -> str:
    """The "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Some integers as int64 on the device; a GPU fetches them from pinned memory while this goes on."""
    there = torch.tensor(numbers, dtype=torch.int64)
    return there.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else there.to(device)


def free_bytes(device: torch.device) -> int | None:
    """Memory that can be had on the device now; None where the system does not say."""
    if device.type == "cuda":
        # What torch keeps for reuse is free to us, though not to the driver.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    memory = machine.memory()
    return None if memory is None else memory.available


def require_memory(needed: int, what: str, device: torch.device, parts: str = "") -> None:
    """Raise DeviceError, saying how much is needed (for what parts) and free, where `needed` bytes cannot be had."""
    free = free_bytes(device)
    if free is not None and needed > free:
        raise DeviceError(
            f"{what} needs {needed / 2**30:.2f} GiB on {device} and {free / 2**30:.2f} GiB are free"
            f"{f' ({parts})' if parts else ''}; "
            "use a smaller resolution, window or dtype, or another device"
        )


@contextmanager
def memory_told(what: str, device: torch.device) -> Iterator[None]:
    """Turn torch running out of memory into a DeviceError that names what ran out.

    Within it, a GPU is the current one, as that is where kernels are launched.
    """
    try:
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            yield
    except torch.OutOfMemoryError as error:
        raise DeviceError(
            f"{what} ran out of memory on {device}; use a smaller resolution, window or dtype, or another device"
        ) from error
