"""What is said to be needed, beside what is taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

import sfrt.device
from sfrt import Runtime
from sfrt.backends import Grid
from sfrt.backends.memory import Need, Setting, decoder_state_values, in_words, stream_need, whole_need
from sfrt.bundle import FileInfo, Manifest, TaehvPart, WanVaePart
from sfrt.config import DecoderConfig, ModelConfig, StreamConfig, TaehvConfig, Umt5Config, WanVaeConfig
from sfrt.decoders import load_decoder
from sfrt.decoders.taehv import Taehv, TaehvState
from sfrt.decoders.wan_vae import WanVae
from sfrt.errors import DeviceError
from tests.command_line import PROMPT, Run

CPU = torch.device("cpu")
ON_CPU = Setting("torch", "float32", on_gpu=False)
ON_GPU = Setting("torch", "bfloat16", on_gpu=True)
SMALL = ModelConfig(dim=96, ffn_dim=384, num_heads=2, num_layers=2, text_dim=24, text_len=12)
# Not narrower: convolutions of few channels go other ways, which take more memory than their inputs.
DECODERS: list[DecoderConfig] = [
    TaehvConfig(encoder_width=16, decoder_widths=(64, 32, 16, 16)),
    WanVaeConfig(dim=24),
    WanVaeConfig(dim=24, num_res_blocks=1, temporal_downsample=(True, False, True)),
]


def manifest(decoder: DecoderConfig | None = None, **settings: Any) -> Manifest:
    part = None
    if decoder is not None:
        part = TaehvPart(decoder) if isinstance(decoder, TaehvConfig) else WanVaePart(decoder)
    stated = {"model": SMALL, "stream": StreamConfig(height=64, width=96, window=9), **settings}
    return Manifest("m", "f", weights="flat", dtype="float32", created_by="tests", decoder=part, **stated)


def peak_of(work: Callable[[], Any]) -> int:
    """The most bytes that a piece of work holds at once, beyond what was there."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        result = work()
    del result
    held = most = 0
    for event in seen.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


@pytest.mark.parametrize("config", DECODERS, ids=["taehv", "wan_vae", "another wan_vae"])
def test_a_decoder_state_is_as_large_as_stated(config: DecoderConfig) -> None:
    module = Taehv(config) if isinstance(config, TaehvConfig) else WanVae(config)
    decoder = load_decoder(config, module.state_dict(), CPU, torch.float32)
    latents = torch.randn(1, 3, config.latent_channels, 8, 6)
    with torch.no_grad():
        _, state = decoder.decode(latents, None)
        tensors = state.memory if isinstance(state, TaehvState) else [kept for layer in state.layers for kept in layer]
        values = sum(tensor.numel() for tensor in tensors)
        assert decoder_state_values(config, 8, 6) == values
        peak = peak_of(lambda: decoder.decode(latents, state))
    need = stream_need(manifest(config), StreamConfig(height=64, width=48, window=9), ON_CPU)
    # The new state is among what the profiler saw; half of what is stated of states is the one before.
    assert 0.6 < peak / (need.parts["work space"] + need.parts["decoder state"] / 2) < 1.25


@pytest.mark.parametrize("ring_dtype", ["model", "float8"])
@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_a_stream_on_the_torch_backend(positions: Any, ring_dtype: Any) -> None:
    from sfrt.backends.torch import TorchBackend
    from sfrt.ring import chunk_sizes, ring_for
    from sfrt.transformer import Transformer

    stream = StreamConfig(height=64, width=96, window=9, sink=3, positions=positions, ring_dtype=ring_dtype)
    grid, ring = Grid.of(SMALL, stream), ring_for(stream)
    backend = TorchBackend(SMALL, Transformer(SMALL).state_dict(), CPU, torch.float32)
    rollout = backend.rollout(grid, ring, chunk_sizes(stream), (0.0, 500.0))
    need = stream_need(manifest(), stream, ON_CPU).parts
    cache = rollout._cache
    kept = (cache.k, cache.v, cache._sinks._written)
    assert need["ring"] == sum(tensor.nbytes for tensor in kept)
    rollout.set_text(torch.randn(SMALL.text_len, SMALL.text_dim))
    assert need["prompt"] == rollout._text.k.nbytes + rollout._text.v.nbytes
    tokens = torch.randn(3 * grid.tokens, SMALL.token_dim)
    for start in (0, 3, 6):
        rollout.place(ring.plan(start, 3))
        rollout.refresh(tokens, 0.0)
    assert 0.5 < peak_of(lambda: rollout.flow(tokens, 500.0)) / need["work space"] < 1.3


