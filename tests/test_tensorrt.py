"""Plans for TensorRT: what can be known of them without it, and on a GPU that they compute what torch does."""

from __future__ import annotations

import errno
import hashlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt import graphs
from sfrt.backends import Backend, Grid, Rollout
from sfrt.backends.loading import transformer_of
from sfrt.backends.tensorrt.library import require_tensorrt
from sfrt.backends.tensorrt.plans import (
    FOLDER,
    Origin,
    PlanInfo,
    Target,
    map_engine,
    read_info,
    shortest_ring,
    usable_plans,
    write_plan,
    write_whole,
)
from sfrt.backends.tensorrt.running import BoundPlan
from sfrt.backends.torch import TorchBackend
from sfrt.bundle import Bundle, FileInfo
from sfrt.config import ModelConfig
from sfrt.errors import BundleError, ConfigError, DeviceError
from sfrt.ring import Ring, chunk_sizes, ring_for
from sfrt.timesteps import timesteps_of

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnx_ir")

from sfrt_export import onnx_graph, tensorrt_plan  # noqa: E402
from sfrt_export.tensorrt_plan import PlanBuilder, PlanSettings, build_plans, draw  # noqa: E402

CPU = torch.device("cpu")
HERE = Target("GPU of this test", "9.0", "11.4.0.106")
SETTINGS = PlanSettings(dtype="float32", any_start=True)


