"""Noise of whole latent frames: a program makes a block of one frame, four normals to a counter."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.triton_kernels.launch import Launch, Launches
from sfrt.ops.triton_kernels.philox import normals

BLOCK = 512
"""Elements of a program: few, so that even a single frame has programs enough to fill a GPU."""


@triton.jit(do_not_specialize=["step"])
def _noise(seed, first_frame, out, step, elements, BLOCK: tl.constexpr):
    frame = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    group = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    values = normals(seed, first_frame, frame, step, group)
    tl.store(out + frame.to(tl.int64) * elements + element, values, mask=element < elements)


@Launches
def noise(
    seed: Tensor, frame: Tensor, step: int, frames: int, tokens: int, token_dim: int
) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.noise.noise."""
    out = torch.empty(frames * tokens, token_dim, dtype=torch.float32, device=seed.device)
    elements = tokens * token_dim
    arguments = {"seed": seed, "first_frame": frame, "out": out, "step": step, "elements": elements}
    grid = (triton.cdiv(elements, BLOCK), frames)
    return (Launch(_noise, grid, arguments, {"BLOCK": BLOCK}),), out
