"""csrc/rolling_kv.cu."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from sfrt.ops.cuda_kernels.library import DTYPE_CODES, address, function

_queue = function("sfrt_rolling_kv", *[c_void_p] * 10, *[c_int64] * 6, c_float, c_int)


def rolling_kv(
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    rotary: Tensor,
    slots: Tensor,
    k_ring: Tensor,
    v_ring: Tensor,
    eps: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """See sfrt.ops.rolling_kv.rolling_kv."""
    heads, places, size = k_ring.shape
    length, frames = len(qkv), len(slots)
    tokens = length // frames
    q = torch.empty((length, heads, size), dtype=qkv.dtype, device=qkv.device)
    pointers = map(address, (qkv, norm_q, norm_k, rotary, slots, q, k_ring, v_ring, k_scale, v_scale))
    sizes = frames, tokens, heads, size, places // tokens, qkv.stride(0)
    _queue(qkv, *pointers, *sizes, eps, DTYPE_CODES[qkv.dtype])
    return q, k_ring, v_ring
