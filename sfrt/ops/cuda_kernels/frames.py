"""csrc/frames.cu: decoder output to uint8 frames."""

from __future__ import annotations

from ctypes import c_float, c_int, c_int64, c_void_p

import torch
from torch import Tensor

from sfrt.ops.cuda_kernels.library import DTYPE_CODES, address, function
from sfrt.ops.frames import planes_of, scaling

_frames = function("sfrt_frames", c_void_p, c_int, *[c_int64] * 8, c_float, c_float, c_void_p)


def frames(pixels: Tensor, black: float = 0.0, white: float = 1.0) -> Tensor:
    """See sfrt.ops.frames.frames."""
    count, _, height, width = pixels.shape
    out = torch.empty(count, height, width, 3, dtype=torch.uint8, device=pixels.device)
    walked = planes_of(pixels)
    place = (address(walked), DTYPE_CODES[walked.dtype])
    _frames(out, *place, *walked.shape, *walked.stride(), *scaling(black, white), address(out))
    return out