@pytest.fixture(scope="module")
def bundle(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with float32 graphs."""
    folder = tmp_path_factory.mktemp("with_graphs") / "tiny"
    shutil.copytree(tiny_bundle, folder)
    return with_graphs(folder)


def with_graphs(folder: Path) -> Bundle:
    manifest = replace(Bundle.open(folder, verify=False).manifest, graphs=())
    assert manifest.decoder is not None and manifest.text_encoder is not None
    made = [
        onnx_graph.transformer_graphs(manifest.model, folder, "float32"),
        onnx_graph.decoder_graphs(manifest.decoder.config, folder, "float32"),
        onnx_graph.text_encoder_graphs(manifest.text_encoder, manifest.model.text_len, folder, "float32"),
    ]
    names = [name for graphs_of_part in made for name in onnx_graph.write_graphs(graphs_of_part, folder, "float32")]
    present = (*manifest.expected_files(), *names)
    files = {
        name: FileInfo(len(data), hashlib.sha256(data).hexdigest())
        for name in present
        for data in [(folder / name).read_bytes()]
    }
    (folder / "manifest.json").write_text(replace(manifest, graphs=("float32",), files=files).dumps(), "utf-8")
    return Bundle.open(folder)


@pytest.fixture
def copied(bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle to break."""
    return Bundle.open(shutil.copytree(bundle.path, tmp_path / "tiny"), verify=False)


def drawn(bundle: Bundle, graph: str = "refresh") -> tensorrt_plan.Blueprint:
    return next(b for b in draw(bundle, SETTINGS, HERE) if b.info.graph == graph)


# Plan files


def plan_info(**changes: Any) -> PlanInfo:
    plain = PlanInfo(
        graph="refresh",
        dtype="float32",
        target=HERE,
        graph_sha256="a" * 64,
        weights_sha256="b" * 64,
        axes={"ring": ("ring_k.0", 2)},
        profiles=({"ring": (9, 9, 9), "valid": (9, 9, 9)}, {"ring": (9, 9, 9), "valid": (3, 6, 6)}),
    )
    return replace(plain, **changes)


def test_a_plan_file_says_what_it_is(tmp_path: Path) -> None:
    info = plan_info()
    path = write_plan(tmp_path / FOLDER, info, memoryview(b"engine"))
    assert path.name == info.file
    assert read_info(path) == replace(info, engine_bytes=6)
    assert bytes(map_engine(path)) == b"engine"
    assert info.values == ("valid",)


def test_names_tell_all_but_weights_apart() -> None:
    others = [
        plan_info(graph="flow"),
        plan_info(dtype="float16"),
        plan_info(graph_sha256="c" * 64),
        plan_info(profiles=({"ring": (12, 12, 12)},)),
        *(plan_info(target=replace(HERE, **{name: "other"})) for name in ("gpu", "capability", "tensorrt")),
    ]
    assert len({plan_info().file, *(other.file for other in others)}) == len(others) + 1
    assert plan_info(weights_sha256="c" * 64).file == plan_info().file


@pytest.mark.parametrize("damage", [b"", b"\xff" * 40, b"cut"])
def test_a_damaged_plan_is_one_sentence(tmp_path: Path, damage: bytes) -> None:
    path = write_plan(tmp_path / FOLDER, plan_info(), memoryview(b"engine"))
    path.write_bytes(path.read_bytes()[:-3] if damage == b"cut" else damage)
    with pytest.raises(BundleError, match="is damaged, or from another sfrt; remove it and build plans"):
        read_info(path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_plan_is_written_whole_or_not_at_all(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / FOLDER / "x.plan"
    write_whole(path, [b"before"])

    def blocks() -> Iterator[bytes]:
        yield b"half"
        raise error

    with pytest.raises(BundleError if isinstance(error, OSError) else KeyboardInterrupt):
        write_whole(path, blocks())
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {"x.plan": b"before"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"target": replace(HERE, gpu="another GPU")}, "was built for another GPU .* and here is GPU of this test"),
        ({"target": replace(HERE, tensorrt="11.3.0.99")}, "with TensorRT 11.3.0.99, and here is"),
        ({"graph_sha256": "0" * 64}, "was built from another refresh.float32.onnx than the bundle's"),
        ({"weights_sha256": "0" * 64}, "holds other weights than the bundle's transformer.safetensors"),
    ],
)
def test_a_plan_for_something_else_is_refused(copied: Bundle, changes: dict[str, Any], reason: str) -> None:
    info = drawn(copied).info
    write_plan(copied.path / FOLDER, replace(info, **changes), memoryview(b"engine"))
    with pytest.raises(BundleError, match=reason + ".*; build plans on this machine: sfrt export"):
        usable_plans(Origin.of(copied), "refresh", "float32", HERE)
    fitting = write_plan(copied.path / FOLDER, info, memoryview(b"engine"))
    assert set(usable_plans(Origin.of(copied), "refresh", "float32", HERE)) == {fitting}
    with pytest.raises(BundleError, match="has no TensorRT plan of flow in float32"):
        usable_plans(Origin.of(copied), "flow", "float32", HERE)


def test_a_short_stream_runs_in_a_longer_ring() -> None:
    infos = [plan_info(profiles=({"tokens": (3, 3, 3), "ring": (room,) * 3},)) for room in (9, 21, 12)]
    assert shortest_ring(infos, [3], 10) == 12
    assert shortest_ring(infos, [3], 22) is None
    assert shortest_ring(infos, [2, 3], 9) is None


@pytest.mark.parametrize("window", [6, 5])
def test_what_a_longer_ring_shows_is_the_same(bundle: Bundle, window: int) -> None:
    """Without holes and with them, under ONNX Runtime."""
    pytest.importorskip("onnxruntime")
    from sfrt.backends.exported import ExportedRollout
    from sfrt.backends.onnx import OnnxRunner

    model, stream = bundle.manifest.model, replace(bundle.manifest.stream, window=window, sink=0)
    runner = OnnxRunner(bundle.path, CPU, torch.float32)
    grid, ring, sizes = Grid.of(model, stream), ring_for(stream), chunk_sizes(stream)

    def flows(slots: int | None) -> Tensor:
        timesteps = timesteps_of(stream)[-2:]
        return passes(
            ExportedRollout(runner, model, grid, ring, sizes, timesteps, slots),
            model,
            ring,
            grid,
            timesteps,
        )

    assert torch.allclose(flows(None), flows(9), atol=1e-5)


