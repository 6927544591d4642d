"""csrc/noise.cu: noise of whole latent frames."""

from __future__ import annotations

from ctypes import c_int64, c_void_p

import torch
from torch import Tensor

from sfrt.ops.cuda_kernels.library import address, function

_noise = function("sfrt_noise", c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64)


def noise(seed: Tensor, frame: Tensor, step: int, frames: int, tokens: int, token_dim: int) -> Tensor:
    """See sfrt.ops.noise.noise."""
    out = torch.empty(frames * tokens, token_dim, dtype=torch.float32, device=seed.device)
    _noise(out, address(out), address(seed), address(frame), step, frames, tokens * token_dim)
    return out
