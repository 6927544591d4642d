"""The generator in Triton: the very integers of sfrt.noise and its normals to 1e-6, whatever the seed and frame."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfrt.noise import chunk_noise, philox, seed_bits

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

from sfrt.ops.triton_kernels.noise import noise  # noqa: E402
from sfrt.ops.triton_kernels.philox import words  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GROUPS = 8

SEEDS = st.one_of(st.integers(0, 2**64 - 1), st.sampled_from([0, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1]))
FRAMES = st.one_of(st.integers(0, 2**32 - 2), st.sampled_from([2**31 - 1, 2**31, 2**32 - 2]))


@triton.jit
def _store_words(out, seed, first_frame, step, first_group, GROUPS: tl.constexpr):
    group = tl.arange(0, GROUPS)
    w0, w1, w2, w3 = words(seed, first_frame, tl.program_id(0), step, first_group + group)
    out += (tl.program_id(0) * GROUPS + group) * 4
    tl.store(out, w0.to(tl.int64))
    tl.store(out + 1, w1.to(tl.int64))
    tl.store(out + 2, w2.to(tl.int64))
    tl.store(out + 3, w3.to(tl.int64))


def of(number: int) -> Tensor:
    return torch.tensor([seed_bits(number)], device=DEVICE)


@settings(max_examples=25)
@given(SEEDS, FRAMES, st.integers(0, 2**31 - 1), st.integers(0, 2**28))
def test_words_are_those_of_the_stream(seed: int, frame: int, step: int, first_group: int) -> None:
    out = torch.empty(2, GROUPS, 4, dtype=torch.int64, device=DEVICE)
    _store_words[(2,)](out, of(seed), of(frame), step, first_group, GROUPS=GROUPS)
    counter = torch.arange(first_group, first_group + GROUPS), torch.tensor([[frame], [frame + 1]])
    expected = philox((*counter, torch.tensor(step), torch.tensor(0)), seed)
    assert torch.equal(out.cpu(), torch.stack(expected, dim=-1))


@settings(max_examples=10)
@given(SEEDS, FRAMES, st.integers(0, 50))
def test_normals_are_those_of_the_stream(seed: int, frame: int, step: int) -> None:
    made = noise(of(seed), of(frame), step, 2, 7, 9)
    expected = chunk_noise(seed, range(frame, frame + 2), range(step, step + 1), 7, 9, torch.device("cpu"))[0]
    torch.testing.assert_close(made.cpu(), expected, rtol=1e-6, atol=1e-6)
