"""Rows as e4m3 values and scales by csrc/gelu.cu, with the activation in front or without."""

from __future__ import annotations

from ctypes import c_int, c_int64, c_void_p

import torch
from torch import Tensor

from sfrt.ops.checks import row_stride
from sfrt.ops.cuda_kernels.library import DTYPE_CODES, address, function
from sfrt.ops.op import FLOAT8

_quantize_rows = function("sfrt_quantize_rows", c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int, c_int)


def gelu_float8(x: Tensor) -> tuple[Tensor, Tensor]:
    """See sfrt.ops.gelu.gelu_float8."""
    return _quantized(x, with_gelu=True)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """See sfrt.ops.gelu.quantize_rows."""
    return _quantized(x, with_gelu=False)


def _quantized(x: Tensor, *, with_gelu: bool) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    out = torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    rows = (address(x), address(out), address(scales), x.numel() // width, width, row_stride(x))
    _quantize_rows(x, *rows, with_gelu, DTYPE_CODES[x.dtype])
    return out, scales
