"""Rings of e4m3 keys and values: scales that nothing goes beyond, streams near those of plain rings, less memory."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt import ConfigError, DeviceError, Runtime, Session
from sfrt.backends import Grid
from sfrt.backends.loading import choose_backend, workloads_of
from sfrt.backends.memory import Setting, stream_need
from sfrt.backends.torch import TorchBackend
from sfrt.bundle import Bundle
from sfrt.cache import KVCache
from sfrt.config import ModelConfig, StreamConfig
from sfrt.ops.choice import torch_ops
from sfrt.ops.eight_bits import FLOAT8
from sfrt.ops.rolling_kv import QKV
from sfrt.ops.shift_keys import shift_keys
from sfrt.ring import Ring, chunk_sizes, ring_for
from sfrt.snapshot import read_snapshot
from sfrt.timesteps import timesteps_of
from sfrt.transformer import Modulation, Transformer, rotary_phases
from sfrt_export.verify import relative_error
from tests.command_line import Run
from tests.streams import same, take

CPU = torch.device("cpu")
PROMPT, OTHER = "a red circle moving left", "a blue square moving left"
MODEL = ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=24, text_len=8)
GRID = Grid(2, 3)
RING = Ring(3, dtype="float8")


def lively(seed: int, spread: float = 1.0) -> Transformer:
    """A model whose weights, of norms too, differ by orders of magnitude."""
    torch.manual_seed(seed)
    model = Transformer(MODEL).requires_grad_(False)
    for weight in model.parameters():
        weight.normal_().mul_(torch.exp(spread * torch.randn(weight.shape[-1])) / weight[0].numel() ** 0.5)
    return model


def written(model: Transformer, x: Tensor, modulation: Modulation, scales: bool) -> tuple[Tensor, Tensor]:
    """Keys and values of the first layer, [H, L, d], as its ring has them; x [L, D] is what its first norm reads."""
    shift, scale = modulation.blocks[0, :2]
    h = torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=MODEL.eps), scale)
    block = model.layers()[0]
    qkv: QKV = block.self_attn.qkv_of(h, rotary_phases(MODEL, range(7, 8), GRID.rows, GRID.columns, CPU))
    ring_scales = model.ring_scales([modulation]) if scales else None
    cache = KVCache(MODEL, RING, GRID.tokens, CPU, torch.float32, torch_ops(), ring_scales)
    cache.place(RING.plan(0, 1))
    cache.write(0, qkv)
    kept = cache.k[0, :, : GRID.tokens], cache.v[0, :, : GRID.tokens]
    if ring_scales is None:
        return kept
    assert all(ring.dtype == FLOAT8 for ring in kept)
    k, v = kept
    return k.float() * ring_scales.k[0, :, None, None], v.float() * ring_scales.v[0, :, None, None]


@given(seed=st.integers(0, 2**31), spread=st.floats(0, 3), timestep=st.floats(0, 1000))
def test_nothing_goes_beyond_what_the_scales_allow(seed: int, spread: float, timestep: float) -> None:
    model = lively(seed, spread)
    modulation = model.modulation(torch.tensor(timestep))
    scales = model.ring_scales([model.modulation(torch.tensor(300.0)), modulation])
    for x in (torch.randn(GRID.tokens, MODEL.dim), torch.randn(GRID.tokens, MODEL.dim) ** 7):
        for ring, scale in zip(written(model, x, modulation, scales=False), (scales.k[0], scales.v[0]), strict=True):
            assert (ring.abs().amax((1, 2)) <= 1.0001 * 448 * scale).all()


@pytest.mark.parametrize("seed", range(4))
def test_no_smaller_scale_would_do(seed: int) -> None:
    """A token along the row of a weight makes about the largest value there can be; a key may be of one feature."""
    model = lively(seed, spread=0.3)
    modulation = model.modulation(torch.tensor(500.0))
    scales, attention = model.ring_scales([modulation]), model.layers()[0].self_attn
    rows = attention.qkv.weight[-MODEL.dim :] * modulation.blocks[0, 1]
    rows = rows[rows.norm(dim=-1).topk(GRID.tokens).indices]
    reached = [written(model, sign * rows, modulation, scales=False)[1].abs().amax() for sign in (1, -1)]
    assert max(reached) > 0.8 * 448 * scales.v[0].max()
    keys = MODEL.dim**0.5 * attention.norm_k.weight.abs().view(MODEL.num_heads, -1).amax(-1)
    torch.testing.assert_close(448 * scales.k[0], keys)


@pytest.mark.parametrize("seed", range(4))
def test_scales_for_the_rarest_lose_nothing_of_the_usual(seed: int) -> None:
    """Three bits of mantissa: 2.6 % at most, where what is rounded away is even."""
    model = lively(seed)
    modulation, x = model.modulation(torch.tensor(500.0)), torch.randn(GRID.tokens, MODEL.dim)
    for found, exact in zip(written(model, x, modulation, True), written(model, x, modulation, False), strict=True):
        assert relative_error(found, exact) < 0.03


def test_keys_turned_further_are_numbers_still() -> None:
    """A pair at the end of the range may come to lie beyond it by rounding; e4m3 has no infinity."""
    keys = torch.full((1, 1, 5, 8), 448.0).to(FLOAT8)
    for shift in range(1, 30):
        moved = shift_keys(keys, shift, 10000.0).float()
        assert moved.isfinite().all() and moved.abs().amax() <= 448


@pytest.fixture(scope="module")
def float8_stream(runtime: Runtime) -> StreamConfig:
    return replace(runtime.stream, ring_dtype="float8")


def latents_of(session: Session, chunks: int = 5) -> Tensor:
    with session:
        return torch.cat([chunk.latents for chunk in take(session, chunks)])


@pytest.mark.parametrize(
    "settings",
    [{}, {"positions": "window"}, {"refresh": "rebuild", "sink": 0}, {"first_chunk": 1, "window": 8, "sink": 1}],
    ids=str,
)
def test_a_stream_is_near_that_of_a_plain_ring(runtime: Runtime, settings: dict[str, Any]) -> None:
    """Five chunks, the ring wrapped; random weights give more to attention than trained ones."""
    plain = replace(runtime.stream, **settings)
    streams = plain, replace(plain, ring_dtype="float8")
    expected, found = (latents_of(runtime.session(PROMPT, seed=3, stream=stream)) for stream in streams)
    assert 1e-4 < relative_error(found, expected) < 0.05


def test_with_quantised_weights_too(tiny_bundle: Path, tmp_path: Path) -> None:
    from sfrt_export.quantized_bundle import quantize_bundle

    quantized = quantize_bundle(Bundle.open(tiny_bundle), tmp_path / "small", "float8", force=True)
    runtime = Runtime(quantized.path, device="cpu", backend="torch")
    streams = runtime.stream, replace(runtime.stream, ring_dtype="float8")
    expected, found = (latents_of(runtime.session(PROMPT, stream=stream), 2) for stream in streams)
    assert 1e-4 < relative_error(found, expected) < 0.05


@pytest.mark.parametrize("positions", ["absolute", "window"])
def test_a_restored_stream_goes_on_byte_for_byte(
    runtime: Runtime, float8_stream: StreamConfig, positions: Any, tmp_path: Path
) -> None:
    stream = replace(float8_stream, positions=positions)
    with runtime.session(PROMPT, seed=7, stream=stream) as session:
        take(session, 5)
        session.snapshot(tmp_path / "stream")
        session.prompt = OTHER
        expected = take(session, 2)
    kept = read_snapshot(tmp_path / "stream", CPU)
    assert kept.settings.ring.dtype == "float8" and kept.ring["k"].dtype == FLOAT8
    with runtime.restore(tmp_path / "stream") as session:
        session.prompt = OTHER
        assert same(take(session, 2), expected)


def test_snapshots_of_version_1_are_of_plain_rings(runtime: Runtime, tmp_path: Path) -> None:
    with runtime.session(PROMPT, seed=7) as session:
        take(session, 1)
        session.snapshot(tmp_path / "stream")
        expected = take(session, 1)
    older = replaced(tmp_path / "stream", lambda settings: settings["stream"].pop("ring_dtype"))
    with runtime.restore(older) as session:
        assert same(take(session, 1), expected)


def replaced(path: Path, edit: Callable[[Any], object]) -> Path:
    """A snapshot as version 1 wrote it, hash and all."""
    from sfrt.snapshot import _digest

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    record = json.loads(metadata["stream"])
    edit(record["settings"])
    del record["settings"]["ring"]["dtype"], metadata["sha256"]
    metadata |= {"stream": json.dumps(record), "sfrt_snapshot": "1"}
    tensors = load_file(path)
    save_file(tensors, path, {**metadata, "sha256": _digest(tensors, metadata)})
    return path


def test_memory_is_what_is_stated(runtime: Runtime, float8_stream: StreamConfig) -> None:
    model, settings = runtime.manifest.model, Setting("torch", "float32", on_gpu=False)
    backend = runtime._transformer
    assert isinstance(backend, TorchBackend)
    stated = []
    for stream in (runtime.stream, float8_stream, replace(float8_stream, positions="window")):
        rollout = backend.rollout(Grid.of(model, stream), ring_for(stream), chunk_sizes(stream), timesteps_of(stream))
        cache = rollout._cache
        taken = sum(tensor.nbytes for tensor in (cache.k, cache.v, cache._sinks._written))
        stated.append(stream_need(runtime.manifest, stream, settings).parts["ring"])
        assert stated[-1] == taken
    assert stated[0] == 4 * stated[1] < 4 * stated[2]
    on_gpu = replace(settings, dtype="bfloat16", on_gpu=True)
    plain, float8 = (stream_need(runtime.manifest, s, on_gpu) for s in (runtime.stream, float8_stream))
    assert plain.parts["ring"] == 2 * float8.parts["ring"] and plain.parts["work space"] == float8.parts["work space"]


def test_the_torch_backend_alone_has_them(tiny_bundle: Path, float8_stream: StreamConfig) -> None:
    pytest.importorskip("onnxruntime", minversion="1.25")
    built_in = Runtime(device="cpu", backend="onnx")
    with pytest.raises(ConfigError, match=r"^a ring in float8 runs on the torch backend alone; choose backend 'torch'"):
        built_in.session(PROMPT, stream=replace(built_in.stream, ring_dtype="float8"))
    bundle = Bundle.open(Runtime(device="cpu", backend="torch")._bundle.path)
    assert choose_backend(bundle, "auto", CPU, torch.float32) == "onnx"
    object.__setattr__(bundle.manifest.stream, "ring_dtype", "float8")
    assert choose_backend(bundle, "auto", CPU, torch.float32) == "torch"
    assert set(workloads_of(bundle.manifest)) == {"attention", "attention_float8"}


def test_gpus_before_8_9_have_none(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = runtime._transformer
    assert isinstance(backend, TorchBackend)
    monkeypatch.setattr(backend, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    with pytest.raises(DeviceError, match=r"needs a GPU of compute capability 8\.9 or later, and cuda:0 is none"):
        backend._ring_scales([])


def test_settings_know_two_kinds() -> None:
    with pytest.raises(ConfigError, match="ring_dtype cannot be 'int8'; choose one of: model, float8"):
        StreamConfig(ring_dtype="int8")  # type: ignore[arg-type]


def test_the_command_line(run: Run, tiny_bundle: Path) -> None:
    given = ("generate", PROMPT, "--model", tiny_bundle, "--chunks", 1, "-o", "out.gif", "--json", "--device", "cpu")
    outcome = run(*given, "--ring-dtype", "float8")
    assert outcome.code == 0 and json.loads(outcome.out)["settings"]["ring_dtype"] == "float8"
    assert run(*given, "--ring-dtype", "int4").code == 2


@pytest.mark.gpu
def test_on_a_gpu(tiny_bundle: Path) -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("e4m3 kernels need compute capability 8.9")
    runtime = Runtime(tiny_bundle, device="cuda", dtype="bfloat16", backend="torch")
    streams = runtime.stream, replace(runtime.stream, ring_dtype="float8")
    expected, found = (latents_of(runtime.session(PROMPT, seed=3, stream=stream)).cpu() for stream in streams)
    assert 1e-4 < relative_error(found, expected) < 0.1
