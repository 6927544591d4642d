"""From self attention's fused product into the ring: norm, rotary phases, each frame's keys and values in its slot.

Queries and keys are normed over the full width of all heads (RMSNorm) and turned by the rotary phases of their tokens
(arXiv 2104.09864, section 3.2). Which slot of the ring a frame goes to is read from a tensor on the device, so that one
captured graph serves every chunk, whatever the window, the sinks and the wrapping of its ring.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sfrt.ops.checks import require, require_device, require_rows, require_shape
from sfrt.ops.eight_bits import quantize
from sfrt.ops.op import FLOAT8, Cost, Draw, ImplementationName, Inputs, Maker, Op, nbytes


@dataclass(frozen=True)
class QKV:
    """Self attention's fused product [..., L, 3·D], and all that makes heads of it.

    norm_q and norm_k [D] are the weights of the norms over all heads; rotary, complex64 [..., L, 1, d/2], holds the
    phases of the tokens.
    """

    product: Tensor
    norm_q: Tensor
    norm_k: Tensor
    rotary: Tensor
    heads: int
    eps: float

    def split(self) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, normed and turned, and values, each [..., L, H, d]; passes gradients."""
        return _split(self.product, self.norm_q, self.norm_k, self.rotary, self.heads, self.eps)


@dataclass(frozen=True)
class RingScales:
    """What the e4m3 keys and values of each layer's heads stand for: they times these, float32 [layers, H]."""

    k: Tensor
    v: Tensor


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The chunk's queries [L, H, d], and the rings with its keys and values written to its slots.

    qkv [L, 3·H·d] holds the tokens of F frames, frame after frame; norm_q and norm_k [H·d] are the norms' weights;
    rotary, complex64 [L, 1, d/2], turns neighbouring pairs of features, to positions of any kind; slots, int64 [F], are
    different ones; the rings [H, slots · L/F, d] keep what lies in others. Rings are of qkv's dtype, or e4m3 with one
    scale per head, float32 [H]: what is stored is x / scale, the largest e4m3 value for what lies beyond.
    """
    q, k, v = _split(qkv, norm_q, norm_k, rotary, len(k_ring), eps)
    if k_scale is None or v_scale is None:
        _write((k_ring, v_ring), (k, v), slots)
    else:
        # As bytes: those torch can copy by index.
        values = (quantize(x, scale[:, None], FLOAT8).view(torch.uint8) for x, scale in ((k, k_scale), (v, v_scale)))
        _write((k_ring.view(torch.uint8), v_ring.view(torch.uint8)), tuple(values), slots)
    return q, k_ring, v_ring


def apply_rotary(x: Tensor, rotary: Tensor) -> Tensor:
    """Neighbouring pairs of features of x, [..., L, H, d], turned in float32 at least."""
    exact = x if x.dtype == torch.float64 else x.float()
    turned = torch.view_as_complex(exact.view(*x.shape[:-1], -1, 2)) * rotary
    return torch.view_as_real(turned).flatten(-2).type_as(x)


def _split(
    qkv: Tensor, norm_q: Tensor, norm_k: Tensor, rotary: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.chunk(3, dim=-1)
    shape = *v.shape[:-1], heads, -1
    q = apply_rotary(F.rms_norm(q, norm_q.shape, norm_q, eps).view(shape), rotary)
    k = apply_rotary(F.rms_norm(k, norm_k.shape, norm_k, eps).view(shape), rotary)
    return q, k, v.view(shape)


def _write(rings: tuple[Tensor, ...], values: tuple[Tensor, ...], slots: Tensor) -> None:
    """Values [L, H, d] to the slots of their frames."""
    tokens = len(values[0]) // len(slots)
    if slots.is_cpu:
        # Here they can be read without waiting, and neighbouring rows are copied several times as fast.
        for source, target in _runs(slots.tolist(), tokens):
            for ring, x in zip(rings, values, strict=True):
                ring[:, target] = x[source].transpose(0, 1)
    else:
        for ring, x in zip(rings, values, strict=True):
            frames = x.unflatten(0, (-1, tokens)).permute(2, 0, 1, 3)
            ring.unflatten(1, (-1, tokens)).index_copy_(1, slots, frames)


def _runs(slots: Sequence[int], tokens: int) -> Iterator[tuple[slice, slice]]:
    """The tokens of frames that go to neighbouring slots: where they are in the chunk, and where in the ring."""
    first = 0
    for end in range(1, len(slots) + 1):
        if end == len(slots) or slots[end] != slots[end - 1] + 1:
            start = slots[first] * tokens
            yield slice(first * tokens, end * tokens), slice(start, start + (end - first) * tokens)
            first = end


def check(
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
) -> None:
    """What the kernels take: dense rings, heads that are even and at most 256 wide, 16384 all together."""
    op = "rolling_kv"
    require(k_ring.ndim == 3, op, f"k_ring is {list(k_ring.shape)}; it must be [heads, slots · tokens, d]")
    heads, places, size = k_ring.shape
    width = heads * size
    require(size % 2 == 0 and 2 <= size <= 256, op, f"heads are {size} wide; kernels take even widths of 2 to 256")
    require(0 < width <= 16384, op, f"all heads are {width} wide together; kernels take 2 to 16384")
    require(qkv.ndim == 2, op, f"qkv is {list(qkv.shape)}; it must be [L, 3 · heads · d]")
    require_rows(op, "qkv", qkv, 3 * width)
    require(qkv.stride(0) % 2 == 0, op, f"the rows of qkv lie {qkv.stride(0)} apart; that must be even")
    length, frames = len(qkv), slots.numel()
    require(frames > 0, op, "slots is empty; there must be a frame")
    require(length > 0 and length % frames == 0, op, f"{length} tokens are no {frames} frames of one size")
    tokens = length // frames
    require(
        length <= places <= 65535 * tokens and places % tokens == 0,
        op,
        f"the ring has {places} places; it must have slots of {tokens}, at least {frames} and at most 65535",
    )
    dense = {
        "norm_q": (norm_q, (width,), qkv.dtype),
        "norm_k": (norm_k, (width,), qkv.dtype),
        "rotary": (rotary, (length, 1, size // 2), torch.complex64),
        "slots": (slots, (frames,), torch.int64),
        "k_ring": (k_ring, (heads, places, size), qkv.dtype if k_scale is None else FLOAT8),
        "v_ring": (v_ring, (heads, places, size), qkv.dtype if v_scale is None else FLOAT8),
        "k_scale": (k_scale, (heads,), torch.float32),
        "v_scale": (v_scale, (heads,), torch.float32),
    }
    require((k_scale is None) == (v_scale is None), op, "there is one of k_scale and v_scale; it takes both or none")
    for name, (tensor, shape, dtype) in dense.items():
        if tensor is not None:
            require_shape(op, name, tensor, shape, dtype)
            require_device(op, name, tensor, qkv.device)
    for name, tensor in (("qkv", qkv), ("norm_q", norm_q), ("norm_k", norm_k), ("k_ring", k_ring), ("v_ring", v_ring)):
        address, pair = tensor.data_ptr(), 2 * tensor.element_size()
        require(address % pair == 0, op, f"{name} is at address {address:#x}; it must be at a multiple of {pair}")


def _draw(
    slots: tuple[int, ...], of: int, tokens: int, heads: int, size: int, *, strided: bool = False, float8: bool = False
) -> Maker:
    """A chunk whose frames go to some slots of so many."""

    def make(draw: Draw) -> Inputs:
        length, width = len(slots) * tokens, heads * size
        ring_dtype = FLOAT8 if float8 else draw.dtype
        inputs: Inputs = {
            "qkv": (draw.strided if strided else draw.normal)(length, 3 * width),
            "norm_q": draw.normal(width, std=0.2, mean=1.0),
            "norm_k": draw.normal(width, std=0.2, mean=1.0),
            "rotary": torch.view_as_complex(draw.normal(length, 1, size // 2, 2, dtype=torch.float32)),
            "slots": draw.integers(*slots),
            "k_ring": draw.normal(heads, of * tokens, size, dtype=ring_dtype),
            "v_ring": draw.normal(heads, of * tokens, size, dtype=ring_dtype),
            "eps": 1e-6,
        }
        if float8:  # so small that the largest values lie beyond what e4m3 can say
            for name in ("k_scale", "v_scale"):
                inputs[name] = draw.normal(heads, dtype=torch.float32, std=5e-4, mean=5e-3)
        return inputs

    return make


def _cases(*, float8: bool) -> dict[str, Maker]:
    return {
        "one token": _draw((0,), 1, 1, 1, 2, float8=float8),
        "odd sizes": _draw((1, 2, 3), 5, 3, 3, 20, float8=float8),
        "wrapped": _draw((4, 1, 2), 5, 2, 2, 32, float8=float8),
        "strided": _draw((2, 0), 4, 3, 4, 16, strided=True, float8=float8),
        "1.3B": _draw((1,), 2, 2, 12, 128, float8=float8),
        "14B": _draw((1,), 2, 1, 40, 128, float8=float8),
        "wider": _draw((0,), 1, 1, 48, 128, float8=float8),
    }


def _sizes(*, float8: bool) -> dict[str, Maker]:
    return {
        "chunk of 3, ring of 21": _draw((18, 19, 20), 21, 1560, 12, 128, float8=float8),
        "frame, ring of 12": _draw((5,), 12, 1560, 12, 128, float8=float8),
        "14B, frame, ring of 12": _draw((5,), 12, 1560, 40, 128, float8=float8),
    }


def _cost(qkv: Tensor, k_ring: Tensor, **_: object) -> Cost:
    """The product read, queries, keys and values written; the phases stay in the GPU's cache from layer to layer."""
    part = qkv.numel() // 3
    return Cost(nbytes(qkv) + part * (qkv.element_size() + 2 * k_ring.element_size()), 14 * part)


_KERNELS: dict[ImplementationName, str] = {
    "cuda": "sfrt.ops.cuda_kernels.rolling_kv:rolling_kv",
    "triton": "sfrt.ops.triton_kernels.rolling_kv:rolling_kv",
}

ROLLING_KV = Op(
    name="rolling_kv",
    reference=rolling_kv,
    check=check,
    kernels=_KERNELS,
    cases=_cases(float8=False),
    sizes=_sizes(float8=False),
    cost=_cost,
    tolerance={torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3},
)

ROLLING_KV_FLOAT8 = Op(
    name="rolling_kv_float8",
    reference=rolling_kv,
    check=check,
    kernels=_KERNELS,
    cases=_cases(float8=True),
    sizes=_sizes(float8=True),
    cost=_cost,
    tolerance={torch.float32: 1e-2, torch.bfloat16: 4e-2, torch.float16: 4e-2},
)
"""The same into rings of e4m3 values, with scales; an op of its own, as fast kernels and precision are others."""
