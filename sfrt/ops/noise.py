"""The noise a chunk starts from, made where it is needed: sfrt.noise's normals for seeds and frames on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt.noise import normals
from sfrt.ops.checks import require, require_device, require_shape
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op

MAX_FRAMES = 65535
"""Latent frames of one call; they ride on the second axis of a kernel's grid."""

MAX_ELEMENTS = 2**30
"""Values of one latent frame; kernels count them in 32 bits."""


def noise(seed: Tensor, frame: Tensor, step: int, frames: int, tokens: int, token_dim: int) -> Tensor:
    """Standard normals of `frames` latent frames at a step, float32 [frames · tokens, token_dim].

    seed is int64 [1], the bits of the 64-bit seed (sfrt.noise.seed_bits); frame is int64 [1], the number of the first
    frame. Both lie on the device, so that a captured graph makes other noise for another chunk or stream.
    """
    numbers = frame + torch.arange(frames, device=frame.device)
    return normals(seed, numbers, torch.full_like(frame, step), tokens * token_dim).reshape(-1, token_dim)


def check(seed: Tensor, frame: Tensor, step: int, frames: int, tokens: int, token_dim: int) -> None:
    """What the kernels take: counts that fit their counters."""
    require(frames > 0 and tokens > 0 and token_dim > 0, "noise", f"{frames}×{tokens}×{token_dim} values are none")
    require_counters("noise", seed, frame, step, frames, tokens * token_dim)


def require_counters(op: str, seed: Tensor, frame: Tensor, step: int, frames: int, elements: int) -> None:
    """What the generator's counter is made of: seed and frame as int64 [1] on one device, the rest within its words."""
    for name, number in (("seed", seed), ("frame", frame)):
        require_shape(op, name, number, (1,), torch.int64)
        require_device(op, name, number, seed.device)
    require(0 <= step < 2**31, op, f"step is {step}; it must be from 0 to 2147483647")
    require(frames <= MAX_FRAMES, op, f"there are {frames} frames; kernels take at most {MAX_FRAMES}")
    require(elements <= MAX_ELEMENTS, op, f"a frame has {elements} values; kernels take at most {MAX_ELEMENTS}")


def _draw(seed: int, frame: int, step: int, frames: int, tokens: int, token_dim: int) -> Maker:
    def make(draw: Draw) -> Inputs:
        return {
            "seed": draw.integers(seed),
            "frame": draw.integers(frame),
            "step": step,
            "frames": frames,
            "tokens": tokens,
            "token_dim": token_dim,
        }

    return make


def _cost(seed: Tensor, frame: Tensor, step: int, frames: int, tokens: int, token_dim: int) -> Cost:
    """The normals written; Philox's ten rounds are some 90 integer operations for four of them."""
    count = frames * tokens * token_dim
    return Cost(4 * count, 40 * count)


NOISE = Op(
    name="noise",
    reference=noise,
    check=check,
    kernels={"triton": "sfrt.ops.triton_kernels.noise:noise", "cuda": "sfrt.ops.cuda_kernels.noise:noise"},
    cases={
        "one token": _draw(0, 0, 0, 1, 1, 4),
        "odd frames": _draw(12345678901, 7, 1, 3, 7, 9),
        "largest seed": _draw(-1, 2**32 - 2, 3, 2, 10, 48),
        "seed above 2**63": _draw(11 - 2**63, 2**31, 0, 1, 6, 64),
    },
    sizes={"chunk of 3": _draw(1, 21, 0, 3, 1560, 64), "frame": _draw(1, 21, 0, 1, 1560, 64)},
    cost=_cost,
    tolerance={torch.float32: 1e-6},
)