# Building, as far as it goes here


def test_without_tensorrt_one_sentence_and_nothing_written(copied: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DeviceError, match="on an NVIDIA GPU, not on cpu"):
        build_plans(copied, settings=SETTINGS, device="cpu")
    with pytest.raises(DeviceError, match="on an NVIDIA GPU, not on cpu"):
        transformer_of(copied, "tensorrt", CPU, torch.float32)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DeviceError, match=r"not to be had here .*; pip install 'sfrt\[tensorrt\]'"):
        require_tensorrt(torch.device("cuda"))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.16.1.11"))
    with pytest.raises(DeviceError, match=r"TensorRT 10.16.1.11 is too old .*install 11 or newer"):
        require_tensorrt(torch.device("cuda"))
    assert not (copied.path / FOLDER).exists()
    Bundle.open(copied.path)


@pytest.mark.parametrize("wrong", [{"optimization": 6}, {"workspace": 0}, {"frames": 0}, {"dtype": "int4"}])
def test_impossible_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PlanSettings(**wrong)


def test_what_cannot_be_is_said_without_a_gpu(bundle: Bundle, tiny_bundle: Path) -> None:
    endless = replace(bundle.manifest.stream, window=None, sink=0)
    for at, settings, told in (
        (bundle, PlanSettings(stream=endless), r"say how many \(--frames N\), or give it a window"),
        (bundle, PlanSettings(dtype="float16"), "has graphs in float32 only; .* --onnx-dtype float16"),
        (Bundle.open(tiny_bundle), PlanSettings(), "has no ONNX graphs to build plans from"),
    ):
        with pytest.raises((BundleError, ConfigError), match=told):
            build_plans(at, settings=settings, device="cpu")
    with pytest.raises(DeviceError, match="on an NVIDIA GPU"):
        build_plans(bundle, settings=PlanSettings(stream=endless, frames=12), device="cpu")


def test_plans_are_for_the_stream_asked_for(bundle: Bundle) -> None:
    def sizes(**changes: Any) -> tuple[Any, ...]:
        stream = replace(bundle.manifest.stream, sink=0, **changes)
        of = {b.info.graph: b.info for b in draw(bundle, PlanSettings(stream=stream, frames=12), HERE)}
        assert {info.dtype for info in of.values()} == {"float32"}
        return of["refresh"].profiles[0]["ring"][0], of["decoder"].profiles[0]["height"][0], of["decoder"].file

    frame = 2 * 3  # 32 × 48 pixels
    assert sizes()[:2] == (9 * frame, 4)
    assert sizes(window=6)[:2] == (6 * frame, 4)
    assert sizes(window=None)[:2] == (12 * frame, 4), "as long as the stream"
    assert sizes(height=64)[:2] == (2 * 9 * frame, 8)
    assert sizes(window=6)[2] == sizes()[2] != sizes(height=64)[2], "a decoder knows of no window"


def test_a_damaged_graph_is_not_built_from(copied: Bundle) -> None:
    file = copied.path / "refresh.float32.onnx"
    file.write_bytes(bytes([*file.read_bytes()[:-1], 0xFF]))
    with pytest.raises(BundleError, match=r"refresh.float32.onnx is damaged"):
        drawn(copied)


class Built(Exception):
    """The builder was asked for a network."""


class FakeTensorrt:
    """No more of TensorRT than decides between keeping a plan, refitting it and building it."""

    ILogger = IProgressMonitor = object

    class NetworkDefinitionCreationFlag:
        STRONGLY_TYPED = SimpleNamespace(value=1)

    def __init__(self) -> None:
        self.refits = 0

    def Builder(self, log: object) -> Any:
        def create_network(flags: int) -> None:
            raise Built

        return SimpleNamespace(create_network=create_network)

    def Runtime(self, log: object) -> Any:
        def deserialize(engine: memoryview) -> None:
            self.refits += 1

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


