"""csrc/qk_norm.cu."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from sfrt.ops.checks import row_stride
from sfrt.ops.cuda_kernels.library import DTYPE_CODES, address, function

_queue = function("sfrt_qk_norm", *[c_void_p] * 3, *[c_int64] * 3, c_float, c_int)


def qk_norm(x: Tensor, weight: Tensor, heads: int, eps: float) -> Tensor:
    """See sfrt.ops.qk_norm.qk_norm."""
    width = x.shape[-1]
    out = torch.empty((*x.shape[:-1], heads, width // heads), dtype=x.dtype, device=x.device)
    pointers = address(x), address(weight), address(out)
    _queue(x, *pointers, x.numel() // width, width, row_stride(x), eps, DTYPE_CODES[x.dtype])
    return out
