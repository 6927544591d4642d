"""The passes of a chunk: noise drawn beforehand and noise made by kernels are one noise."""

from __future__ import annotations

import pytest
import torch

from sfrt.config import Sampler, StreamConfig
from sfrt.denoising import DrawnNoise, KernelNoise
from sfrt.noise import seed_bits
from sfrt.ops.choice import torch_ops
from sfrt.ops.denoise import update_after
from sfrt.stage import PhiloxNoise
from sfrt.timesteps import opening, steps_of

NOISE = PhiloxNoise(2**63 + 5, tokens=6, token_dim=8, device=torch.device("cpu"))
FRAMES = range(7, 10)


@pytest.mark.parametrize("from_given", [False, True])
@pytest.mark.parametrize("sampler", ["renoise", "euler"])
def test_both_ways_of_mixing_give_the_same_tokens(sampler: Sampler, from_given: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(18, 8, generator=generator) if from_given else None
    steps = steps_of(StreamConfig(sampler=sampler))
    seed, frame = torch.tensor([seed_bits(NOISE.seed)]), torch.tensor([FRAMES.start])
    drawn = DrawnNoise(NOISE(FRAMES, len(steps)))
    made = KernelNoise(seed, frame, (len(FRAMES), NOISE.tokens, NOISE.token_dim), torch_ops())
    start = update_after(opening(steps[1]), "renoise")
    (x, _), (y, _) = drawn.start(given, start), made.start(given, start)
    assert torch.equal(x, y)
    for number, step in enumerate(steps[:-1], start=1):
        flow = torch.randn(18, 8, generator=generator).bfloat16()
        update = update_after(step, sampler)
        (x, _), (y, read) = drawn.onward(x, flow, update, number), made.onward(y, flow, update, number)
        assert torch.equal(x, y)
        assert read.dtype == torch.bfloat16 and torch.equal(read, y.bfloat16())