def test_a_plan_that_is_there_is_kept(copied: Bundle) -> None:
    blueprint, library = drawn(copied), FakeTensorrt()
    builder = PlanBuilder(library, copied.path / FOLDER, SETTINGS, progress=False)
    with pytest.raises(Built):
        builder.provide(blueprint)
    path = write_plan(copied.path / FOLDER, blueprint.info, memoryview(b"engine"))
    assert builder.provide(blueprint) == path
    assert library.refits == 0
    write_plan(copied.path / FOLDER, replace(blueprint.info, weights_sha256="0" * 64), memoryview(b"engine"))
    with pytest.raises(Built):  # this engine cannot be loaded to be refitted
        builder.provide(blueprint)
    assert library.refits == 1
    path.write_bytes(b"half a plan")
    with pytest.raises(Built):
        builder.provide(blueprint)


def test_ctrl_c_asks_the_builder_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    with tensorrt_plan._monitor(FakeTensorrt(), "refresh", shown=False) as monitor:
        monitor.phase_start("build", None, 2)
        monitor.phase_start("tactics", "build", 3)
        assert monitor.step_complete("tactics", 0)
        monkeypatch.setattr(monitor.bars["tactics"], "update", lambda count: (_ for _ in ()).throw(KeyboardInterrupt))
        assert not monitor.step_complete("tactics", 1)
        monitor.phase_finish("tactics")
        assert monitor.cancelled
        assert not monitor.step_complete("build", 0)


class FakeRunner:
    """Records what a BoundPlan asks of a GPU."""

    def __init__(self) -> None:
        self.did: list[str] = []

    def context(self, engine: object, profile: int) -> tuple[str, None]:
        return f"profile {profile}", None

    def shape(self, context: str, inputs: Mapping[str, Tensor]) -> None: ...

    def attach(self, context: str, tensors: Mapping[str, Tensor]) -> None:
        self.did.append(f"bind {context}")

    def enqueue(self, context: str) -> None:
        self.did.append(f"run {context}")

    def capture(self, context: str) -> Any:
        self.did.append(f"capture {context}")
        return SimpleNamespace(replay=lambda: self.did.append("replay"))

    def in_order(self, work: Callable[[], None]) -> None:
        work()


def test_passes_are_bound_once_and_captured_when_the_ring_is_full() -> None:
    """A chunk's passes are not worth a capture: while the ring fills, the next chunk has other values."""
    runner: Any = FakeRunner()
    valid, ring = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 9, 1)
    run = BoundPlan(runner, None, plan_info(), {"ring_k.0": ring, "valid": valid}, {})
    for fill in (3, 3, 3, 6, 6, *[9] * 18):
        valid.fill_(fill)
        run()
    filling = ["bind profile 1", *["run profile 1"] * 5]
    assert runner.did == [*filling, "bind profile 0", *["run profile 0"] * 16, "capture profile 0", "replay", "replay"]
    valid.fill_(7)
    with pytest.raises(BundleError, match=r"no profile of the plan of refresh serves \{'valid': 7\}"):
        run()


# On a GPU with TensorRT

STREAM = {"window": 6, "steps": (1000.0, 757.0, 522.0), "warp": False, "shift": 8.0, "height": 48, "width": 64}


def golden_bundle(golden: Path, output: Path, scale: float = 1.0) -> Bundle:
    from sfrt_export.export import export_checkpoint

    weights = load_file(golden / "dit" / "weights_d128h2l2.safetensors")
    checkpoint = output.with_suffix(".safetensors")
    save_file({name: value * scale for name, value in weights.items()}, checkpoint)
    return export_checkpoint(
        checkpoint, output, family="self-forcing", heads=2, text_len=24, stream=STREAM, onnx=("float32",)
    )


def flows_of(backend: Backend, bundle: Bundle) -> Tensor:
    model, stream = bundle.manifest.model, bundle.manifest.stream
    grid, ring, timesteps = Grid.of(model, stream), ring_for(stream), timesteps_of(stream)
    rollout = backend.rollout(grid, ring, chunk_sizes(stream), timesteps)
    return passes(rollout, model, ring, grid, timesteps, backend.device)


