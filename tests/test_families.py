"""How each published family is rolled out, which file names tell it, and which families are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfrt.config import StreamConfig
from sfrt.errors import ConfigError
from sfrt_export.families import FAMILIES, family_of


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("self_forcing_dmd.pt", "self-forcing"),
        ("self_forcing_sid_v2.pt", "self-forcing"),
        ("causal_forcing.pt", "causal-forcing"),
        ("chunkwise/causal_forcing.pt", "causal-forcing"),
        ("chunkwise/model.pt", "causal-forcing"),
        ("Causal-Forcing-Framewise.pt", "causal-forcing-framewise"),
        ("framewise_causal_forcing.pt", "causal-forcing-framewise"),
        ("framewise/causal_forcing.pt", "causal-forcing-framewise"),
        ("framewise/model.pt", "causal-forcing-framewise"),
        ("framewise/self_forcing_dmd.pt", "self-forcing"),
        ("causal_forcing++.pt", "causal-forcing-pp"),
        ("causal_forcing_plus.pt", "causal-forcing-pp"),
        ("framewise/causal_forcing_plus.pt", "causal-forcing-pp"),
        ("longlive_base.pt", "longlive"),
        ("longlive_20240901.pt", "longlive"),
        ("longlive_models/causal_forcing.pt", "causal-forcing"),
        ("longlive_models/model.pt", "longlive"),
        ("CausVid/model.pt", "causvid"),
    ],
)
def test_families_by_file_name(tmp_path: Path, file: str, name: str) -> None:
    family = family_of(None, tmp_path / "downloads" / file)
    assert family is FAMILIES[name]
    assert family_of("causvid", Path(file)).name == "causvid", "what is asked for wins"


def test_a_name_that_tells_nothing(tmp_path: Path) -> None:
    family = family_of(None, tmp_path / "my_own.pt")
    assert family.name == "self-forcing" and family.stream == FAMILIES["self-forcing"].stream
    assert family.caution is not None
    assert family.caution.endswith("my_own.pt names no family; it is taken as self-forcing (--family says otherwise)")
    assert family_of("self-forcing", tmp_path / "my_own.pt").caution is None


def test_settings_of_the_families() -> None:
    pp, longlive, causvid = (FAMILIES[name].stream for name in ("causal-forcing-pp", "longlive", "causvid"))
    assert (pp.chunk, pp.steps, pp.first_steps) == (1, (1000, 500), (1000, 750, 500, 250))
    assert (longlive.chunk, longlive.window, longlive.sink, longlive.shift) == (3, 12, 3, 5)
    assert (causvid.steps, causvid.warp, causvid.shift) == ((1000, 757, 522), False, 8)
    assert FAMILIES["self-forcing"].stream == FAMILIES["causal-forcing"].stream == StreamConfig()
    assert FAMILIES["causal-forcing-framewise"].stream == StreamConfig(chunk=1)
    averaged = {"self-forcing", "causal-forcing-framewise", "causal-forcing-pp"}
    assert {name for name, family in FAMILIES.items() if family.prefer_ema} == averaged


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.unsupported])
def test_families_that_need_more_than_settings(name: str) -> None:
    with pytest.raises(
        ConfigError, match=f"{name} checkpoints need more than settings: its? .*; this is not built yet"
    ):
        family_of(name, Path("model.pt"))


@pytest.mark.parametrize(
    ("file", "name", "reason"),
    [
        ("rolling_forcing_dmd.pt", "rolling-forcing", "denoises several chunks jointly"),
        ("Reward-Forcing-T2V-1.3B/rewardforcing.pt", "reward-forcing", "its sink is a moving average"),
        ("MemFlow/base.pt", "memflow", "retrieves past frames from a memory bank"),
        ("longlive2.pt", "longlive2", "is another model than Wan 2.1"),
        ("LongLive-2.0.pt", "longlive2", "is another model than Wan 2.1"),
        ("longlive_2_20260901.pt", "longlive2", "is another model than Wan 2.1"),
        ("Infinite-Forcing/ema_model.pt", "infinite-forcing", "rotates them when they are read"),
        ("krea-realtime-video-14b.safetensors", "krea", "rebuilds its cache"),
        ("wan_causal_dmd_v2v/model.pt", "streamdiffusionv2", "starts from a source video"),
    ],
)
def test_unsupported_families_are_known_by_their_files(file: str, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} checkpoints need more than settings: its? .*; this is") as caught:
        family_of(None, Path("downloads") / file)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_family() -> None:
    with pytest.raises(ConfigError, match="no family is called 'best'; choose one of: self-forcing, causal-forcing"):
        family_of("best", Path("model.pt"))
