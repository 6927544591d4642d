"""One launch of a Triton kernel as a value: run it, or compile it for a GPU that is not here.

A kernel's file plans its launches from tensors alone, so that the very plan that runs is the one that is compiled ahead
of time: from tensors on any device, "meta" too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True)
class Specialised:
    """What Triton compiles: a kernel's source with its types, constants and alignments, for a GPU, with options.

    key is what it keeps the outcome under, beside the kernel and the device.
    """

    key: str
    source: Any
    target: Any
    options: Any

    def compile(self) -> Any:
        """Triton's compiled kernel."""
        import triton

        return triton.compile(self.source, target=self.target, options=self.options.__dict__)


@dataclass(frozen=True)
class Launch:
    """A kernel, its grid, and its arguments in order: tensors (None: no pointer), sizes, and compile-time constants.

    roomy holds what takes the place of constants on 9.x and 10.x, whose units multiply matrices out of shared memory:
    there is twice as much of it there, and registers stay free.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int = 4
    stages: int = 2
    roomy: dict[str, Any] = field(default_factory=dict)

    def run(self) -> None:
        """Queue it on the current stream of the tensors' device; interpreted where Triton is told to interpret."""
        constants = self.constants_on(_capability_under(self.arguments.values()) if self.roomy else 0)
        self.kernel[self.grid](**self.arguments, **constants, num_warps=self.warps, num_stages=self.stages)

    @property
    def needs(self) -> int:
        """The lowest compute capability it compiles for, as 80 means 8.0."""
        dtypes = {value.dtype for value in self.arguments.values() if isinstance(value, Tensor)}
        return 89 if torch.float8_e4m3fn in dtypes else 80

    def specialised(self, capability: int) -> Specialised:
        """What Triton makes of it for a compute capability such as 90, by the way that a run takes (Triton 3.6)."""
        from triton import knobs
        from triton.compiler import ASTSource
        from triton.runtime.jit import compute_cache_key

        backend, bind = _binder(self.kernel, capability)
        given = {
            **self.arguments,
            **self.constants_on(capability),
            "num_warps": self.warps,
            "num_stages": self.stages,
            "debug": self.kernel.debug or knobs.runtime.debug,
            "instrumentation_mode": knobs.compilation.instrumentation_mode,
        }
        bound, kinds, rest = bind(**given)
        key = compute_cache_key({}, kinds, rest)
        options, signature, constants, attributes = self.kernel._pack_args(backend, given, bound, kinds, rest)
        source = ASTSource(self.kernel, signature, constants, attributes)
        return Specialised(key, source, backend.target, options)

    def compile(self, capability: int) -> Any:
        """Triton's compiled kernel for a compute capability."""
        return self.specialised(capability).compile()

    def constants_on(self, capability: int) -> dict[str, Any]:
        """The compile-time constants on a compute capability."""
        return self.constants | (self.roomy if capability // 10 in (9, 10) else {})


class Launches(Generic[P, R]):
    """A function that plans launches and says what they will have written; called, it runs them."""

    def __init__(self, plan: Callable[P, tuple[tuple[Launch, ...], R]]) -> None:
        self.plan = plan
        update_wrapper(self, plan)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        launches, result = self.plan(*args, **kwargs)
        for launch in launches:
            launch.run()
        return result


@lru_cache
def _binder(kernel: Any, capability: int) -> tuple[Any, Any]:
    """Triton's backend for a compute capability, and its function from a kernel's arguments to what they specialise."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", capability, 32))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


def _capability_under(arguments: Iterable[Any]) -> int:
    """The compute capability of the GPU that the tensors lie on; 0 where it is none."""
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
