"""Keys moved along the frame axis: what rotary phases of other positions would have made of them.

A rotary phase turns pairs of features by an angle that grows with the position, and turns add up (arXiv 2104.09864,
section 3.2). So a key that is to be seen n frames on takes one more turn by n, the same for all tokens of its frame,
in the pairs that belong to the frame axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt.ops.eight_bits import FLOAT8, LARGEST


def shift_keys(features: Tensor, shift: int, rotary_base: float) -> Tensor:
    """The frame axis' features of keys, [..., 2·n], as `shift` frames further on; turned in float32, dtype kept.

    The phase is computed in float64, so that a shift of millions of frames is as exact as one of a few. Shift keys as
    they were first written: rounding adds up in those that were shifted before.
    """
    pairs = features.shape[-1] // 2
    exponents = torch.arange(pairs, dtype=torch.float64, device=features.device) / pairs
    angle = shift * torch.pow(rotary_base, -exponents)
    phase = torch.polar(torch.ones_like(angle), angle).to(torch.complex64)
    turned = torch.view_as_complex(features.float().unflatten(-1, (pairs, 2))) * phase
    shifted = torch.view_as_real(turned).flatten(-2)
    if features.dtype == FLOAT8:  # where rounding up goes beyond the largest value, that becomes no number by itself
        shifted = shifted.clamp_(-LARGEST[FLOAT8], LARGEST[FLOAT8])
    return shifted.to(features.dtype)
