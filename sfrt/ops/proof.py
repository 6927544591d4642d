"""How an implementation is held against its op's definition: in double precision, on memory full of NaN."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor

from sfrt.ops.checks import FLOATS
from sfrt.ops.op import Inputs, Op, tensors_of


def errors_of(op: Op[..., Any], function: Callable[..., Any], inputs: Inputs) -> tuple[float, ...]:
    """‖out − expected‖ / ‖expected‖ of everything the function returns; infinite where it left something unwritten.

    expected is the reference in float64. The inputs themselves are left as they are.
    """
    expected = tensors_of(op.reference(**copied(inputs, double=True)))
    found = tensors_of(function(**copied(inputs)))
    return tuple(_relative(out, wanted) for out, wanted in zip(found, expected, strict=True))


def copied(inputs: Inputs, *, double: bool = False) -> Inputs:
    """The same inputs in other memory, of the same strides; in double precision where they are floats."""
    return {name: _copy(value, double) if isinstance(value, Tensor) else value for name, value in inputs.items()}


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory of torch is full of NaN, or of the largest integer, in here."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _copy(value: Tensor, double: bool) -> Tensor:
    if double and value.dtype in FLOATS:
        return value.double()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _relative(out: Tensor, expected: Tensor) -> float:
    wanted = expected.double()
    error = float((out.double() - wanted).norm() / wanted.norm().clamp_min(1e-12))
    return inf if isnan(error) else error
