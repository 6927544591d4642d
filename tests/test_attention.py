"""Attention against its definition in double precision; what its kernels take, and where libraries find their rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sfrt.errors import DeviceError, KernelInputError
from sfrt.ops import attention_libraries as libraries
from sfrt.ops.attention import ATTENTION, ATTENTION_FLOAT8, attention, attention_float8, workload, workload_float8
from sfrt.ops.choice import why_not
from sfrt.ops.interpreter import mended_interpreter
from sfrt.ops.op import FLOAT8, Draw
from sfrt_export.verify import relative_error

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="interpreted only where there is no GPU")


@pytest.fixture(autouse=True)
def _interpreter_is_mended() -> Iterator[None]:
    with mended_interpreter():
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("...lhd,...hsd->...hls", q.double(), k.double()) / q.shape[-1] ** 0.5
    return torch.einsum("...hls,...hsd->...lhd", scores.softmax(-1), v.double())


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= TOLERANCE[out.dtype]


# The reference


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("queries", [1, 17, 512, 513, 1200])
def test_other_lengths_of_queries_and_keys(queries: int, dtype: torch.dtype) -> None:
    """More than 512 queries take several blocks; k and v are a part of a larger ring, as caches give them."""
    q = normal(queries, 3, 20, dtype=dtype)
    ring = normal(2, 3, 90, 20, seed=1, dtype=dtype)
    k, v = ring[:, :, :77]
    assert_near(attention(q, k, v), by_definition(q, k, v))


def test_a_batch() -> None:
    q, k, v = normal(2, 9, 4, 8), normal(2, 4, 13, 8, seed=1), normal(2, 4, 13, 8, seed=2)
    assert_near(attention(q, k, v), by_definition(q, k, v))


def test_gradients_pass() -> None:
    q, k, v = (normal(*shape).requires_grad_() for shape in ((5, 2, 8), (2, 7, 8), (2, 7, 8)))
    assert_near(attention(q, k, v).detach(), by_definition(q, k, v).detach())
    attention(q, k, v).square().sum().backward()
    assert all(each.grad is not None and each.grad.abs().sum() > 0 for each in (q, k, v))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_float8_keys_and_values_stand_for_their_multiples(dtype: torch.dtype) -> None:
    q = normal(9, 2, 16, dtype=dtype)
    k, v = (normal(2, 13, 16, seed=seed).mul(30).to(FLOAT8) for seed in (1, 2))
    k_scale, v_scale = torch.tensor([0.03, 0.1]), torch.tensor([0.5, 2.0])
    out = attention_float8(q, k, v, k_scale, v_scale)
    assert out.dtype == dtype
    meant = (x.double() * scale.double()[:, None, None] for x, scale in ((k, k_scale), (v, v_scale)))
    # Scales are float32, so float64 queries meet them as they are.
    assert_near(out, by_definition(q, *meant))


# Our kernel


def kernel(q: Tensor, k: Tensor, v: Tensor, *scales: Tensor) -> Tensor:
    pytest.importorskip("triton")
    out: Tensor = (ATTENTION_FLOAT8 if scales else ATTENTION).kernel("triton")(q, k, v, *scales)
    return out


@interpreted
@examples(max_examples=20)
@given(queries=st.integers(1, 140), keys=st.integers(1, 100), heads=st.integers(1, 3), size=st.integers(1, 40))
def test_the_method_itself_is_exact(queries: int, keys: int, heads: int, size: int) -> None:
    """In float32, which its check refuses as no tensor core multiplies it: what is left is the method's own error."""
    ring = normal(2, heads, keys + 7, size, seed=1)
    ring[:, :, keys:] = float("nan")  # slots that nothing was written to
    q, (k, v) = normal(queries, heads, size), ring[:, :, :keys]
    assert_near(kernel(q, k, v), by_definition(q, k, v))


