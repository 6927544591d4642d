"""One launch of a Triton kernel as a value: run it, or compile it for a GPU that is not here.

A kernel's file plans its launches from tensors alone, so that the very plan that runs is the one that is compiled ahead
of time: from tensors on any device, "meta" too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

_ALIGNED = [["tt.divisibility", 16]]
_POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


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

    def compile(self, capability: int) -> Any:
        """Triton's compiled kernel for a compute capability such as 90, specialised as a run on these tensors is."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        signature: dict[str, str] = {}
        constants, attributes = self.constants_on(capability), {}
        for name, value in self.arguments.items():
            position = (self.kernel.arg_names.index(name),)
            if isinstance(value, Tensor):
                signature[name] = _POINTERS[value.dtype]
                if (value.storage_offset() * value.element_size()) % 16 == 0:
                    attributes[position] = _ALIGNED
            elif value is None or (type(value) is int and value == 1 and name not in self.kernel.do_not_specialize):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "fp32" if isinstance(value, float) else "i32" if abs(value) < 2**31 else "i64"
                if isinstance(value, int) and value % 16 == 0 and name not in self.kernel.do_not_specialize:
                    attributes[position] = _ALIGNED
        signature |= dict.fromkeys(self.constants, "constexpr")
        source = ASTSource(self.kernel, signature, constants, attributes)
        return triton.compile(
            source,
            target=GPUTarget("cuda", capability, 32),
            options={"num_warps": self.warps, "num_stages": self.stages},
        )

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


def _capability_under(arguments: Iterable[Any]) -> int:
    """The compute capability of the GPU that the tensors lie on; 0 where it is none."""
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor


def power_of_two(number: int) -> int:
    """The smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()
