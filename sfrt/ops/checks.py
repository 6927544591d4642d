"""What kernels ask of their arguments, checked once before a call, in one sentence that names the value."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sfrt.errors import KernelInputError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(condition: bool, op: str, message: str) -> None:
    """Raise KernelInputError unless the condition holds."""
    if not condition:
        raise KernelInputError(f"{op}: {message}")


def require_rows(op: str, name: str, tensor: Tensor, width: int | None = None) -> None:
    """A float tensor [..., n] of dense rows, the rows one even distance apart."""
    require(tensor.dtype in FLOATS, op, f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float16")
    require(tensor.ndim >= 1, op, f"{name} has no dimension; it must be [..., {width or 'n'}]")
    require(
        width is None or tensor.shape[-1] == width, op, f"{name} is {list(tensor.shape)}; its rows must have {width}"
    )
    require(tensor.stride(-1) == 1, op, f"{name} has strides {tensor.stride()}; its rows must be dense")
    require(row_stride(tensor) is not None, op, f"the rows of {name} (strides {tensor.stride()}) lie unevenly apart")


def row_stride(tensor: Tensor) -> int | None:
    """The distance between neighbouring rows of [..., n], counted over all leading dimensions; None if uneven."""
    stride: int | None = None
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if stride is None:
            stride, reach = step, step * size
        elif step != reach:
            return None
        else:
            reach = step * size
    return tensor.shape[-1] if stride is None else stride


def require_like(op: str, name: str, tensor: Tensor, other: Tensor) -> None:
    """The shape, dtype and device of another tensor."""
    require(
        tensor.shape == other.shape and tensor.dtype == other.dtype,
        op,
        f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be {other.dtype} {list(other.shape)}",
    )
    require_device(op, name, tensor, other.device)


def require_vector(op: str, name: str, tensor: Tensor, length: int, device: torch.device) -> None:
    """A dense float vector."""
    require(
        tensor.shape == (length,) and tensor.dtype in FLOATS and tensor.is_contiguous(),
        op,
        f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be a dense float vector of {length}",
    )
    require_device(op, name, tensor, device)


def require_shape(op: str, name: str, tensor: Tensor, shape: Sequence[int], dtype: torch.dtype) -> None:
    """A dense tensor of one shape and dtype."""
    require(
        tuple(tensor.shape) == tuple(shape) and tensor.dtype == dtype and tensor.is_contiguous(),
        op,
        f"{name} is {tensor.dtype} {list(tensor.shape)}; it must be dense {dtype} {list(shape)}",
    )


def require_device(op: str, name: str, tensor: Tensor, device: torch.device) -> None:
    """A tensor on this device."""
    require(tensor.device == device, op, f"{name} is on {tensor.device} and the rest on {device}")
