"""Numbers in eight bits with a float32 scale for each row: x ≈ values · scale, in int8 or e4m3 (float8).

Symmetric: a row's largest value becomes the largest that the type has.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8 = torch.float8_e4m3fn
LARGEST = {torch.int8: 127.0, FLOAT8: 448.0}

_SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # a row of zeros has a scale too: TensorRT wants them positive


@dataclass(frozen=True)
class Float8Rows:
    """Rows as a float8 product takes them: e4m3 values [..., n], and the float32 scale of each, [..., 1]."""

    values: Tensor
    scale: Tensor


Rows = Tensor | Float8Rows
"""What a product reads, [..., n]."""


def has_float8(device: torch.device) -> bool:
    """Whether kernels know e4m3 there: on GPUs of compute capability 8.9 and later."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def row_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The scale of each row, float32 [..., 1] from [..., n]."""
    return scales_up_to(x.abs().amax(dim=-1, keepdim=True).float(), dtype)


def scales_up_to(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales of what is as large as this, float32."""
    return (largest / LARGEST[dtype]).clamp_min(_SMALLEST_SCALE)


def quantize(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The values nearest to x / scale, ties to even; what is beyond the type's range becomes its largest value."""
    values = (x.float() / scale).clamp_(-LARGEST[dtype], LARGEST[dtype])
    return (values.round_() if dtype == torch.int8 else values).to(dtype)
