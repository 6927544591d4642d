"""Which implementation of each op runs on a device, and why: decided here, once, when a model is opened.

On a CPU everything is torch. On a GPU an op takes the first of its kernels that can be used there, else torch; where
no kernel is the fastest on every GPU, as of attention, it takes the one that is measured to be the fastest on this one.
`SFRT_OPS` pins what it names: "torch" for all ops, or "modulate=torch,rolling_kv=cuda" for some.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar, cast, get_args

import torch

from sfrt.errors import ConfigError, DeviceError
from sfrt.ops.catalogue import OPS
from sfrt.ops.fastest import fastest, surroundings, user_memory
from sfrt.ops.op import ImplementationName, Maker, Op

P = ParamSpec("P")
R = TypeVar("R")

PINS_VARIABLE = "SFRT_OPS"

Pins = Mapping[str, ImplementationName]


@dataclass(frozen=True)
class Choice:
    """The implementation an op runs with, and the reason in words."""

    op: str
    implementation: ImplementationName
    reason: str


class Ops:
    """The implementations that one model runs with. Called with an op, it gives the function to run."""

    def __init__(
        self,
        device: torch.device,
        pins: Pins | None = None,
        dtype: torch.dtype = torch.bfloat16,
        workloads: Mapping[str, Maker] | None = None,
    ) -> None:
        """pins names implementations of some ops; None takes them from SFRT_OPS.

        Where implementations are measured, it is in dtype, on what workloads makes for an op by its name, or on the
        first of the op's own sizes.

        Raises ConfigError for a pin that names no op or no implementation, or one that cannot run on the device.
        """
        self._device, self._dtype = device, dtype
        self._pins = pins_from(os.environ.get(PINS_VARIABLE, "")) if pins is None else pins
        self._workloads = workloads or {}
        self._chosen: dict[str, tuple[Choice, Callable[..., Any]]] = {}
        for op in OPS:
            if op.name in self._pins:
                self._chosen[op.name] = _pinned(op, self._pins[op.name], device)

    def __call__(self, op: Op[P, R]) -> Callable[P, R]:
        return cast("Callable[P, R]", self._choose(op)[1])

    @property
    def choices(self) -> tuple[Choice, ...]:
        """What every op runs as here, and why."""
        return tuple(self._choose(op)[0] for op in OPS)

    def _choose(self, op: Op[..., Any]) -> tuple[Choice, Callable[..., Any]]:
        """Made when it is first asked for: what is never run is never measured."""
        if op.name not in self._chosen:
            workload = self._workloads.get(op.name) or next(iter(op.sizes.values()))
            self._chosen[op.name] = _choose(op, self._device, self._dtype, workload)
        return self._chosen[op.name]


def torch_ops() -> Ops:
    """The references of all ops, on any device: plain torch, which passes gradients."""
    return Ops(torch.device("cpu"), pins={op.name: "torch" for op in OPS})


def pins_from(text: str) -> dict[str, ImplementationName]:
    """The pins that SFRT_OPS's text names. Raises ConfigError where one makes no sense."""
    pins: dict[str, ImplementationName] = {}
    kernels = {op.name: ("torch", *op.kernels) for op in OPS}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, implementation = part.rpartition("=")
        if implementation not in get_args(ImplementationName):
            known = ", ".join(get_args(ImplementationName))
            raise ConfigError(f"{PINS_VARIABLE} asks for {part!r}; an implementation is one of: {known}")
        if separator and name not in kernels:
            raise ConfigError(
                f"{PINS_VARIABLE} pins {name!r}, and no op is called so; choose from {', '.join(kernels)}"
            )
        if separator and implementation not in kernels[name]:
            raise ConfigError(f"{PINS_VARIABLE}: {name} has no {implementation} kernel, but {', '.join(kernels[name])}")
        names = [name] if separator else [each for each, has in kernels.items() if implementation in has]
        pins |= dict.fromkeys(names, cast(ImplementationName, implementation))
    return pins


def _pinned(op: Op[..., Any], name: ImplementationName, device: torch.device) -> tuple[Choice, Callable[..., Any]]:
    reason = None if name == "torch" else why_not(op, name, device)
    if reason is not None:
        raise ConfigError(f"{op.name} cannot run as {name}: {reason}")
    return Choice(op.name, name, "pinned"), op.load(name)


def _choose(
    op: Op[..., Any], device: torch.device, dtype: torch.dtype, workload: Maker
) -> tuple[Choice, Callable[..., Any]]:
    if device.type != "cuda":
        return Choice(op.name, "torch", "torch's own is what runs on a CPU"), op.reference
    if op.measured:
        return _fastest(op, device, dtype, workload)
    reasons: list[str] = []
    for name in op.kernels:
        reason = why_not(op, name, device)
        if reason is None:
            return Choice(op.name, name, "; ".join([*reasons, "usable here"])), op.load(name)
        reasons.append(f"no {name}: {reason}")
    return Choice(op.name, "torch", "; ".join(reasons) or "it has no kernel"), op.reference


def _fastest(
    op: Op[..., Any], device: torch.device, dtype: torch.dtype, workload: Maker
) -> tuple[Choice, Callable[..., Any]]:
    """The fastest here of an op's implementations, the reference among them."""
    if dtype not in op.tolerance:
        return Choice(op.name, "torch", f"no kernel takes {dtype}"), op.reference
    reasons = {name: why_not(op, name, device) for name in op.kernels}
    candidates: dict[str, Callable[..., Any]] = {"torch": op.reference}
    candidates |= {name: op.load(name) for name, reason in reasons.items() if reason is None}
    around, memory = surroundings(device), user_memory()
    ranking = fastest(op, candidates, workload, dtype, device, around=around, memory=memory)
    missing = [f"no {name}: {reason}" for name, reason in reasons.items() if reason is not None]
    winner = cast(ImplementationName, ranking.winner)
    return Choice(op.name, winner, "; ".join([f"the fastest: {ranking}", *missing])), candidates[winner]


def why_not(op: Op[..., Any], name: ImplementationName, device: torch.device) -> str | None:
    """Why a kernel cannot run on a device; None where it can."""
    if device.type != "cuda" and not (name == "triton" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"it needs a CUDA device, and this is {device}"
    try:
        op.kernel(name)
    except (ModuleNotFoundError, DeviceError) as error:
        return str(error)
    return None
