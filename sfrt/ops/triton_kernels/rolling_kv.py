"""Norm, rotary phases and the way into the ring in one pass: one program per token, its rows in registers as heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.eight_bits import LARGEST
from sfrt.ops.op import FLOAT8
from sfrt.ops.triton_kernels.launch import Launch, Launches, power_of_two
from sfrt.ops.triton_kernels.qk_norm import rms_normed


@triton.jit
def _rotated(x, cos, sin, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (HEADS, PAIRS, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (HEADS, 2 * PAIRS))


@triton.jit
def _in_ring(x, scale, head, heads, ring, largest):
    """Keys or values [H, d] as their ring keeps them."""
    if scale is not None:
        x = x.to(tl.float32) / tl.load(scale + head, mask=head < heads, other=1.0)
        x = tl.clamp(x, -largest, largest)
    return x.to(ring.dtype.element_ty)


@triton.jit
def _rolling_kv(
    qkv, norm_q, norm_k, rotary, slots, q_out, k_ring, v_ring, k_scale, v_scale, qkv_stride, places, eps, largest,
    heads: tl.constexpr, size: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    token, frame, tokens = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    row = (frame * tokens + token).to(tl.int64)
    head = tl.arange(0, HEADS)[:, None]
    feature = tl.arange(0, 2 * PAIRS)[None, :]
    column = head * size + feature
    inside = (head < heads) & (feature < size)
    # Everything is asked for before anything is waited for.
    source = qkv + row * qkv_stride + column
    q = tl.load(source, mask=inside, other=0.0)
    k = tl.load(source + heads * size, mask=inside, other=0.0)
    v = tl.load(source + 2 * heads * size, mask=inside, other=0.0)
    slot = tl.load(slots + frame)
    q_weight = tl.load(norm_q + column, mask=inside, other=0.0)
    k_weight = tl.load(norm_k + column, mask=inside, other=0.0)
    phases = tl.load(rotary + row * size + feature, mask=feature < size, other=0.0)
    cos, sin = tl.split(tl.reshape(phases, (1, PAIRS, 2)))

    q = _rotated(rms_normed(q, q_weight, heads * size, eps), cos, sin, HEADS, PAIRS)
    tl.store(q_out + row * (heads * size) + column, q.to(q_out.dtype.element_ty), mask=inside)
    k = _rotated(rms_normed(k, k_weight, heads * size, eps), cos, sin, HEADS, PAIRS)
    place = (head.to(tl.int64) * places + slot * tokens + token) * size + feature
    tl.store(k_ring + place, _in_ring(k, k_scale, head, heads, k_ring, largest), mask=inside)
    tl.store(v_ring + place, _in_ring(v, v_scale, head, heads, v_ring, largest), mask=inside)


@Launches
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
) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor, Tensor]]:
    """See sfrt.ops.rolling_kv.rolling_kv."""
    heads, places, size = k_ring.shape
    frames, length = len(slots), len(qkv)
    q = torch.empty((length, heads, size), dtype=qkv.dtype, device=qkv.device)
    arguments = {
        "qkv": qkv,
        "norm_q": norm_q,
        "norm_k": norm_k,
        "rotary": torch.view_as_real(rotary),
        "slots": slots,
        "q_out": q,
        "k_ring": k_ring,
        "v_ring": v_ring,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "qkv_stride": qkv.stride(0),
        "places": places,
        "eps": eps,
        "largest": LARGEST[FLOAT8],
    }
    constants = {"heads": heads, "size": size, "HEADS": power_of_two(heads), "PAIRS": power_of_two(size // 2)}
    # Eight features in a thread are one wide access; of a wider row, more of them beat more threads: two blocks fit.
    warps = max(1, min(constants["HEADS"] * constants["PAIRS"] // 128, 8))
    launch = Launch(_rolling_kv, (length // frames, frames), arguments, constants, warps=warps)
    return (launch,), (q, k_ring, v_ring)
