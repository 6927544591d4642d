"""Attention over the first keys of a ring, of 16 bits or of float8: one program per block of queries and head.

The scores of a block of keys never leave the chip: a running maximum and a running sum per query correct what was added
up so far (online softmax, arXiv 2205.14135, section 3.1; powers of two, so that the scale takes in the logarithm).

Float8 keys and values are widened to float16, which holds every e4m3 value and every bfloat16 query of a normed head,
and whose probabilities are rounded finer than bfloat16's. Against float64 that costs 0.02 % where the ring's own
rounding costs 4 %; queries rounded to e4m3 for products in float8 would cost 2.7 %, probabilities 2.4 %.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.ops.op import FLOAT8
from sfrt.ops.triton_kernels.launch import Launch, Launches, power_of_two

_QUERIES = 128  # of a block; with 8 warps the most that keeps its sums in registers on every GPU
_WARPS = 8


@triton.jit
def _see(
    q, k, v, out, total, largest, first, keys, scale, k_row, v_row, width,
    RAGGED: tl.constexpr, PADDED: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Add one block of keys' share to what its queries have seen so far."""
    rows = first + tl.arange(0, KEYS)
    columns = tl.arange(0, WIDTH)
    inside = None
    zero = None
    if RAGGED or PADDED:
        inside = (rows < keys)[:, None] & (columns < width)[None, :]
        zero = 0.0
    seen = tl.load(k + rows[:, None] * k_row + columns[None, :], mask=inside, other=zero).to(q.dtype)
    scores = tl.dot(q, tl.trans(seen))
    if RAGGED:
        scores = tl.where((rows < keys)[None, :], scores, float("-inf"))
    highest = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - highest[:, None])
    shrink = tl.exp2(largest - highest)
    values = tl.load(v + rows[:, None] * v_row + columns[None, :], mask=inside, other=zero).to(q.dtype)
    out = tl.dot(weights.to(q.dtype), values, out * shrink[:, None])
    return out, total * shrink + tl.sum(weights, 1), highest


@triton.jit(do_not_specialize=["keys"])  # one kernel, however full the ring is
def _attention(
    q, k, v, k_scale, v_scale, out, queries, keys, width, scale,
    q_row, q_head, k_head, k_row, v_head, v_row,
    DTYPE: tl.constexpr, PADDED: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    first_row = tl.program_id(0).to(tl.int64) * QUERIES
    rows = tl.arange(0, QUERIES)
    columns = tl.arange(0, WIDTH)
    inside = (rows < queries - first_row)[:, None] & (columns < width)[None, :]
    q += first_row * q_row + head * q_head
    asking = tl.load(q + rows[:, None] * q_row + columns[None, :], mask=inside, other=0.0).to(DTYPE)
    k += head * k_head
    v += head * v_head
    if k_scale is not None:
        scale *= tl.load(k_scale + head)
    seen = tl.zeros((QUERIES, WIDTH), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    whole = keys // KEYS * KEYS
    for first in tl.range(0, whole, KEYS, num_stages=STAGES):
        seen, total, largest = _see(
            asking, k, v, seen, total, largest, first, keys, scale, k_row, v_row, width, False, PADDED, KEYS, WIDTH
        )
    if whole < keys:
        seen, total, largest = _see(
            asking, k, v, seen, total, largest, whole, keys, scale, k_row, v_row, width, True, PADDED, KEYS, WIDTH
        )
    seen /= total[:, None]
    if v_scale is not None:
        seen *= tl.load(v_scale + head)
    out += (first_row * tl.num_programs(1) + head) * width
    out_row = tl.num_programs(1) * width
    tl.store(out + rows[:, None] * out_row + columns[None, :], seen.to(out.dtype.element_ty), mask=inside)


@Launches
def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.attention.attention. In the interpreter float32 too, to see the method's own error."""
    return _plan(q, k, v, None, None)


@Launches
def attention_float8(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor
) -> tuple[tuple[Launch, ...], Tensor]:
    """See sfrt.ops.attention.attention_float8."""
    return _plan(q, k, v, k_scale, v_scale)


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, FLOAT8: tl.float16}
"""What products over keys of a dtype are done in."""


def _plan(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor | None, v_scale: Tensor | None
) -> tuple[tuple[Launch, ...], Tensor]:
    queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    arguments = {
        "q": q,
        "k": k,
        "v": v,
        "k_scale": k_scale,
        "v_scale": v_scale,
        "out": out,
        "queries": queries,
        "keys": k.shape[1],
        "width": width,
        "scale": width**-0.5 * math.log2(math.e),
        "q_row": q.stride(0),
        "q_head": q.stride(1),
        "k_head": k.stride(0),
        "k_row": k.stride(1),
        "v_head": v.stride(0),
        "v_row": v.stride(1),
    }
    block = max(16, power_of_two(width))  # the least that a matrix unit takes
    constants = {
        "DTYPE": _DTYPES[k.dtype],
        "PADDED": block != width,
        "QUERIES": _QUERIES,
        "KEYS": 32,
        "WIDTH": block,
        "STAGES": 3,
    }
    grid = (triton.cdiv(queries, _QUERIES), heads)
    roomy = {"KEYS": 128, "STAGES": 2}
    return (Launch(_attention, grid, arguments, constants, warps=_WARPS, roomy=roomy),), out
