"""Filling a module with tensors by name, strictly."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from sfrt.errors import BundleError

_SHOWN = 3


def assign(module: nn.Module, weights: Mapping[str, Tensor], what: str) -> None:
    """Make the tensors the module's parameters, as they are: no copy, their dtype and device.

    `what` names the module in the error. Raises BundleError where a name or a shape differs.
    """
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    faults = {
        "missing": expected.keys() - weights.keys(),
        "unexpected": weights.keys() - expected.keys(),
        "misshapen": {name for name in expected.keys() & weights.keys() if expected[name] != weights[name].shape},
    }
    told = [f"{len(names)} {fault} ({few(sorted(names))})" for fault, names in faults.items() if names]
    if told:
        raise BundleError(
            f"the tensors of {what} do not fit its settings: {', '.join(told)}; they belong to another model"
        )
    module.load_state_dict(dict(weights), strict=True, assign=True)


def few(names: Iterable[str]) -> str:
    """The first few names, and an ellipsis for the rest."""
    first = list(names)
    return ", ".join(first[:_SHOWN]) + (", …" if len(first) > _SHOWN else "")