@interpreted
def test_float8_costs_next_to_nothing_beyond_the_rings_own_rounding() -> None:
    """Queries are bfloat16's values in float32, so that no rounding of the result hides the kernel's."""
    q = normal(64, 1, 128).bfloat16().float()
    k, v = normal(2, 1, 500, 128, seed=1)
    k_scale, v_scale = (x.abs().amax((1, 2)) / 448 for x in (k, v))
    k8, v8 = (k / k_scale).to(FLOAT8), (v / v_scale).to(FLOAT8)
    meant = by_definition(q, k8.double() * k_scale, v8.double() * v_scale)
    assert relative_error(kernel(q, k8, v8, k_scale, v_scale), meant) < 3e-4
    assert relative_error(meant, by_definition(q, k, v)) > 3e-2


@pytest.mark.parametrize("make", [workload(60, 90, 1, 32, ring=120), workload_float8(60, 90, 1, 32, ring=120)])
def test_slots_beyond_the_visible_are_not_read(make: Any) -> None:
    inputs = make(Draw(torch.float16, DEVICE))
    expected = kernel(*inputs.values())
    for name in ("k", "v"):
        ring = inputs[name]._base
        hidden = ring.view(torch.uint8) if ring.dtype == FLOAT8 else ring
        hidden[:, 90:] = 0x7F if ring.dtype == FLOAT8 else float("nan")
        assert ring[:, 90:].isnan().all()
    assert torch.equal(kernel(*inputs.values()), expected)
    assert not expected.isnan().any()


@interpreted
@pytest.mark.parametrize("size", [24, 64])
@pytest.mark.parametrize("make", [workload, workload_float8])
def test_the_blocks_of_roomier_gpus_are_right_too(make: Any, size: int) -> None:
    pytest.importorskip("triton")
    op = ATTENTION if make is workload else ATTENTION_FLOAT8
    inputs = make(30, 300, 1, size)(Draw(torch.float16, DEVICE))
    plan: Any = op.kernel("triton")
    (launch,), out = plan.plan(**inputs)
    assert launch.constants_on(89) == launch.constants != launch.constants_on(90)
    replace(launch, constants=launch.constants_on(90)).run()
    assert relative_error(out, op.reference(**inputs)) <= 2 * op.tolerance[torch.float16]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"q": torch.zeros(4, 2, 16)}, "q is torch.float32; kernels take bfloat16 and float16"),
        ({"q": torch.zeros(1, 4, 2, 16).half()}, r"q is \[1, 4, 2, 16\]; it must be \[queries, heads, d\]"),
        ({"q": torch.zeros(0, 2, 16).half()}, r"q is \[0, 2, 16\]"),
        ({"q": torch.zeros(4, 2, 136).half()}, "heads of 136; kernels take up to 128"),
        ({"k": torch.zeros(3, 9, 16).half()}, r"k is \[3, 9, 16\]; it must be \[2, keys, 16\]"),
        ({"k": torch.zeros(2, 0, 16).half()}, r"k is \[2, 0, 16\]"),
        ({"k": torch.zeros(2, 8, 16).half()}, r"k is \[2, 8, 16\] and v \[2, 9, 16\]; there is a value for every key"),
        ({"v": torch.zeros(2, 9, 16)}, "v is torch.float32; it must be torch.float16"),
        ({"v": torch.zeros(2, 16, 9).half().transpose(1, 2)}, "v has strides .* its rows must be dense"),
        ({"v": torch.zeros(2, 9, 16, device="meta").half()}, "v is on meta and the rest on cpu"),
        (
            {"k": torch.empty_strided((2, 9, 16), (16, 2**28, 1), dtype=torch.float16, device="meta")},
            "the keys of k reach over .* a head must have fewer than",
        ),
    ],
)
def test_what_kernels_would_read_wrongly_is_refused(change: dict[str, Tensor], said: str) -> None:
    good = {"q": torch.zeros(4, 2, 16), "k": torch.zeros(2, 9, 16), "v": torch.zeros(2, 9, 16)}
    halves = {name: value.half() for name, value in good.items()}
    ATTENTION.check(**halves)
    with pytest.raises(KernelInputError, match=said):
        ATTENTION.check(**(halves | change))


