"""The way into the ring: where frames end up, what stays untouched, what float8 keeps, which arguments are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfrt.config import ModelConfig
from sfrt.errors import KernelInputError
from sfrt.ops.interpreter import mended_interpreter
from sfrt.ops.op import FLOAT8, Draw, ImplementationName, Inputs
from sfrt.ops.qk_norm import QK_NORM
from sfrt.ops.rolling_kv import ROLLING_KV, ROLLING_KV_FLOAT8, rolling_kv
from sfrt.ring import Ring
from sfrt.transformer import rotary_phases

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

IMPLEMENTATIONS = ["torch", "triton", pytest.param("cuda", marks=pytest.mark.gpu)]

HEADS, SIZE, TOKENS = 2, 6, 3


@pytest.fixture(autouse=True)
def _interpreter_is_mended() -> Iterator[None]:
    with mended_interpreter():
        yield


def inputs_for(slots: Sequence[int], of: int, *, float8: bool = False, seed: int = 0) -> Inputs:
    """A chunk for some slots of a ring whose every byte is random, NaNs among them."""
    draw = Draw(torch.float32, DEVICE, seed)
    width, length = HEADS * SIZE, len(slots) * TOKENS
    dtype = FLOAT8 if float8 else torch.float32
    generator = torch.Generator().manual_seed(seed)
    shape = (HEADS, of * TOKENS, SIZE * dtype.itemsize)
    angles = 7 * torch.rand(length, 1, SIZE // 2, generator=generator)
    rings = (torch.randint(256, shape, generator=generator, dtype=torch.uint8).view(dtype).to(DEVICE) for _ in "kv")
    inputs: Inputs = {
        "qkv": draw.normal(length, 3 * width),
        "norm_q": draw.normal(width, std=0.2, mean=1.0),
        "norm_k": draw.normal(width, std=0.2, mean=1.0),
        "rotary": torch.polar(torch.ones_like(angles), angles).to(DEVICE),
        "slots": draw.integers(*slots),
        **dict(zip(("k_ring", "v_ring"), rings, strict=True)),
        "eps": 1e-6,
    }
    if float8:
        inputs |= {name: torch.full((HEADS,), 2.0**-6, device=DEVICE) for name in ("k_scale", "v_scale")}
    return inputs


def frames_of(ring: Tensor) -> Tensor:
    """[slots, tokens, H, d] from a ring."""
    return ring.unflatten(1, (-1, TOKENS)).movedim(0, 2)


def test_norm_and_rotation_by_hand() -> None:
    inputs = inputs_for([1, 0], 2)
    q, k_ring, v_ring = rolling_kv(**inputs)
    qkv, phases = inputs["qkv"].double().cpu(), inputs["rotary"].cpu()
    width = HEADS * SIZE
    for token in range(len(qkv)):
        row = qkv[token].view(3, width)
        place = [1, 0][token // TOKENS] * TOKENS + token % TOKENS
        for part, weight, out in ((0, "norm_q", q[token]), (1, "norm_k", k_ring[:, place])):
            normed = row[part] / math.sqrt(float((row[part] ** 2).mean()) + 1e-6) * inputs[weight].double().cpu()
            for head in range(HEADS):
                for pair in range(SIZE // 2):
                    first = head * SIZE + 2 * pair
                    turned = complex(normed[first], normed[first + 1]) * complex(phases[token, 0, pair])
                    wanted = torch.tensor([turned.real, turned.imag])
                    torch.testing.assert_close(out[head, 2 * pair : 2 * pair + 2].cpu(), wanted, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(v_ring[:, place].flatten().cpu(), row[2].float())


def test_products_depend_on_distances_alone() -> None:
    config = ModelConfig(
        dim=HEADS * SIZE,
        ffn_dim=8,
        num_heads=HEADS,
        num_layers=1,
        freq_dim=8,
        text_dim=8,
        text_len=4,
        latent_channels=4,
    )
    products = []
    for first in (0, 100_000):
        inputs = inputs_for([0, 1], 2)
        inputs["rotary"] = rotary_phases(config, range(first, first + 2), 1, TOKENS, DEVICE)
        q, k_ring, _ = rolling_kv(**inputs)
        products.append(torch.einsum("lhd,hsd->hls", q, k_ring))
    torch.testing.assert_close(products[0], products[1], rtol=1e-5, atol=1e-5)


@given(sink=st.integers(0, 2), rolling=st.integers(3, 6), chunks=st.lists(st.integers(1, 3), min_size=1, max_size=6))
def test_frames_are_where_the_ring_has_them(sink: int, rolling: int, chunks: list[int]) -> None:
    ring = Ring(sink + rolling, sink)
    k_ring, v_ring = (torch.full((HEADS, ring.slots * TOKENS, SIZE), math.nan, device=DEVICE) for _ in "kv")
    start = 0
    for count in chunks:
        plan = ring.plan(start, count)
        inputs = inputs_for([ring.slot(frame) for frame in plan.frames], ring.slots) | {"k_ring": k_ring}
        inputs["qkv"][:, -HEADS * SIZE :] = torch.tensor(plan.frames).repeat_interleave(TOKENS)[:, None]
        _, k_ring, v_ring = rolling_kv(**inputs | {"v_ring": v_ring})
        start += count
    held = frames_of(v_ring)[: plan.visible]
    assert held.flatten(1).aminmax(dim=1)[0].tolist() == ring.visible_frames(plan)
    assert held.flatten(1).aminmax(dim=1)[1].tolist() == ring.visible_frames(plan)
    assert frames_of(k_ring)[: plan.visible].isfinite().all()
    assert frames_of(k_ring)[plan.visible :].isnan().all()


@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("slots", [[0], [3, 4, 1], [2, 0]], ids=str)
def test_other_slots_keep_every_bit(name: ImplementationName, float8: bool, slots: list[int]) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    inputs = inputs_for(slots, 5, float8=float8)
    before = {ring: frames_of(inputs[ring]).clone() for ring in ("k_ring", "v_ring")}
    _, k_ring, v_ring = (ROLLING_KV_FLOAT8 if float8 else ROLLING_KV).load(name)(**inputs)
    assert k_ring.data_ptr() == inputs["k_ring"].data_ptr() and v_ring.data_ptr() == inputs["v_ring"].data_ptr()
    for ring, was in (k_ring, before["k_ring"]), (v_ring, before["v_ring"]):
        for slot, (now, then) in enumerate(zip(frames_of(ring), was, strict=True)):
            same = torch.equal(now.contiguous().view(torch.uint8), then.contiguous().view(torch.uint8))
            assert same == (slot not in slots), slot


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float8_rings_hold_what_the_others_do(name: ImplementationName) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    slots = [3, 4, 1]
    q, k_ring, v_ring = rolling_kv(**inputs_for(slots, 5))
    q_of_8, *rings = ROLLING_KV_FLOAT8.load(name)(**inputs_for(slots, 5, float8=True))
    torch.testing.assert_close(q_of_8, q)
    limit = 448 * 2.0**-6
    for ring, exact in zip(rings, (k_ring, v_ring), strict=True):
        values, wanted = frames_of(ring)[slots].float() * 2.0**-6, frames_of(exact)[slots]
        assert wanted.abs().amax() < limit
        # Three bits of mantissa; below 2^-6 steps of 2^-9, in units of the scale.
        torch.testing.assert_close(values, wanted, rtol=2.0**-4, atol=2.0**-16)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_float8_rings_hold_at_most_448(name: ImplementationName) -> None:
    if name == "triton":
        pytest.importorskip("triton")
    inputs = inputs_for([0], 1, float8=True)
    inputs["v_scale"] = torch.tensor([1e-6, 1.0], device=DEVICE)
    _, _, v_ring = ROLLING_KV_FLOAT8.load(name)(**inputs)
    values = v_ring.float()
    assert (values[0].abs() == 448).all()
    assert values[1].abs().amax() < 8


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"k_ring": torch.zeros(6, 4)}, "k_ring"),
        ({"k_ring": torch.zeros(2, 15, 5), "v_ring": torch.zeros(2, 15, 5)}, "5 wide"),
        ({"k_ring": torch.zeros(2, 15, 258), "v_ring": torch.zeros(2, 15, 258)}, "258 wide"),
        ({"v_ring": torch.zeros(2, 12, 6)}, "v_ring"),
        ({"v_ring": torch.zeros(2, 15, 6, dtype=torch.bfloat16)}, "v_ring"),
        ({"v_ring": torch.zeros(15, 2, 6).transpose(0, 1)}, "v_ring"),
        ({"qkv": torch.zeros(9, 35)}, "qkv"),
        ({"qkv": torch.zeros(3, 3, 36)}, "qkv"),
        ({"qkv": torch.zeros(36, 9).t()}, "qkv"),
        ({"qkv": torch.zeros(9, 37)[:, :36]}, "37 apart"),
        ({"qkv": torch.zeros(9, 38)[:, 1:37]}, "address"),
        ({"qkv": torch.zeros(8, 36)}, "8 tokens"),
        ({"norm_q": torch.zeros(11)}, "norm_q"),
        ({"norm_k": torch.zeros(12, dtype=torch.float64)}, "norm_k"),
        ({"rotary": torch.zeros(9, 1, 6)}, "rotary"),
        ({"rotary": torch.zeros(9, 1, 3, dtype=torch.complex128)}, "rotary"),
        ({"slots": torch.zeros(3, dtype=torch.int32)}, "slots"),
        ({"slots": torch.zeros(0, dtype=torch.int64)}, "slots"),
        ({"slots": torch.zeros(3, dtype=torch.int64, device="meta")}, "slots is on meta"),
        ({"k_ring": torch.zeros(2, 6, 6), "v_ring": torch.zeros(2, 6, 6)}, "6 places"),
        ({"k_ring": torch.zeros(2, 16, 6), "v_ring": torch.zeros(2, 16, 6)}, "16 places"),
        ({"k_scale": torch.ones(2)}, "k_scale"),
        ({"k_scale": torch.ones(2), "v_scale": torch.ones(2)}, "k_ring"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_kernels_would_get_wrong_is_refused(wrong: dict[str, Tensor], named: str) -> None:
    good = {
        name: value.cpu() if isinstance(value, Tensor) else value for name, value in inputs_for([3, 4, 1], 5).items()
    }
    ROLLING_KV.check(**good)
    with pytest.raises(KernelInputError, match=rf"^rolling_kv: .*{named}"):
        ROLLING_KV.check(**{**good, **wrong})


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("scale", [torch.ones(1), torch.ones(2, dtype=torch.float64), torch.ones(4)[::2]])
def test_scales_are_one_float_per_head(name: str, scale: Tensor) -> None:
    good = inputs_for([3, 4, 1], 5, float8=True)
    ROLLING_KV_FLOAT8.check(**good)
    with pytest.raises(KernelInputError, match=name):
        ROLLING_KV_FLOAT8.check(**{**good, name: scale.to(DEVICE)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(3, 16386)},
        {"x": torch.zeros(0, 12)},
        {"x": torch.zeros(12, 3).t()},
        {"weight": torch.zeros(10)},
        {"weight": torch.zeros(12, dtype=torch.bfloat16)},
        {"heads": 5},
        {"heads": 0},
    ],
    ids=str,
)
def test_qk_norm_refuses(wrong: dict[str, Any]) -> None:
    good: dict[str, Any] = {"x": torch.zeros(3, 12), "weight": torch.zeros(12), "heads": 2, "eps": 1e-6}
    QK_NORM.check(**good)
    with pytest.raises(KernelInputError, match=r"^qk_norm: "):
        QK_NORM.check(**{**good, **wrong})


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_captured_graph_reads_the_slots_anew(name: ImplementationName) -> None:
    op = ROLLING_KV.load(name)
    inputs = inputs_for([0, 1], 5)
    op(**inputs)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _, k_ring, v_ring = op(**inputs)
    k_ring.zero_()
    v_ring.zero_()
    inputs["slots"].copy_(torch.tensor([4, 2]))
    graph.replay()
    written = frames_of(v_ring).flatten(1).any(dim=1).tolist()
    assert written == [False, False, True, False, True]
    _, expected, _ = rolling_kv(**inputs | {"k_ring": torch.zeros_like(k_ring), "v_ring": torch.zeros_like(v_ring)})
    torch.testing.assert_close(k_ring, expected)
