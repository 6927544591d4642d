"""Philox normals: the published generator's integers, Triton's normals, and independence of how they are asked for."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfrt.errors import ConfigError
from sfrt.noise import MAX_SEED, check_seed, chunk_noise, philox

CPU = torch.device("cpu")

# Known answers of Philox 4x32-10 from the generator's authors (Random123, kat_vectors).
KNOWN = [
    ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, MAX_SEED, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        0x299F31D0_A4093822,
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "seed", "words"), KNOWN)
def test_philox_known_answers(counter: tuple[int, ...], seed: int, words: tuple[int, ...]) -> None:
    c0, c1, c2, c3 = (torch.tensor(word, dtype=torch.int64) for word in counter)
    assert tuple(int(word) for word in philox((c0, c1, c2, c3), seed)) == words


def scalar_normal(seed: int, frame: int, step: int, element: int) -> float:
    """One normal in plain Python floats, from the definition in the module's docstring."""
    counter = [torch.tensor(word, dtype=torch.int64) for word in (element // 4, frame, step, 0)]
    words = [int(word) for word in philox((counter[0], counter[1], counter[2], counter[3]), seed)]

    def uniform(word: int) -> float:
        signed = word - 2**32 if word >= 2**31 else word
        return (-signed - 1 if signed < 0 else signed) * 4.6566127342e-10

    pair, lane = divmod(element % 4, 2)
    radius = math.sqrt(-2 * math.log(max(1e-7, uniform(words[2 * pair]))))
    angle = 2 * math.pi * uniform(words[2 * pair + 1])
    return radius * (math.sin(angle) if lane else math.cos(angle))


@given(
    st.integers(0, MAX_SEED),
    st.integers(0, 10**6),
    st.integers(0, 50),
    st.integers(1, 7),
    st.integers(1, 13),
)
def test_normals_match_the_definition(seed: int, frame: int, step: int, tokens: int, width: int) -> None:
    noise = chunk_noise(seed, range(frame, frame + 2), range(step, step + 1), tokens, width, CPU)
    assert noise.shape == (1, 2 * tokens, width) and noise.dtype == torch.float32
    for row, column in ((0, 0), (tokens - 1, width - 1), (2 * tokens - 1, width // 2)):
        frame_offset, token = divmod(row, tokens)
        expected = scalar_normal(seed, frame + frame_offset, step, token * width + column)
        assert float(noise[0, row, column]) == pytest.approx(expected, abs=2e-5)


def test_chunking_does_not_change_the_noise() -> None:
    whole = chunk_noise(7, range(0, 6), range(2, 3), 5, 8, CPU)
    assert torch.equal(chunk_noise(7, range(0, 6), range(0, 4), 5, 8, CPU)[2:3], whole)
    parts = [
        chunk_noise(7, range(start, start + size), range(2, 3), 5, 8, CPU) for start, size in ((0, 1), (1, 3), (4, 2))
    ]
    assert torch.equal(whole, torch.cat(parts, dim=1))


def test_seed_frame_step_and_element_all_matter_and_the_result_is_normal() -> None:
    base = chunk_noise(1, range(0, 1), range(0, 1), 500, 64, CPU).flatten().double()
    others = [
        chunk_noise(1 + 2**32, range(0, 1), range(0, 1), 500, 64, CPU),
        chunk_noise(2, range(0, 1), range(0, 1), 500, 64, CPU),
        chunk_noise(1, range(1, 2), range(0, 1), 500, 64, CPU),
        chunk_noise(1, range(0, 1), range(1, 2), 500, 64, CPU),
    ]
    count = base.numel()
    for other in others:
        assert abs(float(base @ other.flatten().double()) / count) < 5 / math.sqrt(count)
    assert abs(float(base.mean())) < 5 / math.sqrt(count)
    assert abs(float(base.var()) - 1) < 5 * math.sqrt(2 / count)
    assert abs(float((base**4).mean()) - 3) < 5 * math.sqrt(96 / count)


@pytest.mark.parametrize("seed", [-1, MAX_SEED + 1, 1.5])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(ConfigError, match="seed"):
        check_seed(seed)


@pytest.mark.gpu
def test_the_gpu_makes_the_same_noise() -> None:
    on_cpu = chunk_noise(3, range(2, 5), range(1, 2), 100, 64, CPU)
    on_gpu = chunk_noise(3, range(2, 5), range(1, 2), 100, 64, torch.device("cuda"))
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-5)
