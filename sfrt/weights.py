"""Filling a module with tensors by name, strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sfrt.errors import BundleError

_SHOWN = 3


def assign(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Make the tensors the module's parameters, as they are: no copy, their dtype and device.

    `what` names the module in the error. Raises BundleError where a name or a shape differs, or a dtype of eight bits:
    any wider float may stand for another, but quantised weights are what they are.
    """
    expected = module.state_dict()
    common = expected.keys() & weights.keys()
    faults = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "misshapen": {name for name in common if expected[name].shape != weights[name].shape},
        "of another type": {name for name in common if _differ(expected[name].dtype, weights[name].dtype)},
    }
    told = [f"{len(names)} {fault} ({few(sorted(names))})" for fault, names in faults.items() if names]
    if told:
        raise BundleError(
            f"the tensors of {what} do not fit its settings: {', '.join(told)}; they belong to another model"
        )
    module.load_state_dict(dict(weights), strict=True, assign=True)


def _differ(one: torch.dtype, other: torch.dtype) -> bool:
    return one != other and 1 in {one.itemsize, other.itemsize}


def few(names: Iterable[str]) -> str:
    """The first few names, and an ellipsis for the rest."""
    first = list(names)
    return ", ".join(first[:_SHOWN]) + (", …" if len(first) > _SHOWN else "")
