"""ONNX Runtime over the transformer's graphs: golden parity, rings with holes, writing in place, refusals."""

from __future__ import annotations

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sfrt import Runtime, graphs
from sfrt.backends import Grid, require_backend
from sfrt.bundle import Bundle, resolve_model
from sfrt.config import ModelConfig, StreamConfig
from sfrt.errors import BundleError, ConfigError, DeviceError
from sfrt.ring import chunk_sizes, ring_for
from sfrt.transformer import Transformer
from sfrt_export.bundle_graphs import bundle_graphs
from sfrt_export.export import export_checkpoint
from sfrt_export.parts_on import transformer_on
from sfrt_export.replay import replay_rollout
from sfrt_export.verify import relative_error

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")
pytest.importorskip("onnxruntime", minversion="1.25")
from sfrt.backends.exported import ExportedBackend  # noqa: E402
from sfrt.backends.loading import choose_backend  # noqa: E402
from sfrt.backends.onnx import OnnxRunner  # noqa: E402
from sfrt_export import onnx_graph  # noqa: E402

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parent / "golden" / "dit"
CASES = sorted(file.parent for file in GOLDEN.rglob("case.json"))
assert CASES
SMALL = ModelConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=24, text_len=8, latent_channels=4
)


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: value.detach() for name, value in Transformer(SMALL).state_dict().items()}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_golden_rollouts(case: Path) -> None:
    settings = json.loads((case / "case.json").read_text())
    tensors = load_file(case / "tensors.safetensors")
    for name, out, reference in replay_rollout(case, settings, tensors, "onnx", CPU, torch.float32):
        assert relative_error(out, reference) <= 1e-4, name


@pytest.mark.parametrize(
    "stream",
    [
        StreamConfig(chunk=2, window=6, sink=2),
        StreamConfig(chunk=3, window=7),
        StreamConfig(chunk=3, window=8, sink=1),
        StreamConfig(chunk=2, first_chunk=1, window=5, sink=2),
    ],
    ids=["whole chunks", "odd window", "odd sink", "short first chunk"],
)
def test_every_ring_gives_torchs_flow(stream: StreamConfig, weights: dict[str, torch.Tensor]) -> None:
    """Far enough that frames have left the window, with holes in what is visible and without."""
    stream = replace(stream, height=32, width=48)
    grid, ring, sizes = Grid.of(SMALL, stream), ring_for(stream), chunk_sizes(stream)
    flows: dict[str, list[torch.Tensor]] = {}
    for backend in ("torch", "onnx"):
        generator = torch.Generator().manual_seed(1)
        with transformer_on(backend, SMALL, dict(weights), CPU, torch.float32, stream) as running:
            rollout = running.rollout(grid, ring, sizes, (700.0, 0.0))
            rollout.set_text(torch.randn(SMALL.text_len, SMALL.text_dim, generator=generator))
            flows[backend] = []
            for number in range(6):
                plan = ring.plan(sizes.start(number), sizes.later if number else sizes.first)
                rollout.place(plan)
                tokens = torch.randn(len(plan.frames) * grid.tokens, SMALL.token_dim, generator=generator)
                flows[backend].append(rollout.flow(tokens, 700.0).clone())
                rollout.refresh(tokens, 0.0)
    for ours, theirs in zip(flows["onnx"], flows["torch"], strict=True):
        assert relative_error(ours, theirs) <= 1e-5


