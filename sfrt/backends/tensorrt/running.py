"""TensorRT plans on one stream of a GPU: every address bound once, runs replayed from CUDA graphs.

Written from the interface of TensorRT 11.4's Python binding and its documentation; it has not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfrt.backends.tensorrt.library import error_log, require_tensorrt, target_of
from sfrt.backends.tensorrt.plans import HOW_TO_BUILD, Origin, PlanInfo, map_engine, usable_plans
from sfrt.bundle import DTypeName
from sfrt.device import DTYPES
from sfrt.errors import BundleError, DeviceError
from sfrt.graphs import VALID, GraphName

if TYPE_CHECKING:
    from tensorrt import ICudaEngine, IExecutionContext


_CAPTURED_AFTER = 16
"""Runs with the same values before one is captured: more than a chunk's, as a ring that fills changes them with every
chunk, and a capture has torch wait for the GPU and give memory back."""


class PlanRunner:
    """The plans beside some graphs, in one dtype on one GPU, each loaded when it is first used.

    Raises DeviceError where TensorRT or the GPU is missing.
    """

    def __init__(self, origin: Origin, device: torch.device, dtype: DTypeName) -> None:
        self.origin = origin
        self.device = device
        self.dtype = DTYPES[dtype]
        self.on_host = frozenset({VALID})  # plans slice by it before the GPU is given work
        self._dtype = dtype
        self._trt = trt = require_tensorrt(device)
        self.target = target_of(trt, device)
        self._log = error_log(trt)
        with torch.cuda.device(device):
            self._runtime = trt.Runtime(self._log)
        self._stream = torch.cuda.Stream(device)
        self._scratch = torch.empty(0, dtype=torch.uint8, device=device)
        self._plans: dict[GraphName, dict[Path, PlanInfo]] = {}
        self._engines: dict[Path, ICudaEngine] = {}
        self._contexts: dict[tuple[Path, int], tuple[IExecutionContext, Tensor]] = {}

    def plans(self, graph: GraphName) -> dict[Path, PlanInfo]:
        """The plans that can stand for a graph here. Raises BundleError where there are none."""
        if graph not in self._plans:
            self._plans[graph] = usable_plans(self.origin, graph, self._dtype, self.target)
        return self._plans[graph]

    def bind(self, graph: GraphName, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """A run of the graph over these very tensors, dense ones; the caller keeps them alive.

        Inputs whose value decides what a plan computes lie on the host, all others on the GPU; inputs may hold more
        than the graph asks for. Raises BundleError where no plan is for tensors of these shapes.
        """
        path, info = self._plan_for(graph, _shapes(inputs))
        engine = self._engine(path)
        self._check_aliases(path, engine, inputs, outputs)
        return BoundPlan(self, engine, info, inputs, outputs)

    def call(self, graph: GraphName, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of a graph, in memory made for them: for graphs whose sizes differ from run to run."""
        held = {name: tensor.to(self.device).contiguous() for name, tensor in inputs.items()}
        path, info = self._plan_for(graph, _shapes(held))
        engine, profile = self._engine(path), info.serving(info.sizes_of(_shapes(held)))[0]
        if (path, profile) not in self._contexts:
            self._contexts[path, profile] = self.context(engine, profile)
        context, _ = self._contexts[path, profile]
        self.shape(context, held)
        made = {name: self._made(context, name) for name in names_of(engine) if name not in held}
        self.attach(context, {**held, **made})
        self.in_order(lambda: self.enqueue(context))
        return made

    def context(self, engine: ICudaEngine, profile: int) -> tuple[IExecutionContext, Tensor]:
        """A context in a profile, and the memory it computes in: one for all, as no two runs are under way at once."""
        trt = self._trt
        context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None or not context.set_optimization_profile_async(profile, self._stream.cuda_stream):
            raise DeviceError(f"TensorRT cannot make a context on {self.device}: {self._log.last}")
        size = engine.device_memory_size_v2
        if size > self._scratch.numel():
            self._scratch = torch.empty(size, dtype=torch.uint8, device=self.device)
        context.set_device_memory(self._scratch.data_ptr(), size)
        return context, self._scratch

    def attach(self, context: IExecutionContext, tensors: Mapping[str, Tensor]) -> None:
        """Bind every input and output of a context to the tensor of its name."""
        trt, engine = self._trt, context.engine
        for name in names_of(engine):
            place = "cpu" if engine.get_tensor_location(name) == trt.TensorLocation.HOST else self.device.type
            if tensors[name].device.type != place or not context.set_tensor_address(name, tensors[name].data_ptr()):
                raise DeviceError(f"a plan wants {name} elsewhere than on {tensors[name].device}: {self._log.last}")

    def shape(self, context: IExecutionContext, inputs: Mapping[str, Tensor]) -> None:
        """Tell a context the shapes of its inputs."""
        trt, engine = self._trt, context.engine
        for name in names_of(engine):
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                shape = tuple(inputs[name].shape)
                if not context.set_input_shape(name, shape):
                    raise BundleError(f"a plan does not take {name} of {list(shape)}: {self._log.last}")

    def enqueue(self, context: IExecutionContext) -> None:
        """Put one run on the stream."""
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise DeviceError(f"TensorRT cannot run a plan on {self.device}: {self._log.last}")

    def in_order(self, work: Callable[[], None]) -> None:
        """Do work on the stream, after what torch's own has been given and before what it is given next."""
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            work()
        outer.wait_stream(self._stream)

    def capture(self, context: IExecutionContext) -> torch.cuda.CUDAGraph:
        """One run as a CUDA graph; the context has run before, as TensorRT wants it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"):
            self.enqueue(context)
        return graph

    def _made(self, context: IExecutionContext, name: str) -> Tensor:
        trt, engine = self._trt, context.engine
        dtypes = {
            trt.DataType.FLOAT: torch.float32,
            trt.DataType.HALF: torch.float16,
            trt.DataType.BF16: torch.bfloat16,
        }
        dtype = dtypes[engine.get_tensor_dtype(name)]
        return torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device)

    def _plan_for(self, graph: GraphName, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Path, PlanInfo]:
        for path, info in self.plans(graph).items():
            if info.serving(info.sizes_of(shapes)):
                return path, info
        sizes = next(iter(self.plans(graph).values())).sizes_of(shapes)
        listed = ", ".join(f"{name} {size}" for name, size in sizes.items())
        raise BundleError(f"the bundle {self.origin.folder} has no plan of {graph} for {listed}; {HOW_TO_BUILD}")

    def _engine(self, path: Path) -> ICudaEngine:
        if path not in self._engines:
            with torch.cuda.device(self.device):
                engine = self._runtime.deserialize_cuda_engine(map_engine(path))
            if engine is None:
                raise BundleError(f"{path} cannot be loaded ({self._log.last}); remove it and {HOW_TO_BUILD}")
            self._engines[path] = engine
        return self._engines[path]

    def _check_aliases(
        self, path: Path, engine: ICudaEngine, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]
    ) -> None:
        """An output may share memory with an input only where the plan itself writes that input in place."""
        owners = {tensor.data_ptr(): name for name, tensor in inputs.items()}
        for name, tensor in outputs.items():
            owner = owners.get(tensor.data_ptr())
            if owner is not None and engine.get_aliased_input_tensor(name) != owner:
                raise BundleError(f"{path} does not write {owner} in place; remove it and {HOW_TO_BUILD}")


class BoundPlan:
    """A plan over one set of tensors: run as it is at first, then captured and replayed.

    All of that anew whenever an input on the host changes its value, which a captured run has built in.
    """

    def __init__(
        self,
        runner: PlanRunner,
        engine: ICudaEngine,
        info: PlanInfo,
        inputs: Mapping[str, Tensor],
        outputs: Mapping[str, Tensor],
    ) -> None:
        self._runner = runner
        self._engine = engine
        self._info = info
        self._inputs = inputs
        self._outputs = outputs
        self._sizes = info.sizes_of(_shapes(inputs))
        self._contexts: dict[int, tuple[IExecutionContext, Tensor]] = {}
        self._values: dict[str, int] | None = None
        self._settled = 0
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        self._runner.in_order(self._run)

    def _run(self) -> None:
        values = {name: int(self._inputs[name]) for name in self._info.values}
        if values != self._values:
            self._values, self._settled, self._graph = values, 0, None
        if self._settled < _CAPTURED_AFTER:
            self._settled += 1
            self._runner.enqueue(self._context(values))
            return
        if self._graph is None:
            self._graph = self._runner.capture(self._context(values))
        self._graph.replay()

    def _context(self, values: Mapping[str, int]) -> IExecutionContext:
        """The context of the first profile that serves these values."""
        serving = self._info.serving({**self._sizes, **values})
        if not serving:
            raise BundleError(f"no profile of the plan of {self._info.graph} serves {values}; {HOW_TO_BUILD}")
        if serving[0] not in self._contexts:
            self._contexts[serving[0]] = context, _ = self._runner.context(self._engine, serving[0])
            self._runner.shape(context, self._inputs)
            self._runner.attach(context, {**self._inputs, **self._outputs})
        return self._contexts[serving[0]][0]


def names_of(engine: ICudaEngine) -> list[str]:
    """Every input and output of an engine."""
    return [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
