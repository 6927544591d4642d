"""How each published family is rolled out, which file names tell it, and which families are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt import Runtime
from sfrt.config import StreamConfig
from sfrt.errors import ConfigError
from sfrt_export.export import export_checkpoint
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
        ("wan_causal_dmd_v2v/model.pt", "streamdiffusionv2"),
        ("Infinite-Forcing/ema_model.pt", "infinite-forcing"),
        ("krea-realtime-video-14b.safetensors", "krea"),
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
    v2v = FAMILIES["streamdiffusionv2"].stream
    assert (v2v.chunk, v2v.window, v2v.sink) == (1, 6, 3)
    assert (v2v.steps, v2v.warp, v2v.shift) == ((700, 500, 400, 200), False, 8)
    infinite, krea = FAMILIES["infinite-forcing"].stream, FAMILIES["krea"].stream
    assert infinite == StreamConfig(window=6, sink=1, positions="window")
    assert (krea.chunk, krea.window, krea.sink, krea.shift, krea.context_noise) == (3, 6, 0, 5, 0)
    assert (krea.steps, krea.warp) == ((1000, 937, 833, 625), False)
    assert (krea.positions, krea.refresh) == ("window", "reencode")
    averaged = {"self-forcing", "causal-forcing-framewise", "causal-forcing-pp", "infinite-forcing"}
    assert {name for name, family in FAMILIES.items() if family.prefer_ema} == averaged


@pytest.fixture
def weights(golden: Path) -> dict[str, Tensor]:
    """A small DiT under its published names."""
    return load_file(golden / "dit" / "weights_d128h2l2.safetensors")


def test_infinite_forcing_as_it_is_published(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    spelled = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in weights.items()}
    plain = {name: torch.zeros_like(tensor) for name, tensor in spelled.items()}
    (tmp_path / "Infinite-Forcing").mkdir()
    file = tmp_path / "Infinite-Forcing" / "ema_model.pt"
    torch.save({"generator": plain, "generator_ema": spelled}, file)
    bundle = export_checkpoint(file, tmp_path / "bundle", heads=2, text_len=24)
    assert (bundle.manifest.family, bundle.manifest.weights) == ("infinite-forcing", "generator_ema")
    assert bundle.manifest.stream == FAMILIES["infinite-forcing"].stream
    assert chunks_of(bundle.path, chunks=3) == 3


def test_krea_as_it_is_published(tmp_path: Path, weights: dict[str, Tensor]) -> None:
    """One flat safetensors file; it can be exported without a decoder, and then not streamed as it is."""
    file = tmp_path / "krea-realtime-video-14b.safetensors"
    save_file({f"model.{name}": tensor for name, tensor in weights.items()}, file)
    with pytest.warns(UserWarning, match="krea sees the oldest frame in view encoded anew"):
        bundle = export_checkpoint(file, tmp_path / "bundle", heads=2, text_len=24)
    assert (bundle.manifest.family, bundle.manifest.weights) == ("krea", "flat")
    assert bundle.manifest.stream == FAMILIES["krea"].stream
    with pytest.raises(ConfigError, match="refresh is 'reencode', and this model has no decoder"):
        chunks_of(bundle.path, chunks=1)
    assert chunks_of(bundle.path, chunks=3, refresh="rebuild") == 3


def chunks_of(bundle: Path, chunks: int, **settings: Any) -> int:
    """How many chunks with finite latents a bundle streams, at a small size."""
    runtime = Runtime(bundle, device="cpu", dtype="float32")
    stream = replace(runtime.stream, height=32, width=32, **settings)
    embeds = torch.randn(runtime.manifest.model.text_len, runtime.manifest.model.text_dim)
    with runtime.session(embeds, limit=chunks, stream=stream) as session:
        return sum(bool(chunk.latents.isfinite().all()) for chunk in session)


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
    ],
)
def test_unsupported_families_are_known_by_their_files(file: str, name: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} checkpoints need more than settings: its? .*; this is") as caught:
        family_of(None, Path("downloads") / file)
    assert reason in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_family() -> None:
    with pytest.raises(ConfigError, match="no family is called 'best'; choose one of: self-forcing, causal-forcing"):
        family_of("best", Path("model.pt"))
