"""Tensors of published models, and what to do to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "dit" / "weights_d128h2l2.safetensors"
Tensors = dict[str, Tensor]


def full_size(name: str) -> Tensors:
    """The tensors of a published model without their values."""
    table = json.loads((GOLDEN / "checkpoint_keys" / f"{name}.json").read_text())["keys"]
    return {key: torch.empty(shape, device="meta") for key, shape in table.items()}


def shallower(tensors: Tensors, last: int) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(f"blocks.{last}.")}


def without(*names: str) -> Callable[[Tensors], Any]:
    return lambda w: {name: tensor for name, tensor in w.items() if name not in names}