def test_step_is_refresh_and_flow_in_one(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """For other runtimes; sfrt runs the two."""
    grid, stream = Grid.of(SMALL, StreamConfig(height=32, width=48)), StreamConfig(height=32, width=48, window=6)
    runner = OnnxRunner(_write(tmp_path, SMALL, weights), CPU, torch.float32)
    rollout = ExportedBackend(runner, SMALL).rollout(grid, ring_for(stream), chunk_sizes(stream), (700.0, 0.0))
    rollout.set_text(torch.randn(SMALL.text_len, SMALL.text_dim))
    tokens = torch.randn(2, 3 * grid.tokens, SMALL.token_dim)
    rollout.place(ring_for(stream).plan(0, 3))
    rollout.refresh(tokens[0], 0.0)
    rollout.place(ring_for(stream).plan(3, 3))
    inputs = rollout._buffers.pass_inputs(len(tokens[1]), masked=False)
    at_first = {name: tensor.clone() for name, tensor in inputs.items()}
    flow = rollout.flow(tokens[1], 700.0)
    after = {name: tensor.clone() for name, tensor in rollout._buffers.rings_out().items()}
    step = {**at_first, graphs.TOKENS: tokens[1], graphs.STEP: torch.tensor(0)}
    found = runner.call("step", step)
    assert found.keys() == {graphs.FLOW, *after}
    assert all(torch.equal(found[name], wanted) for name, wanted in {graphs.FLOW: flow, **after}.items())


IN_PLACE = """
import ctypes, mmap, sys
from pathlib import Path
import numpy as np, torch
from sfrt import Runtime, graphs
from sfrt.backends.onnx import OnnxRunner

folder, where = Path(sys.argv[1]), sys.argv[2]
layers, heads, d, page = {layers}, {heads}, {d}, mmap.PAGESIZE
tokens = page // (4 * d)  # a chunk fills one page of each head
ring, chunk = 4 * tokens, 1
shape = (1, heads, ring, d)
keys = [(kind, layer) for kind in graphs.KINDS for layer in range(layers)]
maps = [mmap.mmap(-1, 4 * heads * ring * d) for _ in 2 * keys]
memory = [torch.frombuffer(one, dtype=torch.float32).view(shape).normal_() for one in maps]
rings, others = dict(zip(keys, memory)), dict(zip(keys, memory[len(keys):]))
before = {{key: ring.clone() for key, ring in rings.items()}}
inputs = {{
    graphs.TOKENS: torch.randn(tokens, {token_dim}), graphs.STEP: torch.tensor(0),
    graphs.MODULATION_BLOCKS: torch.randn(1, 6 * layers, {dim}),
    graphs.ROTARY_COS: torch.ones(1, tokens, d // 2), graphs.ROTARY_SIN: torch.zeros(1, tokens, d // 2),
    graphs.WRITE_AT: torch.tensor([chunk * tokens]), graphs.VALID: torch.tensor([ring]),
    **{{graphs.ring_in(*key): ring for key, ring in rings.items()}},
    **{{graphs.text(*key): torch.randn(1, heads, {text_len}, d) for key in rings}},
}}
results = rings if where == "in place" else others
left = {{name: torch.empty(tokens, {dim}) for name in (graphs.HIDDEN, graphs.QUERIES)}}
outputs = {{**left, **{{graphs.ring_out(*k): r for k, r in results.items()}}}}
run = OnnxRunner(folder, torch.device("cpu"), torch.float32).bind("refresh", inputs, outputs)
protect = ctypes.CDLL(None, use_errno=True).mprotect
for tensor in results.values():
    for head in range(heads):
        for block in range(4):
            start = tensor.data_ptr() + (head * 4 + block) * page
            if block != chunk:
                assert protect(ctypes.c_void_p(start), page, mmap.PROT_READ) == 0
run()
for key, ring in rings.items():
    changed = (ring != before[key]).any(-1)[0]
    assert changed[:, chunk * tokens : (chunk + 1) * tokens].all() and changed.sum() == heads * tokens
print("written in place")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory pages by mprotect")
def test_the_ring_is_written_in_place_and_nowhere_else(tmp_path: Path) -> None:
    """All of the ring's memory but the chunk's own slots is made read-only: a copy, onto itself even, would crash."""
    config = replace(SMALL, dim=64, num_heads=2)  # heads of 32: a page holds a whole number of tokens
    _write(tmp_path, config, Transformer(config).state_dict())
    script = IN_PLACE.format(
        layers=config.num_layers,
        heads=config.num_heads,
        d=config.head_dim,
        dim=config.dim,
        token_dim=config.token_dim,
        text_len=config.text_len,
    )
    in_place, elsewhere = (
        subprocess.run([sys.executable, "-c", script, str(tmp_path), where], capture_output=True, text=True)
        for where in ("in place", "elsewhere")
    )
    assert in_place.stdout == "written in place\n", in_place.stderr
    assert elsewhere.returncode == -signal.SIGSEGV, "bound to other memory the ring is copied there, which is noticed"


def _write(folder: Path, config: ModelConfig, weights: dict[str, torch.Tensor]) -> Path:
    """The transformer's weights and graphs in a folder."""
    save_file(weights, folder / "transformer.safetensors")
    onnx_graph.write_graphs(onnx_graph.transformer_graphs(config, folder, "float32"), folder, "float32")
    return folder


def test_runs_share_one_set_of_buffers(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    """No allocation per step: each pass reads and writes the tensors it was bound to."""
    stream = StreamConfig(chunk=2, window=6, height=32, width=48)
    grid, ring = Grid.of(SMALL, stream), ring_for(stream)
    running = ExportedBackend(OnnxRunner(_write(tmp_path, SMALL, weights), CPU, torch.float32), SMALL)
    rollout = running.rollout(grid, ring, chunk_sizes(stream), (700.0, 0.0))
    rollout.set_text(torch.randn(SMALL.text_len, SMALL.text_dim))
    flows = []  # held, so that memory that was made anew could not be at the same address
    for start in (0, 2, 4, 6):
        rollout.place(ring.plan(start, 2))
        flows.append(rollout.flow(torch.randn(2 * grid.tokens, SMALL.token_dim), 700.0))
    assert len({flow.data_ptr() for flow in flows}) == 1


@pytest.mark.parametrize("name", ["onnxx", "onnx:", "torch:cpu", "tensorrt:0", ""])
def test_unknown_backends(name: str) -> None:
    with pytest.raises(ConfigError, match="no backend is called"):
        require_backend(name)


@pytest.mark.parametrize(
    ("provider", "dtype", "error", "told"),
    [
        ("metal", torch.float32, ConfigError, "no provider called 'metal'"),
        ("cuda", torch.float32, ConfigError, "does not run on cpu"),
        (None, torch.bfloat16, ConfigError, "too few bfloat16 kernels for CPUs"),
    ],
)
def test_refusals(provider: str | None, dtype: torch.dtype, error: type[Exception], told: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=told):
        OnnxRunner(tmp_path, CPU, dtype, provider)


def test_a_provider_that_this_build_lacks(tmp_path: Path) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this build has it")
    with pytest.raises(DeviceError, match="no CUDAExecutionProvider"):
        OnnxRunner(tmp_path, torch.device("cuda", 0), torch.float16)


def test_an_old_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.22.0")
    with pytest.raises(ConfigError, match=r"1\.22\.0 is too old for graphs of opset 24"):
        OnnxRunner(tmp_path, CPU, torch.float32)


def test_a_graph_that_is_none(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    folder = _write(tmp_path, SMALL, weights)
    (folder / graphs.graph_file("text_kv", "float32")).write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"text_kv\.float32\.onnx cannot be loaded by ONNX Runtime"):
        OnnxRunner(folder, CPU, torch.float32).bind("text_kv", {}, {})


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    error = np.square(ours.astype(np.float64) - theirs).mean()
    return float("inf") if error == 0 else 10 * math.log10(255**2 / error)


def test_the_built_in_model_makes_the_same_video(tmp_path: Path) -> None:
    """Through everything that a user's command goes through; a picture to go on from, so encoder and decoder too."""
    start = torch.rand(5, 3, 64, 64)
    videos, backends = [], []
    for backend in ("torch", "onnx", "auto"):
        runtime = Runtime(device="cpu", backend=backend)
        backends.append(runtime.backend)
        with runtime.session(
            "a red circle moving left on a white background", seed=2, initial=start, limit=3
        ) as session:
            frames = [chunk.frames for chunk in session]
            assert session.initial_frames is not None
            videos.append(np.concatenate([session.initial_frames, *frames]))
    assert backends == ["torch", "onnx", "onnx"], "the faster one is what a CPU gets by default"
    assert psnr(videos[1], videos[0]) >= 50
    assert psnr(videos[2], videos[1]) == float("inf")


def export(output: Path, **options: Any) -> None:
    """The golden transformer as a bundle."""
    weights = GOLDEN / "weights_d128h2l2.safetensors"
    export_checkpoint(weights, output, family="self-forcing", heads=2, text_len=24, **options)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export(folder / "model", dtype="bfloat16", onnx=True)
    return folder / "model"


def test_export_writes_graphs_in_float32_and_as_stored(exported: Path) -> None:
    manifest = Bundle.open(exported).manifest
    assert manifest.graphs == ("float32", "bfloat16")
    for dtype in manifest.graphs:
        for name in graphs.OF_PART["transformer"]:
            assert (exported / graphs.graph_file(name, dtype)).stat().st_size < 200e3, "no weights in it"


@pytest.mark.parametrize("masked", ["", "_masked"])
def test_the_graphs_of_a_stream_have_no_weights_in_common(exported: Path, masked: str) -> None:
    """Each is in memory once, in one session."""
    seen: set[str] = set()
    for name in (f"refresh{masked}", f"flow{masked}", "modulation", "text_kv"):
        graph = onnx.load(exported / f"{name}.float32.onnx", load_external_data=False).graph
        weights = {tensor.name for tensor in graph.initializer if tensor.external_data}
        assert weights and not weights & seen
        seen |= weights
    assert seen == load_file(exported / "transformer.safetensors").keys()


def test_a_damaged_graph_is_found_before_it_runs(exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path / "model")
    file = tmp_path / "model" / "refresh.float32.onnx"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"refresh\.float32\.onnx is damaged"):
        Runtime(tmp_path / "model", device="cpu", backend="onnx")


def test_a_bundle_without_the_graphs_asked_for(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has graphs in float32, bfloat16 only; .* --onnx-dtype float16"):
        Bundle.open(exported).graph_folder("transformer", "float16")
    export(tmp_path / "plain")
    with pytest.raises(BundleError, match=r"has no ONNX graphs; .* --onnx-dtype float32"):
        Runtime(tmp_path / "plain", device="cpu", backend="onnx")
    assert Runtime(tmp_path / "plain", device="cpu").backend == "torch"


def test_a_graph_dtype_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="dtype 'int4' is not one of"):
        export(tmp_path / "model", onnx=("int4",))
    assert not (tmp_path / "model").exists()


def test_a_run_that_fails_is_one_sentence(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    runner = OnnxRunner(_write(tmp_path, SMALL, weights), CPU, torch.float32)
    with pytest.raises(DeviceError, match=r"cannot run text_kv on cpu .*; where it is memory, use a smaller"):
        runner.call("text_kv", {graphs.EMBEDS: torch.zeros(3, SMALL.text_dim)})


def test_auto_leaves_large_attention_to_torch(exported: Path) -> None:
    """ONNX Runtime would hold every score of a pass at once."""
    bundle = Bundle.open(exported)
    assert choose_backend(bundle, "auto", CPU, torch.float32) == "torch", "480 × 832 by default"
    small = replace(bundle.manifest, stream=replace(bundle.manifest.stream, height=64, width=96))
    assert choose_backend(replace(bundle, manifest=small), "auto", CPU, torch.float32) == "onnx"
    assert choose_backend(replace(bundle, manifest=small), "auto", CPU, torch.bfloat16) == "torch"


def test_the_built_in_graphs_are_what_export_makes_now(tmp_path: Path) -> None:
    bundle = Bundle.open(resolve_model())
    for part in ("transformer", "decoder", "text_encoder"):
        shutil.copy(bundle.path / f"{part}.safetensors", tmp_path)
    names = bundle_graphs(bundle.manifest, tmp_path)
    assert sorted(names) == sorted(path.name for path in bundle.path.glob("*.onnx"))
    for name in names:
        ours, shipped = (onnx.load(folder / name, load_external_data=False) for folder in (tmp_path, bundle.path))
        assert ours.graph == shipped.graph, name
