"""Gated residual, LayerNorm, scale and shift by csrc/modulate.cu."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from sfrt.ops.checks import row_stride
from sfrt.ops.cuda_kernels.library import DTYPE_CODES, address, function
from sfrt.ops.op import FLOAT8

_queue = function("sfrt_modulate", *[c_void_p] * 8, *[c_int64] * 4, c_float, c_int)


def modulate(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """See sfrt.ops.modulate.modulate."""
    total, out = _sum_of(x, branch), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _modulate(x, branch, gate, scale, shift, eps, total, out, None)
    return total, out


def modulate_float8(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """See sfrt.ops.modulate.modulate_float8."""
    total, out = _sum_of(x, branch), torch.empty(x.shape, dtype=FLOAT8, device=x.device)
    scales = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    _modulate(x, branch, gate, scale, shift, eps, total, out, scales)
    return total, out, scales


def _modulate(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    total: Tensor,
    out: Tensor,
    scales: Tensor | None,
) -> None:
    width = x.shape[-1]
    read = map(address, (x, branch, gate, scale, shift))
    written = map(address, (None if branch is None else total, out, scales))
    strides = (row_stride(x), 0 if branch is None else row_stride(branch))
    _queue(x, *read, *written, x.numel() // width, width, *strides, eps, DTYPE_CODES[x.dtype])


def _sum_of(x: Tensor, branch: Tensor | None) -> Tensor:
    return x if branch is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
