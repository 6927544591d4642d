"""The activation where numbers are large, rows as e4m3 values, and the arguments that kernels refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfrt.errors import KernelInputError
from sfrt.ops.gelu import GELU, GELU_FLOAT8, QUANTIZE_ROWS, quantize_rows
from sfrt.ops.interpreter import mended_interpreter
from sfrt.ops.op import FLOAT8, Op

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.filterwarnings("ignore:overflow")
def test_large_values_are_themselves_or_nothing() -> None:
    pytest.importorskip("triton")
    x = torch.tensor([-3e38, -1e20, -90.0, -12.0, -5.0, -1e-30, 0.0, 1e-30, 5.0, 12.0, 90.0, 1e20, 3e38], device=DEVICE)
    with mended_interpreter():
        found = GELU.load("triton")(x)
    # In float64 as a quotient: torch's own sum of 1 and tanh is 0 for what is far below zero.
    wide = x.double()
    expected = wide * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3))
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-30)
    torch.testing.assert_close(found, F.gelu(x, approximate="tanh"), rtol=1e-6, atol=1e-6)


NUMBERS = st.floats(-1e4, 1e4, width=32).filter(lambda number: number == 0 or abs(number) > 1e-30)


@given(st.lists(NUMBERS, min_size=1, max_size=20))
def test_values_times_their_scale_are_the_row(row: list[float]) -> None:
    x = torch.tensor([row])
    values, scales = quantize_rows(x)
    assert (values.dtype, scales.shape) == (FLOAT8, (1, 1))
    back = values.float() * scales
    step = torch.maximum(x.abs() * 2.0**-4, scales * 2.0**-10)  # half of what lies between neighbours
    assert ((back - x).abs() <= step * (1 + 1e-6)).all()
    assert values.float().abs().max() == (448 if any(row) else 0)


@pytest.mark.parametrize("op", [GELU, GELU_FLOAT8, QUANTIZE_ROWS], ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("x", "said"),
    [
        (torch.zeros(2, 16385), "rows of 16385; kernels take 1 to 16384"),
        (torch.zeros(2, 0), "rows of 0"),
        (torch.zeros(()), "rows of 0"),
        (torch.zeros(2, 4, dtype=torch.int32), "x is torch.int32"),
        (torch.zeros(4, 2).t(), "its rows must be dense"),
        (torch.zeros(2, 5, 4)[:, :3], "lie unevenly apart"),
    ],
    ids=str,
)
def test_bad_rows_are_refused(op: Op[..., Any], x: Tensor, said: str) -> None:
    with pytest.raises(KernelInputError, match=f"^{op.name}: .*{said}"):
        op.check(x)
