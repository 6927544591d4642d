"""Normals as a pure function of (seed, latent frame, step, element), the same on every device and backend.

The generator is Philox 4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) with the 64-bit
seed as its key, the one behind Triton's `tl.randn4x`, so that a kernel can make the same numbers in place:

    counter = (element // 4, frame, step, 0)         four 32-bit words
    key     = (seed mod 2**32, seed // 2**32)
    normals = Box-Muller of output words (0, 1) and (2, 3): elements 4i … 4i + 3

Elements of a frame are numbered in token layout, token · token_dim + feature, which latents keep between the steps.
Step 0 is the noise a chunk starts from; step k > 0 is what is mixed in before denoising step k.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfrt.errors import ConfigError

_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_WORD = 0xFFFFFFFF
_UNIFORM_SCALE = 4.6566127342e-10  # just under 2**-31, as in Triton's uint_to_uniform_float
_SMALLEST_UNIFORM = 1e-7  # keeps the logarithm finite, as in Triton's pair_uniform_to_normal

MAX_SEED = 2**64 - 1


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox 4x32-10 on int64 tensors that hold 32-bit words; the counters broadcast against each other.

    seed is an integer below 2**64, or an int64 tensor [1] of its bits (see seed_bits).
    """
    words = torch.stack(torch.broadcast_tensors(*counter))
    half = torch.arange(2, device=words.device).view(-1, *[1] * (words.ndim - 1))  # words 0 and 1, words 2 and 3
    multiplier, key_step = _by_half(_MULTIPLIERS, half), _by_half(_KEY_STEPS, half)
    bits = seed if isinstance(seed, Tensor) else torch.full_like(half, seed_bits(seed))
    even, odd, key = words[0::2], words[1::2], bits >> 32 * half
    for _ in range(_ROUNDS):
        # A product wraps as int64, but its 64 bits are those of the unsigned product; odd and key keep high bits too.
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_xor_(odd).bitwise_xor_(key).bitwise_and_(_WORD)
        odd, key = product, key + key_step
    odd = odd & _WORD
    return even[0], odd[0], even[1], odd[1]


def normals(seed: int | Tensor, frame: Tensor, step: Tensor, elements: int) -> Tensor:
    """Standard normals of whole frames, float32 [..., elements]; frame and step (int64) broadcast against each other.

    seed is as philox takes it; frame numbers count modulo 2**32.
    """
    element = torch.arange(-(-elements // 4), device=frame.device)
    counter = (element, frame.unsqueeze(-1) & _WORD, step.unsqueeze(-1), torch.zeros_like(element))
    words = philox(counter, seed)
    return torch.stack((*_normal_pair(*words[:2]), *_normal_pair(*words[2:])), dim=-1).flatten(-2)[..., :elements]


def chunk_noise(seed: int, frames: range, steps: range, tokens: int, token_dim: int, device: torch.device) -> Tensor:
    """Standard normals for some latent frames at some steps, float32 [steps, frames · tokens, token_dim].

    tokens is the number of tokens per latent frame; seed is what check_seed lets pass.
    """
    frame = torch.arange(frames.start, frames.stop, device=device)
    step = torch.arange(steps.start, steps.stop, device=device).unsqueeze(-1)
    return normals(seed, frame, step, tokens * token_dim).reshape(len(steps), len(frames) * tokens, token_dim)


def seed_bits(seed: int) -> int:
    """The seed as the signed number with the same 64 bits, which an int64 tensor can hold."""
    return seed - 2**64 if seed >= 2**63 else seed


def check_seed(seed: int) -> None:
    """Raise ConfigError unless seed is an integer in [0, 2**64)."""
    if not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ConfigError(f"seed {seed} is out of range; choose an integer from 0 to {MAX_SEED}")


def _by_half(pair: tuple[int, int], half: Tensor) -> Tensor:
    """The first of a pair where half is 0, the second where it is 1; nothing is copied from the host."""
    return pair[0] + (pair[1] - pair[0]) * half


def _uniform(word: Tensor) -> Tensor:
    """A 32-bit word, read as signed and folded to its magnitude, scaled to float32 in [0, 1)."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    return torch.where(signed < 0, -signed - 1, signed).to(torch.float32) * _UNIFORM_SCALE


def _normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Box-Muller in float32."""
    radius = torch.sqrt(-2.0 * torch.log(_uniform(first).clamp_min(_SMALLEST_UNIFORM)))
    angle = (2.0 * math.pi) * _uniform(second)
    return radius * torch.cos(angle), radius * torch.sin(angle)