def test_the_published_model_in_bfloat16() -> None:
    """Sizes that are known: 2.64 GiB of weights, 5.62 GiB of ring at 21 frames, 10.58 GiB of UMT5-XXL."""
    sizes = {"transformer": 2_838_000_000, "decoder": 507_600_000, "text_encoder": 11_361_845_000}
    files = {f"{part}.safetensors": FileInfo(size, "0" * 64) for part, size in sizes.items()}
    published = manifest(
        WanVaeConfig(), model=ModelConfig(), stream=StreamConfig(), text_encoder=Umt5Config(), files=files
    )
    need = whole_need(replace(published, dtype="bfloat16"), StreamConfig(), ON_GPU)
    said = str(need)
    assert said.startswith(f"{need.total / 2**30:.2f} GiB: transformer 2.64 GiB, decoder 484.1 MiB, ring 5.62 GiB, ")
    assert said.endswith("text encoder 10.58 GiB")
    assert "text encoder" not in str(whole_need(published, StreamConfig(), ON_GPU, text_encoder=False))
    assert need.parts["decoder state"] > 2 << 30  # two of "more than a gigabyte"


@given(st.integers(3, 40), st.integers(3, 40), st.sampled_from([ON_CPU, ON_GPU, replace(ON_CPU, backend="onnx")]))
def test_a_longer_window_never_takes_less(one: int, other: int, setting: Setting) -> None:
    short, long = sorted((one, other))
    described = manifest(DECODERS[0])
    totals = [stream_need(described, replace(described.stream, window=n), setting).total for n in (short, long)]
    assert totals[0] <= totals[1]


def test_words() -> None:
    assert [in_words(size) for size in (0, 3 << 19, 2**30, 3 * 2**29)] == ["0.0 MiB", "1.5 MiB", "1.00 GiB", "1.50 GiB"]
    assert str(Need({"ring": 2**20}) | Need({"work": 2**21})) == "3.0 MiB: ring 1.0 MiB, work 2.0 MiB"


def test_a_refusal_says_what_for(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime, other = (Runtime(tiny_bundle, device="cpu", backend="torch") for _ in range(2))
    need = runtime.memory()
    assert {"transformer", "decoder", "ring", "decoder state", "work space", "text encoder"} <= need.parts.keys()
    free = need.total - sum(need.parts[name] for name in ("transformer", "decoder", "text encoder"))
    monkeypatch.setattr(sfrt.device, "free_bytes", lambda device: free)
    runtime.session(PROMPT).close()
    with pytest.raises(
        DeviceError, match=r"^a stream with a ring of 90 .*\(ring .*, decoder state .*, work space .*\); use"
    ):
        runtime.session(PROMPT, stream=replace(runtime.stream, window=90))
    monkeypatch.setattr(sfrt.device, "free_bytes", lambda device: need.parts["text encoder"] // 2)
    with pytest.raises(DeviceError, match=r"the text encoder needs .* free \(text encoder"):
        other.session("a prompt that is new")


def test_info_says_it(run: Run, tiny_bundle: Path) -> None:
    said = run("info", tiny_bundle).out.splitlines()
    assert [line.rpartition("(")[2] for line in said if line.startswith("needs ")] == [
        "bfloat16, on a GPU)",
        "float32, on a CPU)",
    ]
