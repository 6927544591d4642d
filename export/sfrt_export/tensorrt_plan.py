"""`sfrt export --tensorrt`: TensorRT plans for this machine's GPU, from the ONNX graphs of a bundle.

Networks are strongly typed: a plan computes in the dtypes of its graph and in no others. Keys and values are written in
place: the parser makes a KVCacheUpdate of every TensorScatter. sfrt_export.tensorrt_graph says how a filling ring
becomes two optimisation profiles.

Weights stay refittable, so that a bundle of other weights in the same graphs (a LoRA, a later checkpoint) refits a plan
in seconds where building one takes minutes; but only in graphs that take them in the dtype they are stored in.
Elsewhere they are cast once, while the plan is built: weights that may change would be cast again in every run.

Written from the interface of TensorRT 11.4's Python binding and its documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import onnx
import torch
from onnx import ModelProto
from tqdm import tqdm

from sfrt.backends.tensorrt.library import error_log, require_tensorrt, target_of
from sfrt.backends.tensorrt.plans import Origin, PlanInfo, Target, map_engine, read_info, write_plan, write_whole
from sfrt.bundle import Bundle, DTypeName, Part
from sfrt.config import StreamConfig
from sfrt.device import resolve_device
from sfrt.errors import BundleError, ConfigError, DeviceError
from sfrt.graphs import OF_PART, GraphName, graph_file
from sfrt_export.tensorrt_graph import (
    StreamSizes,
    casts_weights,
    for_parser,
    input_shapes,
    own_profiles,
    profiles_of,
    size_axes,
)
from sfrt_export.tensorrt_operators import refusals

if TYPE_CHECKING:
    from tensorrt import IAttentionInputLayer, IBuilderConfig, IHostMemory, INetworkDefinition, IOptimizationProfile


_PREFERRED: tuple[DTypeName, ...] = ("bfloat16", "float16", "float32")
"""What a GPU streams in by default, and what comes next where there are no such graphs."""


@dataclass(frozen=True)
class PlanSettings:
    """What plans to build, and how.

    dtype is the transformer's, None for the best of those that there are graphs in; other parts run in the dtype that
    goes with it. parts are those that a stream runs; what a bundle lacks of them is left out. stream is the one that
    plans are for, None for the bundle's own; frames limits it in latent frames, which one without a window needs.
    any_start adds plans for streams that go on from pictures and clips of any length. workspace is the most bytes that
    the builder may try kernels with, None for all there are. optimization is TensorRT's builder level, 0 (built fast)
    to 5 (runs fast).
    """

    dtype: DTypeName | None = None
    parts: tuple[Part, ...] = ("transformer", "decoder")
    stream: StreamConfig | None = None
    frames: int | None = None
    any_start: bool = False
    workspace: int | None = None
    optimization: int = 3

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in _PREFERRED:
            raise ConfigError(f"dtype {self.dtype!r} is not one of: {', '.join(get_args(DTypeName))}")
        if self.frames is not None and self.frames < 1:
            raise ConfigError(f"a stream of {self.frames} latent frames is none; give it more")
        if not 0 <= self.optimization <= 5:
            raise ConfigError(f"optimization level {self.optimization} is not one of TensorRT's, 0 to 5")
        if self.workspace is not None and self.workspace <= 0:
            raise ConfigError(f"a workspace of {self.workspace} bytes holds nothing; give more, or None for no limit")


DEFAULTS = PlanSettings()


@dataclass(frozen=True)
class Blueprint:
    """A plan to be built: what it will say of itself, and the graph as the parser takes it."""

    info: PlanInfo
    graph_path: Path
    model: ModelProto


def build_plans(
    bundle: Bundle, *, settings: PlanSettings = DEFAULTS, device: str = "auto", progress: bool = True
) -> list[Path]:
    """Build the plans of a bundle's graphs into its folder `plans`, and return their files.

    A plan that is there and fits is left as it is, one of other weights refitted. Each is written when it is whole;
    Ctrl-C keeps those that are. progress shows bars on a terminal.
    Raises BundleError or ConfigError for graphs that are missing or damaged and for streams that plans cannot be for,
    DeviceError where TensorRT or an NVIDIA GPU is missing.
    """
    _asked_for(bundle, settings)  # what cannot be is said before a GPU is looked for
    place = resolve_device(device)
    target = target_of(require_tensorrt(place), place)
    return provide(draw(bundle, settings, target), Origin.of(bundle), place, settings, progress)


def build_part(
    origin: Origin, part: Part, dtype: DTypeName, sizes: Iterable[StreamSizes], device: torch.device
) -> None:
    """The plans of graphs that belong to no bundle, for all of these sizes. Raises as build_plans does."""
    target = target_of(require_tensorrt(device), device)
    for one in sizes:
        provide(draw_part(origin, part, dtype, one, target), origin, device)


def provide(
    blueprints: Iterable[Blueprint],
    origin: Origin,
    device: torch.device,
    settings: PlanSettings = DEFAULTS,
    progress: bool = True,
) -> list[Path]:
    """The files of these plans beside their origin, built or refitted where they are not there."""
    trt = require_tensorrt(device)
    with torch.cuda.device(device):
        builder = PlanBuilder(trt, origin.plans, settings, progress)
        return [builder.provide(blueprint) for blueprint in blueprints]


def draw(bundle: Bundle, settings: PlanSettings, target: Target) -> list[Blueprint]:
    """The blueprints of all plans that the settings ask for.

    Raises BundleError for graphs that are missing, damaged or not what TensorRT's parser takes.
    """
    manifest = bundle.manifest
    dtype, sizes = _asked_for(bundle, settings)
    blueprints: list[Blueprint] = []
    for part in settings.parts:
        if f"{part}.safetensors" in manifest.files:
            of_part = manifest.graph_dtype(part, dtype)
            bundle.graph_folder(part, of_part, verify=True)
            blueprints += draw_part(Origin.of(bundle), part, of_part, sizes, target)
    return blueprints


def draw_part(origin: Origin, part: Part, dtype: DTypeName, sizes: StreamSizes, target: Target) -> Iterator[Blueprint]:
    """The blueprints of all plans that streams of these sizes ask of a part."""
    passes = (*sizes.passes(), "modulation", "text_kv")
    for graph in passes if part == "transformer" else OF_PART[part]:
        yield _blueprint(origin, graph, dtype, sizes, target)


def _asked_for(bundle: Bundle, settings: PlanSettings) -> tuple[DTypeName, StreamSizes]:
    """The transformer's dtype, and every size of the stream.

    Raises BundleError where there are no graphs in that dtype, ConfigError for a stream that has no end.
    """
    there = [dtype for dtype in _PREFERRED if dtype in bundle.manifest.graphs]
    if not there:
        raise BundleError(
            f"the bundle {bundle.path} has no ONNX graphs to build plans from; export the checkpoint again with --onnx"
        )
    dtype = settings.dtype or there[0]
    bundle.graph_folder("transformer", dtype)
    stream = settings.stream or bundle.manifest.stream
    if stream.window is None and settings.frames is None:
        raise ConfigError(
            "a stream without a window keeps every frame, and a plan is for so many of them: "
            "say how many (--frames N), or give it a window (--window N)"
        )
    return dtype, StreamSizes.of(bundle.manifest.model, stream, settings.frames, any_start=settings.any_start)


def _blueprint(origin: Origin, graph: GraphName, dtype: DTypeName, sizes: StreamSizes, target: Target) -> Blueprint:
    path = origin.folder / graph_file(graph, dtype)
    model = onnx.load(path, load_external_data=False)
    profiles = own_profiles(model, profiles_of(graph, sizes))
    parsed = for_parser(model, profiles)
    for reason in refusals(parsed):
        raise BundleError(f"{path} is nothing that TensorRT's parser takes ({reason}); report it")
    info = PlanInfo(
        graph=graph,
        dtype=dtype,
        target=target,
        graph_sha256=origin.graph(graph, dtype),
        weights_sha256=origin.weights(graph),
        axes=size_axes(model),
        profiles=profiles,
    )
    return Blueprint(info, path, parsed)


class PlanBuilder:
    """TensorRT's builder on the current GPU, its timing cache in the folder of the plans."""

    def __init__(self, trt: Any, folder: Path, settings: PlanSettings, progress: bool) -> None:
        self._trt = trt
        self._folder = folder
        self._settings = settings
        self._progress = progress
        self._log = error_log(trt)
        self._builder = trt.Builder(self._log)

    def provide(self, blueprint: Blueprint) -> Path:
        """The file of a plan, built or refitted where it is not there already."""
        info = blueprint.info
        path = self._folder / info.file
        there = _info_of(path)
        if there is not None:
            if there.weights_sha256 == info.weights_sha256:
                return path
            refitted = self._refit(path, blueprint)
            if refitted is not None:
                return write_plan(self._folder, info, memoryview(refitted))
        return write_plan(self._folder, info, memoryview(self._build(blueprint)))

    def _build(self, blueprint: Blueprint) -> IHostMemory:
        trt, name = self._trt, blueprint.graph_path.name
        network = self._builder.create_network(1 << trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED.value)
        parser = trt.OnnxParser(network, self._log)
        if not parser.parse(blueprint.model.SerializeToString(), path=str(blueprint.graph_path)):
            reason = parser.get_error(0).desc() if parser.num_errors else self._log.last
            raise BundleError(f"TensorRT cannot parse {blueprint.graph_path} ({reason}); report it")
        self._allow_unfused_attention(network)
        config = self._config(blueprint)
        with _monitor(trt, name, self._progress) as monitor:
            config.progress_monitor = monitor
            plan = self._builder.build_serialized_network(network, config)
        if monitor.cancelled:
            raise KeyboardInterrupt
        if plan is None:
            raise DeviceError(f"TensorRT cannot build a plan of {name} on this GPU: {self._log.last}")
        self._save_timings(config, blueprint.info.target)
        return plan

    def _allow_unfused_attention(self, network: INetworkDefinition) -> None:
        """Where there is no fused kernel (float32, heads of odd sizes) attention may run as several."""
        trt = self._trt
        for index in range(network.num_layers):
            layer = network.get_layer(index)
            if layer.type == trt.LayerType.ATTENTION_INPUT:
                boundary: IAttentionInputLayer = layer
                boundary.attention.decomposable = True

    def _config(self, blueprint: Blueprint) -> IBuilderConfig:
        trt, settings = self._trt, self._settings
        config = self._builder.create_builder_config()
        config.builder_optimization_level = settings.optimization
        config.max_aux_streams = 0  # a pass is one chain
        if not casts_weights(blueprint.model):
            config.set_flag(trt.BuilderFlag.REFIT)
        config.clear_flag(trt.BuilderFlag.TF32)  # float32 in a graph means float32
        if settings.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace)
        timings = self._timings(blueprint.info.target)
        data = timings.read_bytes() if timings.exists() else b""
        config.set_timing_cache(config.create_timing_cache(data), ignore_mismatch=False)
        for profile in self._profiles(blueprint):
            config.add_optimization_profile(profile)
        return config

    def _profiles(self, blueprint: Blueprint) -> list[IOptimizationProfile]:
        """None for a graph in which nothing varies."""
        info, model = blueprint.info, blueprint.model
        if not size_axes(model) and not info.values:
            return []
        profiles = []
        for sizes in info.profiles:
            profile = self._builder.create_optimization_profile()
            least, usual, most = (
                input_shapes(model, {name: sizes[name][end] for name in info.axes}) for end in range(3)
            )
            for name in least:
                profile.set_shape(name, least[name], usual[name], most[name])
            for name in info.values:
                profile.set_shape_input(name, *([value] for value in sizes[name]))
            profiles.append(profile)
        return profiles

    def _refit(self, path: Path, blueprint: Blueprint) -> IHostMemory | None:
        """The plan in a file with the graph's weights in place of its own; None where it cannot be refitted."""
        trt = self._trt
        runtime = trt.Runtime(self._log)
        engine = runtime.deserialize_cuda_engine(map_engine(path))
        if engine is None or not engine.refittable:
            return None
        refitter = trt.Refitter(engine, self._log)
        reader = trt.OnnxParserRefitter(refitter, self._log)
        if not reader.refit_from_bytes(blueprint.model.SerializeToString(), path=str(blueprint.graph_path)):
            return None
        if not refitter.refit_cuda_engine():
            return None
        serialization = engine.create_serialization_config()
        serialization.set_flag(trt.SerializationFlag.INCLUDE_REFIT)
        return engine.serialize_with_config(serialization)

    def _timings(self, target: Target) -> Path:
        """The file of what was measured on a GPU by one TensorRT; it holds for no other."""
        return self._folder / f"timing.{hashlib.sha256(str(target).encode()).hexdigest()[:12]}.cache"

    def _save_timings(self, config: IBuilderConfig, target: Target) -> None:
        """With what others may have saved meanwhile."""
        cache, path = config.get_timing_cache(), self._timings(target)
        if path.exists():
            cache.combine(config.create_timing_cache(path.read_bytes()), ignore_mismatch=False)
        write_whole(path, [memoryview(cache.serialize())])


