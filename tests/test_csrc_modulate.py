"""csrc/modulate.cu and gelu.cu, as far as a machine without a GPU goes: what they refuse before they touch a device."""

from __future__ import annotations

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import pytest
import torch

FLOAT32, BFLOAT16, E4M3 = 0, 1, 3
INVALID_ARGUMENT = -1

MODULATE = {
    "x": 4096, "branch": 8192, "gate": 4096, "scale": 4096, "shift": 4096, "total": 8192, "out": 8192, "scales": 0,
    "rows": 3, "width": 96, "x_stride": 96, "branch_stride": 120, "eps": 1e-6, "dtype": BFLOAT16,
}  # fmt: skip
QUANTIZE_ROWS = {
    "x": 4096, "out": 8192, "scales": 4096, "rows": 3, "width": 96, "x_stride": 120, "with_gelu": 1, "dtype": BFLOAT16,
}  # fmt: skip


@pytest.fixture(scope="module")
def library(native_library: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(native_library))
    opened.sfrt_modulate.argtypes = [*[c_void_p] * 8, *[c_int64] * 4, c_float, c_int, c_void_p]
    opened.sfrt_quantize_rows.argtypes = [*[c_void_p] * 3, *[c_int64] * 3, c_int, c_int, c_void_p]
    opened.sfrt_error_string.argtypes = [c_int]
    opened.sfrt_error_string.restype = c_char_p
    return opened


ROWS_WRONG = [
    {"x": 0},
    {"x": 4097},
    {"out": 0},
    {"scales": 4098},
    {"rows": -1},
    {"rows": 2**31},
    {"width": 0},
    {"width": 16385},
    {"width": 2**32 + 96},
    {"x_stride": -96},
    {"dtype": E4M3},
    {"dtype": -1},
    {"dtype": FLOAT32, "x": 4098},
]


@pytest.mark.parametrize(
    "wrong",
    [
        *ROWS_WRONG,
        {"scale": 0},
        {"shift": 0},
        {"shift": 4097},
        {"total": 0},
        {"total": 8193},
        {"branch": 0},
        {"branch": 0, "total": 0},
        {"branch": 0, "gate": 0},
        {"branch": 8193},
        {"gate": 4097},
        {"out": 8193},
        {"branch_stride": -1},
    ],
    ids=str,
)
def test_modulate_refuses_bad_arguments(library: ctypes.CDLL, wrong: dict[str, int]) -> None:
    status = library.sfrt_modulate(*{**MODULATE, **wrong}.values(), None)
    assert status == INVALID_ARGUMENT
    assert library.sfrt_error_string(status) == b"invalid argument"


@pytest.mark.parametrize("wrong", [*ROWS_WRONG, {"scales": 0}], ids=str)
def test_quantize_rows_refuses_bad_arguments(library: ctypes.CDLL, wrong: dict[str, int]) -> None:
    assert library.sfrt_quantize_rows(*{**QUANTIZE_ROWS, **wrong}.values(), None) == INVALID_ARGUMENT


def test_no_rows_are_nothing_to_do(library: ctypes.CDLL) -> None:
    assert library.sfrt_modulate(*{**MODULATE, "rows": 0, "x": 0}.values(), None) == 0
    assert library.sfrt_quantize_rows(*{**QUANTIZE_ROWS, "rows": 0, "x": 0}.values(), None) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize(
    "right",
    [
        {},
        {"gate": 0},
        {"branch": 0, "gate": 0, "total": 0},
        {"scales": 4096, "out": 8193},
        {"width": 95},
        {"dtype": FLOAT32, "width": 16383},
        {"width": 16384, "x_stride": 0},
    ],
    ids=str,
)
def test_good_arguments_reach_the_device(library: ctypes.CDLL, right: dict[str, int]) -> None:
    status = library.sfrt_modulate(*{**MODULATE, **right}.values(), None)
    assert status > 0
    assert library.sfrt_error_string(status) != b"no error"
    rows = {name: value for name, value in right.items() if name in ("width", "dtype", "x_stride")}
    assert library.sfrt_quantize_rows(*{**QUANTIZE_ROWS, **rows}.values(), None) > 0
