"""The shared library built from csrc/, opened by ctypes: what its functions take, and their errors as sfrt's own."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from ctypes import c_char_p, c_int, c_void_p
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sfrt.errors import DeviceError

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float8_e4m3fn: 3}
"""sfrt_dtype of csrc/sfrt.h."""

_NAME = "libsfrt_kernels.so"


def library_path() -> Path | None:
    """Where the install put the library; None where it built none."""
    package = importlib.import_module("sfrt")  # where it was installed and, if editable, where its sources are
    candidates = (Path(folder, "_native", _NAME) for folder in package.__path__)
    return next((path for path in candidates if path.exists()), None)


@lru_cache(maxsize=1)
def _open() -> ctypes.CDLL:
    path = library_path()
    if path is None:
        raise DeviceError("the CUDA kernels of csrc/ are not built; install sfrt where nvcc is, from a clone")
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise DeviceError(f"the CUDA kernels at {path} cannot be opened: {error}; install sfrt again") from error
    library.sfrt_error_string.argtypes = [c_int]
    library.sfrt_error_string.restype = c_char_p
    return library


def function(name: str, *argument_types: type) -> Callable[..., None]:
    """A function of csrc/sfrt.h by name and the C types of its arguments, the stream left out.

    Called with one more argument in front, a tensor, it queues its work on that tensor's device and current stream.
    Raises DeviceError here where there is no library, or it has no such function, and there where the launch fails.
    """
    library = _open()
    try:
        entry = getattr(library, name)
    except AttributeError:
        raise DeviceError(f"the CUDA kernels are of another version: they have no {name}; install sfrt again") from None
    entry.argtypes = [*argument_types, c_void_p]
    entry.restype = c_int

    def queue(on: Tensor, *arguments: object) -> None:
        with torch.cuda.device(on.device):
            status = entry(*arguments, torch.cuda.current_stream(on.device).cuda_stream)
        if status:
            raise DeviceError(f"{name} failed on {on.device}: {library.sfrt_error_string(status).decode()}")

    return queue


def address(tensor: Tensor | None) -> int | None:
    """Where a tensor's first element lies; a null pointer for none."""
    return None if tensor is None else tensor.data_ptr()
