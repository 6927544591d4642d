"""csrc/denoise.cu: the update between two passes, and the last one."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from sfrt.config import ModelConfig
from sfrt.ops.cuda_kernels.library import DTYPE_CODES, address, function
from sfrt.ops.denoise import Update

_denoise = function(
    "sfrt_denoise",
    *(c_void_p, c_void_p, c_int, c_float, c_float, c_float, c_void_p, c_void_p),
    *(c_int64, c_int64, c_int64, c_void_p, c_void_p),
)
_finish = function("sfrt_finish", c_void_p, c_void_p, c_int, c_float, *[c_int64] * 6, c_void_p, c_void_p)


def denoise(
    x: Tensor, flow: Tensor | None, update: Update, seed: Tensor, frame: Tensor, step: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """See sfrt.ops.denoise.denoise."""
    out = torch.empty_like(x)
    copy = torch.empty_like(flow) if flow is not None and flow.dtype != x.dtype else None
    elements = tokens * x.shape[1]
    _denoise(
        x,
        *(address(x), address(flow), DTYPE_CODES[x.dtype if flow is None else flow.dtype]),
        *(update.follow, update.keep, update.fresh, address(seed), address(frame)),
        *(step, x.numel() // elements, elements, address(out), address(copy)),
    )
    return out, out if copy is None else copy


def finish(x: Tensor, flow: Tensor, sigma: float, model: ModelConfig, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """See sfrt.ops.denoise.finish."""
    _, patch_rows, patch_columns = model.patch_size
    frames, channels = x.shape[0] // (rows * columns), model.latent_channels
    clean = torch.empty_like(flow)
    shape = (frames, channels, rows * patch_rows, columns * patch_columns)
    latents = torch.empty(shape, dtype=x.dtype, device=x.device)
    _finish(
        x,
        *(address(x), address(flow), DTYPE_CODES[flow.dtype], sigma),
        *(frames, rows, columns, channels, patch_rows, patch_columns, address(clean), address(latents)),
    )
    return clean, latents
