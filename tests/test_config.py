"""Settings are checked where they are made, in one sentence that says what to do."""

from __future__ import annotations

from typing import Any

import pytest

from sfrt.config import ModelConfig, StreamConfig, Umt5Config, WanVaeConfig
from sfrt.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"height": 470}, "multiple of 16; the nearest is 464"),
        ({"width": 0}, "multiple of 16"),
        ({"window": 5, "sink": 3}, "make it at least 6"),
        ({"steps": (500.0, 750.0)}, "do not descend"),
        ({"steps": (500.0, 500.0)}, "do not descend"),
        ({"steps": ()}, "name at least one"),
        ({"steps": (1200.0,)}, "leave"),
        ({"first_steps": (1.0, 2.0)}, "do not descend"),
        ({"chunk": 0}, "at least 1"),
        ({"first_chunk": 4}, "between 1 and the chunk"),
        ({"sink": -1}, "negative"),
        ({"shift": 0.0}, "shift"),
        ({"shift": float("inf")}, "finite"),
        ({"steps": (1000.0, 0.4)}, "whole numbers"),
        ({"context_noise": 1000.0}, "context noise"),
        ({"fps": 0}, "fps"),
        ({"sampler": "best"}, "sampler cannot be 'best'; choose one of: renoise, euler"),
        ({"positions": "relative"}, "positions cannot be 'relative'; choose one of: absolute, window"),
        ({"refresh": None}, "refresh cannot be None; choose one of: rolling, rebuild, reencode"),
    ],
)
def test_impossible_streams_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        StreamConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_heads": 7}, "does not split"),
        ({"dim": 48, "num_heads": 12}, "too small for rotary"),
        ({"dim": -1}, "positive"),
        ({"freq_dim": 255}, "even"),
        ({"patch_size": (2, 2, 2)}, "patch size"),
    ],
)
def test_impossible_models_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ModelConfig(**settings)


def test_impossible_encoders_are_refused() -> None:
    with pytest.raises(ConfigError, match="does not split"):
        Umt5Config(num_heads=7)
    with pytest.raises(ConfigError, match="positive"):
        Umt5Config(num_heads=0)
    with pytest.raises(ConfigError, match="statistics"):
        WanVaeConfig(latent_channels=4)
    with pytest.raises(ConfigError, match="temporal_downsample"):
        WanVaeConfig(temporal_downsample=(True,))


def test_the_defaults_are_the_published_1_3b_model() -> None:
    model = ModelConfig()
    assert (model.head_dim, model.token_dim) == (128, 64)
