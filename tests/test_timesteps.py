"""The few-step schedule against the published tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfrt.config import StreamConfig
from sfrt.timesteps import opening, sigma_at, sigma_table, steps_of, timesteps_of, warp

TABLES = json.loads((Path(__file__).parent / "golden" / "schedule.json").read_text())


@pytest.mark.parametrize("shift", TABLES)
def test_sigmas_and_warped_steps_match_the_published_scheduler(shift: str) -> None:
    table = TABLES[shift]
    sigmas = sigma_table(float(shift))
    assert list(sigmas[::50]) == pytest.approx(table["sigmas_every_50"], rel=1e-6)
    assert [1000 * sigma for sigma in sigmas[::50]] == pytest.approx(table["timesteps_every_50"], rel=1e-6)
    for listed, warped in table["warped"].items():
        assert warp(float(listed), float(shift)) == pytest.approx(warped, rel=1e-6)


def test_steps_chain_to_the_picture() -> None:
    steps = steps_of(StreamConfig())
    assert [step.timestep for step in steps] == pytest.approx([1000, 937.5, 833.3333, 625])
    assert [step.next_sigma for step in steps] == [*(step.sigma for step in steps[1:]), 0.0]
    assert steps[0].sigma == 1.0


def test_the_first_chunk_may_have_its_own_steps() -> None:
    config = StreamConfig(steps=(1000, 500), first_steps=(1000, 750, 500, 250))
    assert len(steps_of(config, first_chunk=True)) == 4
    assert len(steps_of(config)) == 2
    assert len(timesteps_of(config)) == 5, "shared timesteps count once, the refresh pass is there"


def test_strength_is_where_the_steps_start() -> None:
    steps = steps_of(StreamConfig(), strength=0.7)
    assert [step.timestep for step in steps] == pytest.approx([700, 625]), "937.5 and 833.3 lie above it"
    assert [(step.sigma, step.next_sigma) for step in steps] == [(0.7, 0.625), (0.625, 0.0)]
    assert [step.timestep for step in steps_of(StreamConfig(), strength=0.1)] == pytest.approx([100])
    assert steps_of(StreamConfig(), strength=1.0) == steps_of(StreamConfig())
    assert opening(steps[0]).next_sigma == 0.7, "latents under noise stand where the first step starts"


@given(st.floats(1e-3, 1.0), st.sampled_from([StreamConfig(), StreamConfig(steps=(700, 200), warp=False, shift=8.0)]))
def test_steps_of_any_strength_chain_down_to_the_picture(strength: float, config: StreamConfig) -> None:
    steps = steps_of(config, first_chunk=True, strength=strength)
    assert steps[0].sigma == strength
    assert [step.next_sigma for step in steps] == [*(step.sigma for step in steps[1:]), 0.0]
    assert all(step.next_sigma < step.sigma for step in steps)
    assert {step.timestep for step in steps} <= set(timesteps_of(config, strength))


def test_unwarped_steps_stay_as_listed() -> None:
    config = StreamConfig(steps=(1000, 757, 522), warp=False, shift=8.0)
    assert [step.timestep for step in steps_of(config)] == [1000, 757, 522]


@given(st.floats(0.5, 12.0), st.floats(0.0, 1000.0))
def test_sigma_is_that_of_the_nearest_entry(shift: float, timestep: float) -> None:
    nearest = min(sigma_table(shift), key=lambda sigma: abs(sigma * 1000 - timestep))
    assert abs(sigma_at(timestep, shift) * 1000 - timestep) == pytest.approx(abs(nearest * 1000 - timestep), abs=1e-6)
