"""The update between passes, the noise in it, the last step's latents, and frames, where test_kernels does not look."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfrt.config import ModelConfig, Sampler, StreamConfig
from sfrt.errors import KernelInputError
from sfrt.noise import chunk_noise, seed_bits
from sfrt.ops.denoise import DENOISE, FINISH, Update, denoise, finish, update_after
from sfrt.ops.frames import FRAMES, frames, planes_of
from sfrt.ops.layout import tokens_from_latents
from sfrt.ops.noise import NOISE, noise
from sfrt.timesteps import Step, steps_of

CPU = torch.device("cpu")
SEEDS = st.integers(0, 2**64 - 1)
STEPS = st.sampled_from(steps_of(StreamConfig()))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def of(number: int) -> Tensor:
    """A seed or frame number as ops take it."""
    return torch.tensor([seed_bits(number)])


@given(SEEDS, st.integers(0, 2**32 - 4), st.integers(0, 9), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
def test_noise_is_that_of_the_stream(seed: int, frame: int, step: int, count: int, tokens: int, width: int) -> None:
    made = noise(of(seed), of(frame), step, count, tokens, width)
    expected = chunk_noise(seed, range(frame, frame + count), range(step, step + 1), tokens, width, CPU)
    assert torch.equal(made, expected[0])


def test_frames_count_on_from_the_first_modulo_a_word() -> None:
    last = noise(of(5), of(2**32 - 1), 0, 2, 3, 8)
    assert torch.equal(last[:3], noise(of(5), of(2**32 - 1), 0, 1, 3, 8))
    assert torch.equal(last[3:], noise(of(5), of(0), 0, 1, 3, 8))


@given(STEPS, SEEDS, st.sampled_from(["renoise", "euler"]))
def test_denoise_goes_to_the_next_noise_level(step: Step, seed: int, sampler: Sampler) -> None:
    """Where the flow is the true one, noise - clean, either sampler ends at the level the next step starts from."""
    clean, mixed = normal(12, 4), normal(12, 4, seed=1)
    x = (1 - step.sigma) * clean + step.sigma * mixed
    after, _ = denoise(x, mixed - clean, update_after(step, sampler), of(seed), of(6), 3, tokens=4)
    fresh = chunk_noise(seed, range(6, 9), range(3, 4), 4, 4, CPU)[0] if sampler == "renoise" else mixed
    expected = (1 - step.next_sigma) * clean + step.next_sigma * fresh
    torch.testing.assert_close(after, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_the_last_update_is_finish(sampler: Sampler) -> None:
    last = steps_of(StreamConfig())[-1]
    model = ModelConfig(latent_channels=3, patch_size=(1, 2, 2))
    x, flow = normal(12, 12), normal(12, 12, seed=1)
    after, _ = denoise(x, flow, update_after(last, sampler), of(1), of(0), 4, tokens=6)
    tokens, latents = finish(x, flow, last.sigma, model, 2, 3)
    assert torch.equal(after, tokens)
    assert torch.equal(tokens_from_latents(latents, model), tokens)


def test_the_model_reads_its_own_dtype() -> None:
    x, flow = normal(6, 4), normal(6, 4, seed=1).bfloat16()
    update = Update(follow=-0.5, fresh=0.25)
    after, copy = denoise(x, flow, update, of(1), of(0), 1, tokens=3)
    assert after.dtype == torch.float32 and copy.dtype == torch.bfloat16
    assert torch.equal(copy, after.bfloat16())
    after, copy = denoise(x, flow.float(), update, of(1), of(0), 1, tokens=3)
    assert after is copy


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 5), st.integers(1, 3), st.integers(1, 3))
def test_finish_leaves_the_latents_of_its_tokens(
    count: int, rows: int, columns: int, channels: int, patch_rows: int, patch_columns: int
) -> None:
    model = ModelConfig(latent_channels=channels, patch_size=(1, patch_rows, patch_columns))
    shape = (count * rows * columns, model.token_dim)
    tokens, latents = finish(normal(*shape), normal(*shape, seed=1), 0.625, model, rows, columns)
    assert latents.shape == (count, channels, rows * patch_rows, columns * patch_columns)
    assert torch.equal(tokens_from_latents(latents, model), tokens)


def test_halves_are_rounded_to_even_and_the_rest_is_cut() -> None:
    levels = torch.tensor([-3.0, 0.0, 0.5, 1.5, 2.5, 127.5, 254.5, 255.0, 400.0, torch.inf, -torch.inf])
    expected = [0, 0, 0, 2, 2, 128, 254, 255, 255, 255, 0]
    assert frames(levels.expand(1, 3, 1, -1), white=255.0)[0, 0, :, 1].tolist() == expected
    from_minus_one = levels.div(127.5).sub(1).expand(1, 3, 1, -1)
    assert frames(from_minus_one, black=-1.0)[0, 0, :, 1].tolist() == expected


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_frames_are_the_pixels_clamped(seed: int, dtype: torch.dtype) -> None:
    pixels = normal(2, 3, 4, 5, seed=seed).mul(0.5).add(0.5).to(dtype)
    kept = pixels.clone()
    rounded = pixels.float().clamp(0, 1).mul(255).round().to(torch.uint8)
    assert torch.equal(frames(pixels), rounded.permute(0, 2, 3, 1))
    assert torch.equal(pixels, kept), "pixels are the caller's"


@pytest.mark.parametrize(("channels_last", "crop_rows", "crop_columns"), list(product([False, True], repeat=3)))
def test_kernels_walk_over_few_long_rows(channels_last: bool, crop_rows: bool, crop_columns: bool) -> None:
    pixels = normal(2, 3, 6, 8)
    if channels_last:
        pixels = pixels.contiguous(memory_format=torch.channels_last)
    pixels = pixels[:, :, 1 : 5 if crop_rows else 6, 2 if crop_columns else 0 :]
    walked = planes_of(pixels)
    height, width = pixels.shape[2:]
    rows, planes = height if crop_columns else 1, 1 if channels_last else 3
    assert walked.shape == (2, planes, rows, height * width * 3 // planes // rows)
    assert walked.data_ptr() == pixels.data_ptr(), "it is a view"
    assert torch.equal(walked.permute(0, 2, 3, 1).reshape(2, height, width, 3), pixels.permute(0, 2, 3, 1))


TOKENS: dict[str, Any] = {
    "x": normal(12, 16), "flow": normal(12, 16).bfloat16(), "update": Update(-0.5, 0.5), "seed": of(1), "frame": of(0),
    "step": 1, "tokens": 6,
}  # fmt: skip
LAST: dict[str, Any] = {
    "x": normal(12, 16), "flow": normal(12, 16).bfloat16(), "sigma": 0.5, "model": ModelConfig(latent_channels=4),
    "rows": 2, "columns": 3,
}  # fmt: skip
START: dict[str, Any] = {"seed": of(1), "frame": of(0), "step": 0, "frames": 2, "tokens": 3, "token_dim": 4}


@pytest.mark.parametrize(
    ("op", "good", "wrong", "says"),
    [
        (NOISE, START, {"seed": torch.tensor([1.0])}, "seed is torch.float32"),
        (NOISE, START, {"seed": torch.tensor(1)}, r"seed is torch.int64 \[\]"),
        (NOISE, START, {"frame": torch.tensor([1], dtype=torch.int32)}, "frame is torch.int32"),
        (NOISE, START, {"frame": torch.empty(1, dtype=torch.int64, device="meta")}, "frame is on meta"),
        (NOISE, START, {"step": -1}, "step is -1"),
        (NOISE, START, {"frames": 0}, "0×3×4 values"),
        (NOISE, START, {"frames": 65536}, "65536 frames"),
        (NOISE, START, {"tokens": 2**29}, "a frame has 2147483648 values"),
        (DENOISE, TOKENS, {"x": normal(12, 16).bfloat16()}, "x is torch.bfloat16"),
        (DENOISE, TOKENS, {"x": normal(16, 12).t()}, "x is torch.float32"),
        (DENOISE, TOKENS, {"x": normal(192)}, r"x is \[192\]"),
        (DENOISE, TOKENS, {"flow": normal(12, 8)}, "flow is torch.float32"),
        (DENOISE, TOKENS, {"flow": normal(12, 16).double()}, "flow is torch.float64"),
        (DENOISE, TOKENS, {"tokens": 5}, "12 tokens are no whole frames of 5"),
        (DENOISE, TOKENS, {"seed": torch.empty(1, dtype=torch.int64, device="meta")}, "seed is on meta"),
        (FINISH, LAST, {"columns": 5}, "12 tokens are no whole frames of 10"),
        (FINISH, LAST, {"columns": 0}, "2×0 patches"),
        (FINISH, LAST, {"model": ModelConfig(latent_channels=3)}, "the model's 12"),
        (FRAMES, {}, {"pixels": normal(2, 4, 3, 3)}, r"pixels are \[2, 4, 3, 3\]"),
        (FRAMES, {}, {"pixels": normal(3, 3, 3)}, r"pixels are \[3, 3, 3\]"),
        (FRAMES, {}, {"pixels": normal(2, 3, 3, 3).double()}, "pixels are torch.float64"),
        (FRAMES, {}, {"pixels": normal(2, 3, 3, 3), "white": 0.0}, "both 0.0"),
    ],
    ids=lambda value: str(getattr(value, "name", None) or (value if isinstance(value, str) else "")),
)
def test_kernels_say_what_they_do_not_take(op: Any, good: dict[str, Any], wrong: dict[str, Any], says: str) -> None:
    if good:
        op.check(**good)
    with pytest.raises(KernelInputError, match=says):
        op.check(**{**good, **wrong})