def test_float8_wants_its_scales() -> None:
    good = ATTENTION_FLOAT8.cases["ragged"](Draw(torch.bfloat16, torch.device("cpu")))
    ATTENTION_FLOAT8.check(**good)
    for change, said in (
        ({"k_scale": torch.ones(3)}, r"k_scale is torch.float32 \[3\]; it must be dense torch.float32 \[2\]"),
        ({"v_scale": torch.ones(2).double()}, "v_scale is torch.float64"),
        ({"v": good["v"].bfloat16()}, "v is torch.bfloat16; it must be torch.float8_e4m3fn"),
    ):
        with pytest.raises(KernelInputError, match=said):
            ATTENTION_FLOAT8.check(**(good | change))


# Libraries


class Called(TorchDispatchMode):
    """Writes down the operators that are called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


VIEWS = {"transpose", "unsqueeze", "select"}


@pytest.mark.parametrize("case", ["21 frames", "text"])
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_torchs_operators_are_given_views_and_give_tokens_first(name: str, case: str) -> None:
    """On the meta device, where torch works out shapes and strides as it would on a GPU."""
    inputs = ATTENTION.sizes[case](Draw(torch.bfloat16, torch.device("meta")))
    with Called() as called:
        out = getattr(libraries, name)(**inputs)
    assert set(called.names) - VIEWS == {f"_scaled_dot_product_{name}_attention"}
    assert out.shape == inputs["q"].shape and out.is_contiguous() and out.dtype == torch.bfloat16


def test_libraries_refuse_what_they_would_copy() -> None:
    meta = torch.device("meta")
    one = workload(4, 1, 2, 16)(Draw(torch.float16, meta))
    with pytest.raises(KernelInputError, match="there is one key; cuDNN takes two or more"):
        libraries.cudnn(**one)
    libraries.flash(**one)
    odd = workload(4, 9, 2, 20)(Draw(torch.float16, meta))
    shifted = dict(one, q=torch.empty(4, 2, 17, dtype=torch.float16, device=meta)[..., 1:])
    for inputs in (odd, shifted):
        with pytest.raises(KernelInputError, match="do not start and end on 16 bytes"):
            libraries.flash(**inputs)


@pytest.mark.parametrize(("name", "package"), [("flash2", "flash_attn"), ("flash3", "flash_attn_interface")])
@pytest.mark.parametrize("pair", [False, True])
def test_packages_are_given_views_tokens_first(
    name: Any, package: str, pair: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in with the signature of flash_attn_func, as the packages need a GPU even to be installed."""
    given_them: list[Tensor] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Any:
        given_them.extend((q, k, v))
        out = attention(q[0], k[0].transpose(0, 1), v[0].transpose(0, 1))[None]
        return (out, out.new_empty(0)) if pair else out

    stand_in = ModuleType(package)
    stand_in.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, package, stand_in)
    inputs = workload(40, 30, 2, 16, ring=50)(Draw(torch.float16, torch.device("cpu")))
    out = ATTENTION.load(name)(**inputs)
    assert torch.equal(out, attention(**inputs))
    assert [tuple(each.shape) for each in given_them] == [(1, 40, 2, 16), (1, 30, 2, 16), (1, 30, 2, 16)]
    assert [each.data_ptr() for each in given_them] == [each.data_ptr() for each in inputs.values()]


def test_a_package_that_is_absent_or_broken_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    with pytest.raises(ModuleNotFoundError):
        ATTENTION.kernel("flash2")
    with pytest.raises(DeviceError, match=r"flash_attn_interface cannot be used: .* install it again"):
        ATTENTION.kernel("flash3")
    cuda = torch.device("cuda")
    assert "flash_attn" in str(why_not(ATTENTION, "flash2", cuda))
    assert "cannot be used" in str(why_not(ATTENTION, "flash3", cuda))
    assert not hasattr(libraries, "flash4")
