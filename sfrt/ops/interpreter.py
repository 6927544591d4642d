"""Triton's interpreter, mended where what it computes is not what the hardware does; for tests and benchmarks."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch

_ROUNDED = {"fp8e4nv": torch.float8_e4m3fn, "bf16": torch.bfloat16}


@contextmanager
def mended_interpreter() -> Iterator[None]:
    """Triton's interpreter as the hardware is, in here; nothing where Triton is not installed.

    That of Triton 3.6 loses the carry where rounding to e4m3 reaches the next power of two (7.9 becomes 4), cuts what
    it makes bfloat16, multiplies matrices of bfloat16 by their bits, and with NumPy 2.4 cannot count to a number that
    a kernel was given.
    """
    if importlib.util.find_spec("triton") is None:
        yield
        return
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder = interpreter.InterpreterBuilder
    with ExitStack() as changes:
        for owner, name, mended in (
            (interpreter, "_convert_float", _rounding(interpreter._convert_float)),
            (interpreter, "_patch_lang_tensor", _counting(interpreter._patch_lang_tensor)),
            (builder, "create_dot", _multiplying(builder.create_dot)),
        ):
            changes.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, mended)
        yield


def _rounding(convert: Callable[..., Any]) -> Callable[..., Any]:
    def rounding(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source.name != "fp32" or target.name not in _ROUNDED:
            return convert(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values).view(np.float32)).to(_ROUNDED[target.name])
        bits = torch.uint8 if rounded.element_size() == 1 else torch.uint16
        return rounded.view(bits).numpy().reshape(values.shape)

    return rounding


def _counting(patch: Callable[..., None]) -> Callable[..., None]:
    def counting(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return counting


def _multiplying(dot: Callable[..., Any]) -> Callable[..., Any]:
    def multiplying(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, _widened(a), _widened(b), *rest)

    return multiplying


def _widened(handle: Any) -> Any:
    """A matrix of bfloat16, which the interpreter keeps as 16-bit integers, in float32."""
    if handle.dtype.name != "bf16":
        return handle
    wide = (handle.data.astype(np.uint32) << 16).view(np.float32)
    return type(handle)(wide, importlib.import_module("triton.language").float32)
