"""The few-step schedule against the published tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfrt.config import StreamConfig
from sfrt.timesteps import sigma_at, sigma_table, steps_of, timesteps_of, warp

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


def test_unwarped_steps_stay_as_listed() -> None:
    config = StreamConfig(steps=(1000, 757, 522), warp=False, shift=8.0)
    assert [step.timestep for step in steps_of(config)] == [1000, 757, 522]


@given(st.floats(0.5, 12.0), st.floats(0.0, 1000.0))
def test_sigma_is_that_of_the_nearest_entry(shift: float, timestep: float) -> None:
    nearest = min(sigma_table(shift), key=lambda sigma: abs(sigma * 1000 - timestep))
    assert abs(sigma_at(timestep, shift) * 1000 - timestep) == pytest.approx(abs(nearest * 1000 - timestep), abs=1e-6)