def passes(
    rollout: Rollout,
    model: ModelConfig,
    ring: Ring,
    grid: Grid,
    timesteps: tuple[float, ...],
    device: torch.device = CPU,
) -> Tensor:
    """The flows of four chunks of 3 frames: the ring fills and then rolls; passes are run, captured and replayed."""
    generator = torch.Generator().manual_seed(0)

    def normals(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    rollout.set_text(normals(model.text_len, model.text_dim))
    flows = []
    for number in range(4):
        rollout.place(ring.plan(3 * number, 3))
        for timestep in timesteps[:-1]:
            flows.append(rollout.flow(normals(3 * grid.tokens, model.token_dim), timestep).clone())
        rollout.refresh(normals(3 * grid.tokens, model.token_dim), timesteps[-1])
    return torch.stack(flows)


def error_of(bundle: Bundle) -> float:
    device = torch.device("cuda", torch.cuda.current_device())
    weights = bundle.load("transformer", device)
    expected = flows_of(TorchBackend(bundle.manifest.model, weights, device, torch.float32), bundle)
    got = flows_of(transformer_of(bundle, "tensorrt", device, torch.float32), bundle)
    return float((got - expected).norm() / expected.norm())


@pytest.mark.gpu
def test_golden_model_in_plans(golden: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt")
    settings = PlanSettings(dtype="float32", optimization=1)
    bundle = golden_bundle(golden, tmp_path / "golden")
    built = build_plans(bundle, settings=settings, progress=False)
    assert error_of(bundle) <= 1e-4
    with unwritten(built):
        assert build_plans(bundle, settings=settings, progress=False) == built
    other = golden_bundle(golden, tmp_path / "other", scale=0.9)
    shutil.copytree(bundle.path / FOLDER, other.path / FOLDER)
    build_plans(other, settings=settings, progress=False)  # refits
    assert error_of(other) <= 1e-4


@contextmanager
def unwritten(paths: list[Path]) -> Iterator[None]:
    before = [path.stat().st_mtime_ns for path in paths]
    yield
    assert [path.stat().st_mtime_ns for path in paths] == before


@pytest.mark.gpu
def test_plans_of_every_graph_against_onnx_runtime(copied: Bundle) -> None:
    """Each graph that stands alone, on the same random inputs."""
    pytest.importorskip("tensorrt")
    pytest.importorskip("onnxruntime")
    from sfrt.backends.onnx import OnnxRunner
    from sfrt.backends.tensorrt.running import PlanRunner

    parts: Any = ("transformer", "decoder", "text_encoder")
    settings = replace(SETTINGS, parts=parts, optimization=1)
    build_plans(copied, settings=settings, progress=False)
    device = torch.device("cuda", torch.cuda.current_device())
    planned = PlanRunner(Origin.of(copied), device, "float32")
    expected = OnnxRunner(copied.path, CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    for blueprint in draw(copied, settings, planned.target):
        info, feeds = blueprint.info, {}
        if graphs.STEP in {value.name for value in blueprint.model.graph.input}:
            continue  # test_golden_model_in_plans runs these, in their rings
        model = onnx.load(blueprint.graph_path, load_external_data=False)
        for value in model.graph.input:
            dims = value.type.tensor_type.shape.dim
            shape = [info.profiles[0][d.dim_param][1] if d.dim_param else d.dim_value for d in dims]
            feeds[value.name] = torch.rand(shape, generator=generator)
            if value.name == graphs.TOKEN_IDS:
                feeds[value.name] = torch.randint(1, 9, shape, generator=generator)
        wanted, got = expected.call(info.graph, feeds), planned.call(info.graph, feeds)
        for name, tensor in wanted.items():
            assert torch.allclose(got[name].cpu(), tensor, atol=1e-4), (info.graph, name)
