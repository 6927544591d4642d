"""csrc/rolling_kv.cu and qk_norm.cu, as far as a machine without a GPU goes: what they refuse at once.

That they compute what they should is for test_csrc_emulated to show.
"""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

FLOAT32, BFLOAT16, E4M3 = 0, 1, 3
INVALID_ARGUMENT = -1

ROLLING_KV = {
    "qkv": 4096, "norm_q": 4096, "norm_k": 4096, "rotary": 4096, "slots": 4096, "q": 8192, "k_ring": 8192,
    "v_ring": 8192, "k_scale": 0, "v_scale": 0, "frames": 3, "tokens": 4, "heads": 2, "size": 16, "ring_slots": 5,
    "qkv_stride": 96, "eps": 1e-6, "dtype": BFLOAT16,
}  # fmt: skip
QK_NORM = {
    "x": 4096, "weight": 4096, "out": 8192, "rows": 3, "width": 96, "stride": 120, "eps": 1e-6, "dtype": BFLOAT16,
}  # fmt: skip


@pytest.fixture(scope="module")
def library(native_library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(native_library))
    opened.sfrt_rolling_kv.argtypes = [*[c_void_p] * 10, *[c_int64] * 6, c_float, c_int, c_void_p]
    opened.sfrt_qk_norm.argtypes = [*[c_void_p] * 3, *[c_int64] * 3, c_float, c_int, c_void_p]
    opened.sfrt_error_string.argtypes = [c_int]
    opened.sfrt_error_string.restype = c_char_p
    return opened


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("qkv", "norm_q", "norm_k", "rotary", "slots", "q", "k_ring", "v_ring")),
        *({name: 4098} for name in ("qkv", "norm_q", "norm_k", "rotary", "slots", "q", "k_ring", "v_ring")),
        {"slots": 4100},
        {"k_scale": 4096},
        {"v_scale": 4096},
        {"k_scale": 4098, "v_scale": 4096},
        {"k_scale": 4096, "v_scale": 4096, "k_ring": 8193},
        {"frames": -1},
        {"frames": 6},
        {"frames": 65536, "ring_slots": 65536},
        {"tokens": -1},
        {"tokens": 2**31},
        {"heads": 0},
        {"heads": -2},
        {"heads": 1025},
        {"heads": 2**60},
        {"size": 0},
        {"size": -16},
        {"size": 15},
        {"size": 258},
        {"ring_slots": -5},
        {"qkv_stride": -96},
        {"qkv_stride": 97},
        {"dtype": E4M3},
        {"dtype": -1},
        {"dtype": FLOAT32, "qkv": 4100},
    ],
    ids=str,
)
def test_rolling_kv_refuses_bad_arguments(library: ctypes.CDLL, wrong: dict[str, int]) -> None:
    status = library.sfrt_rolling_kv(*{**ROLLING_KV, **wrong}.values(), None)
    assert status == INVALID_ARGUMENT
    assert library.sfrt_error_string(status) == b"invalid argument"


@pytest.mark.parametrize(
    "wrong",
    [
        *({name: 0} for name in ("x", "weight", "out")),
        *({name: 4097} for name in ("x", "weight", "out")),
        {"rows": -1},
        {"rows": 2**31},
        {"width": 0},
        {"width": 16385},
        {"stride": -96},
        {"dtype": E4M3},
    ],
    ids=str,
)
def test_qk_norm_refuses_bad_arguments(library: ctypes.CDLL, wrong: dict[str, int]) -> None:
    assert library.sfrt_qk_norm(*{**QK_NORM, **wrong}.values(), None) == INVALID_ARGUMENT


def test_nothing_is_nothing_to_do(library: ctypes.CDLL) -> None:
    for empty in ("frames", "tokens"):
        assert library.sfrt_rolling_kv(*{**ROLLING_KV, "qkv": 0, empty: 0}.values(), None) == 0
    assert library.sfrt_qk_norm(*{**QK_NORM, "x": 0, "rows": 0}.values(), None) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "right",
    [
        {},
        {"dtype": FLOAT32},
        {"size": 6, "qkv_stride": 36},  # pair by pair
        {"qkv": 4100},
        {"heads": 128, "size": 128, "qkv_stride": 3 * 128 * 128},
        {"k_scale": 4096, "v_scale": 4096},
    ],
    ids=str,
)
def test_good_arguments_reach_the_device(library: ctypes.CDLL, right: dict[str, int]) -> None:
    status = library.sfrt_rolling_kv(*{**ROLLING_KV, **right}.values(), None)
    assert status > 0
    assert library.sfrt_error_string(status) != b"no error"
    assert library.sfrt_qk_norm(*QK_NORM.values(), None) > 0
