"""Softmax attention without a mask: what a pass may see is decided by which keys it is given.

Keys and values come heads first, as rings keep them: a head's keys are then a dense matrix, whatever slots they fill,
and those to be seen are the first of a ring. No implementation is the fastest on every GPU, so which one runs is
measured (sfrt.ops.fastest).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfrt.ops.checks import require, require_device, require_shape
from sfrt.ops.op import FLOAT8, Cost, Draw, Inputs, Maker, Op, nbytes

_QUERY_BLOCK = 512  # rows of scores made at once: bounds the work space at long rings
_LARGEST_HEAD = 128
_HALVES = (torch.bfloat16, torch.float16)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., L, H, d] from queries [..., L, H, d] and keys and values [..., H, S, d]."""
    on_cpu = q.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and q.ndim == 3 and q.dtype == torch.float32 and not q.requires_grad:
        return _onednn_attention(q, k, v)
    queries = q.transpose(-2, -3).reshape(-1, *k.shape[-3:-2], q.shape[-3], q.shape[-1])
    out = F.scaled_dot_product_attention(queries, k.reshape(-1, *k.shape[-3:]), v.reshape(-1, *v.shape[-3:]))
    return out.transpose(1, 2).reshape(q.shape)


def attention_float8(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> Tensor:
    """As attention, over keys ≈ k · k_scale and values ≈ v · v_scale: e4m3 [H, S, d], float32 scales [H]."""
    scaled = (q * k_scale[:, None]).to(q.dtype)
    return (attention(scaled, k.to(q.dtype), v.to(q.dtype)) * v_scale[:, None]).to(q.dtype)


def _onednn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same on a CPU in float32, by oneDNN's products, which are faster there than torch's own attention.

    Its product wants dense weights, which a head's keys [S, d] are; a strided one would fall back to a reference loop.
    """
    product = torch.ops.mkldnn._linear_pointwise
    out = torch.empty_like(q)
    scaled = q * q.shape[-1] ** -0.5
    for head in range(q.shape[1]):
        keys, values = k[head], v[head].t()
        for start in range(0, q.shape[0], _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            scores = product(scaled[rows, head], keys, None, "none", [], "")
            out[rows, head] = product(scores.softmax(-1), values, None, "none", [], "")
    return out


def check(q: Tensor, k: Tensor, v: Tensor) -> None:
    """What kernels take: one stream's queries in 16 bits, with heads of at most 128, keys and values alike."""
    _check("attention", q, k, v, q.dtype)


def check_float8(q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor) -> None:
    """As check, for e4m3 keys and values and a scale for each head."""
    _check("attention_float8", q, k, v, FLOAT8)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        require_shape("attention_float8", name, scale, (q.shape[1],), torch.float32)
        require_device("attention_float8", name, scale, q.device)


def _check(op: str, q: Tensor, k: Tensor, v: Tensor, ring: torch.dtype) -> None:
    require(q.dtype in _HALVES, op, f"q is {q.dtype}; kernels take bfloat16 and float16")
    require(q.ndim == 3 and min(q.shape) > 0, op, f"q is {list(q.shape)}; it must be [queries, heads, d]")
    _, heads, size = q.shape
    require(size <= _LARGEST_HEAD, op, f"q has heads of {size}; kernels take up to {_LARGEST_HEAD}")
    for name, rows in (("k", k), ("v", v)):
        fits = rows.ndim == 3 and (rows.shape[0], rows.shape[2]) == (heads, size) and rows.shape[1] > 0
        require(fits, op, f"{name} is {list(rows.shape)}; it must be [{heads}, keys, {size}]")
        require(rows.dtype == ring, op, f"{name} is {rows.dtype}; it must be {ring}")
        reach = rows.shape[1] * rows.stride(1)
        require(reach < 2**31, op, f"the keys of {name} reach over {reach} elements; a head must have fewer than 2**31")
        require_device(op, name, rows, q.device)
    require(k.shape == v.shape, op, f"k is {list(k.shape)} and v {list(v.shape)}; there is a value for every key")
    for name, rows in (("q", q), ("k", k), ("v", v)):
        require(rows.stride(-1) == 1, op, f"{name} has strides {rows.stride()}; its rows must be dense")


def workload(queries: int, keys: int, heads: int, size: int, ring: int | None = None) -> Maker:
    """Inputs of attention over the first keys of rings that have room for so many (None: no more), heads of size d.

    To measure a stream, give it the keys of a full ring: most of its chunks see those.
    """

    def make(draw: Draw) -> Inputs:
        shape = (heads, ring or keys, size)
        q, k, v = draw.normal(queries, heads, size), draw.normal(*shape), draw.normal(*shape)
        return {"q": q, "k": k[:, :keys], "v": v[:, :keys]}

    return make


def workload_float8(queries: int, keys: int, heads: int, size: int, ring: int | None = None) -> Maker:
    """As workload, of attention_float8."""

    def make(draw: Draw) -> Inputs:
        shape = (heads, ring or keys, size)
        k, v = (draw.normal(*shape, std=60.0).to(FLOAT8) for _ in range(2))
        k_scale, v_scale = (draw.normal(heads, dtype=torch.float32, std=2e-3, mean=1 / 60) for _ in range(2))
        q = draw.normal(queries, heads, size)
        return {"q": q, "k": k[:, :keys], "v": v[:, :keys], "k_scale": k_scale, "v_scale": v_scale}

    return make


def _parts_of_products(draw: Draw) -> Inputs:
    """Queries in a product of three, keys and values as a product leaves them: heads within tokens."""
    q = draw.normal(70, 3 * 2 * 32).view(70, 3, 2, 32)[:, 1]
    k, v = draw.normal(50, 2 * 2 * 32).view(50, 2, 2, 32).permute(1, 2, 0, 3)
    return {"q": q, "k": k, "v": v}


def _sharp(draw: Draw) -> Inputs:
    """Scores so far apart that nearly all weight is on one key."""
    q = draw.normal(40, 1, 64, std=12.0)
    k, v = draw.normal(1, 100, 64), draw.normal(1, 100, 64)
    return {"q": q, "k": k, "v": v}


def _cost(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Cost:
    """Queries, keys and values read once, the result written; two products of every query with every key."""
    return Cost(2 * nbytes(q) + nbytes(k, v), 4 * q.numel() * k.shape[1])


_TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 2e-3}

ATTENTION = Op(
    name="attention",
    reference=attention,
    check=check,
    kernels={
        "flash3": "sfrt.ops.attention_libraries:flash3",
        "flash2": "sfrt.ops.attention_libraries:flash2",
        "cudnn": "sfrt.ops.attention_libraries:cudnn",
        "flash": "sfrt.ops.attention_libraries:flash",
        "triton": "sfrt.ops.triton_kernels.attention:attention",
    },
    cases={
        "two keys": workload(1, 2, 2, 16),
        "ragged": workload(150, 77, 2, 24, ring=90),
        "whole blocks": workload(128, 128, 1, 64, ring=192),
        "1.3B": workload(40, 150, 2, 128, ring=160),
        "parts of products": _parts_of_products,
        "sharp": _sharp,
    },
    sizes={
        "21 frames": workload(4680, 32760, 12, 128),
        "12 frames": workload(4680, 18720, 12, 128),
        "frame, 12 frames": workload(1560, 18720, 12, 128),
        "text": workload(4680, 512, 12, 128),
    },
    cost=_cost,
    tolerance=_TOLERANCE,
    measured=True,
)

ATTENTION_FLOAT8 = Op(
    name="attention_float8",
    reference=attention_float8,
    check=check_float8,
    kernels={"triton": "sfrt.ops.triton_kernels.attention:attention_float8"},
    cases={
        "two keys": workload_float8(1, 2, 2, 16),
        "ragged": workload_float8(150, 77, 2, 24, ring=90),
        "1.3B": workload_float8(40, 150, 2, 128, ring=160),
    },
    sizes={
        "21 frames": workload_float8(4680, 32760, 12, 128),
        "12 frames": workload_float8(4680, 18720, 12, 128),
        "frame, 12 frames": workload_float8(1560, 18720, 12, 128),
    },
    cost=_cost,
    tolerance=_TOLERANCE,
    measured=True,
)
