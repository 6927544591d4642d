"""What an operation is: its definition, its implementations, and all that proving and timing them needs, declared once.

An op lives in one file of this folder: a plain torch reference, which is what it means and what runs on a CPU, and an
`Op` that names the kernels doing the same. Tests and benchmarks find ops by it (`sfrt.ops.catalogue`), so a new kernel
is tested against the reference, poisoned, compiled ahead of time and timed by being named there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Literal, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

ImplementationName = Literal["torch", "triton", "cuda", "cudnn", "flash", "flash2", "flash3"]
"""torch is the reference; triton is compiled by Triton; cuda is a kernel of csrc/.

cudnn and flash are cuDNN's and FlashAttention's as torch brings them; flash2 and flash3 FlashAttention's own packages.
"""

KERNELS: tuple[ImplementationName, ...] = ("triton", "cuda")

FLOAT8 = torch.float8_e4m3fn


class Draw:
    """Fresh random inputs in one dtype on one device; the same seed gives the same ones."""

    def __init__(self, dtype: torch.dtype, device: torch.device, seed: int = 0) -> None:
        self.dtype = dtype
        self.device = device
        self._generator = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, std: float = 1.0, mean: float = 0.0) -> Tensor:
        """Normals, contiguous, in the draw's dtype unless another is given; on the meta device, their shape alone."""
        if self._generator is None:
            return torch.empty(shape, dtype=dtype or self.dtype, device=self.device)
        drawn = torch.randn(shape, generator=self._generator, device=self.device, dtype=torch.float32)
        return (drawn * std + mean).to(dtype or self.dtype)

    def strided(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Normals whose rows lie apart, as those of a part of a wider tensor do; a row itself is dense."""
        *leading, width = shape
        return self.normal(*leading, width + 24, dtype=dtype)[..., 8 : 8 + width]

    def integers(self, *values: int, dtype: torch.dtype = torch.int64) -> Tensor:
        """These very integers, on the device."""
        return torch.tensor(values, dtype=dtype, device=self.device)


Inputs = dict[str, Any]
"""Keyword arguments of an op."""

Maker = Callable[[Draw], Inputs]


@dataclass(frozen=True)
class Cost:
    """The fewest bytes a call must move through device memory, and the operations it does."""

    bytes: int
    operations: int = 0


@dataclass(frozen=True)
class Op(Generic[P, R]):
    """One operation.

    An op returns every tensor it writes, those it was given to write into included, and changes nothing else.
    reference defines it in any float dtype, float64 too. check raises KernelInputError for arguments that kernels would
    read or write wrongly. kernels names, in order of preference, where its other implementations are, as
    "module:function"; a module is imported when its implementation is asked for. cases are odd sizes and strides to
    test with, sizes those of the published model to time with. tolerance bounds ‖out − float64‖ / ‖float64‖. measured
    ops run the fastest of their implementations on the GPU at hand instead of the first.
    """

    name: str
    reference: Callable[P, R]
    check: Callable[..., None]
    kernels: Mapping[ImplementationName, str]
    cases: Mapping[str, Maker]
    sizes: Mapping[str, Maker]
    cost: Callable[..., Cost]
    tolerance: Mapping[torch.dtype, float]
    measured: bool = False

    def kernel(self, name: ImplementationName) -> Callable[P, R]:
        """A kernel by name, as it is: it trusts its arguments.

        Raises ModuleNotFoundError or DeviceError where what it stands on is missing.
        """
        module, _, function = self.kernels[name].partition(":")
        found: Callable[P, R] = getattr(importlib.import_module(module), function)
        return found

    def load(self, name: ImplementationName) -> Callable[P, R]:
        """An implementation by name, to be called by anyone: kernels check their arguments first. Raises as kernel."""
        if name == "torch":
            return self.reference
        kernel, check = self.kernel(name), self.check

        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            check(*args, **kwargs)
            return kernel(*args, **kwargs)

        return checked


def tensors_of(result: Any) -> tuple[Tensor, ...]:
    """What an op returned, as a tuple of tensors."""
    return (result,) if isinstance(result, Tensor) else tuple(part for part in result if part is not None)


def nbytes(*tensors: Tensor | None) -> int:
    """The bytes of all these tensors together."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)