def _info_of(path: Path) -> PlanInfo | None:
    """The header of a plan that is there and whole."""
    if not path.exists():
        return None
    with contextlib.suppress(BundleError):
        return read_info(path)
    return None


@contextlib.contextmanager
def _monitor(trt: Any, name: str, shown: bool) -> Iterator[Any]:
    """The builder's phases, and the phases of those, as bars on stderr; `cancelled` tells of a Ctrl-C between steps.

    TensorRT calls it from C++, where an exception has no way out: it is asked to stop instead.
    """

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.bars: dict[str, tqdm[None]] = {}
            self.cancelled = False

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with self._interruptible():
                self.bars[phase_name] = tqdm(
                    desc=f"{name}: {phase_name}" if parent_phase is None else phase_name,
                    total=num_steps,
                    position=len(self.bars),
                    leave=False,
                    file=sys.stderr,
                    disable=None if shown else True,
                )

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._interruptible():
                bar = self.bars[phase_name]
                bar.update(step + 1 - bar.n)
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            with self._interruptible():
                self.bars.pop(phase_name).close()

        @contextlib.contextmanager
        def _interruptible(self) -> Iterator[None]:
            try:
                yield
            except KeyboardInterrupt:
                self.cancelled = True

    monitor = Monitor()
    try:
        yield monitor
    finally:
        for bar in monitor.bars.values():
            bar.close()
