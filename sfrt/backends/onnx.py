"""ONNX Runtime on a CPU or a GPU, over the graphs that `sfrt export --onnx` wrote, fed with tensors where they lie.

Settings, and why: as many threads as torch has, as passes never overlap; none for parallel branches, as a pass is one
chain; and none that spin while they wait for work, which would take the cores from the other graphs' and torch's
threads between the passes (the built-in model's passes take half the time without, on two cores).

Each session packs the weights of its graph for its kernels, which nothing in Python lets two of them share. To go
without packing, and read the mapped file, costs a pass 5 to 10 % at 48 to 192 tokens, and would share nothing where a
graph computes in another dtype than its weights are stored in. So the graphs of a stream have no weights in common.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from sfrt.device import dtype_name
from sfrt.errors import BundleError, ConfigError, DeviceError
from sfrt.graphs import GraphName, graph_file

OLDEST = (1, 25)
"""The first ONNX Runtime whose CPU kernels cover opset 24, Attention with a valid length among them."""

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}

_NUMPY = {torch.float32: np.float32, torch.float16: np.float16, torch.int64: np.int64, torch.bool: np.bool_}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16: numpy has no name for it


class OnnxRunner:
    """The graphs of one folder in one dtype on one device, each loaded when it is first used.

    provider is a key of PROVIDERS; None is the device's own. Raises ConfigError or DeviceError where ONNX Runtime is
    missing, too old, or has no such provider.
    """

    def __init__(self, folder: Path, device: torch.device, dtype: torch.dtype, provider: str | None = None) -> None:
        if (reason := why_not(provider or device.type, device, dtype)) is not None:
            raise reason
        self.device = device
        self.dtype = dtype
        self.on_host: frozenset[str] = frozenset()
        self._folder = folder
        self._provider = provider or device.type
        self._sessions: dict[GraphName, Any] = {}
        # A stream of our own: torch's default one has no handle that ONNX Runtime could be given.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        import onnxruntime

        self._library = onnxruntime

    def bind(self, graph: GraphName, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """A run of the graph over these very tensors, dense ones on the runner's device; the caller keeps them alive.

        inputs may hold more than the graph asks for.
        """
        session = self._session(graph)
        binding = session.io_binding()
        for asked in session.get_inputs():
            self._bind(binding.bind_input, asked.name, inputs[asked.name])
        for name, tensor in outputs.items():
            self._bind(binding.bind_output, name, tensor)

        return lambda: self._run(graph, session, binding)

    def call(self, graph: GraphName, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of a graph, in memory that ONNX Runtime makes: for graphs whose sizes differ from run to run.

        On a CPU they are copied out of its arena: a stream keeps some for long, and around what stays there the arena
        grows. On a GPU the copies would take as much memory again as the states of a large autoencoder.
        """
        session = self._session(graph)
        binding = session.io_binding()
        held = {name: tensor.to(self.device).contiguous() for name, tensor in inputs.items()}
        for name, tensor in held.items():
            self._bind(binding.bind_input, name, tensor)
        names = [output.name for output in session.get_outputs()]
        for name in names:
            binding.bind_output(name, *self._place)
        self._run(graph, session, binding)
        made = {name: from_dlpack(value) for name, value in zip(names, binding.get_outputs(), strict=True)}
        return made if self._stream else {name: tensor.clone() for name, tensor in made.items()}

    def _run(self, graph: GraphName, session: Any, binding: Any) -> None:
        try:
            with self._in_order():
                session.run_with_iobinding(binding)
        except RuntimeError as error:  # all that ONNX Runtime tells of a run that failed
            reason = str(error).splitlines()[0]
            raise DeviceError(
                f"ONNX Runtime cannot run {graph} on {self.device} ({reason}); "
                "where it is memory, use a smaller resolution or window, or the torch backend"
            ) from None

    @contextmanager
    def _in_order(self) -> Iterator[None]:
        """On a GPU: behind what torch's stream was given before, and ahead of what it is given next."""
        if self._stream is None:
            yield
            return
        outer = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(outer)
        yield
        outer.wait_stream(self._stream)

    def _bind(self, bind: Callable[..., None], name: str, tensor: Tensor) -> None:
        assert tensor.is_contiguous(), name
        dtype = _BFLOAT16 if tensor.dtype == torch.bfloat16 else _NUMPY[tensor.dtype]
        bind(name, *self._place, dtype, tuple(tensor.shape), tensor.data_ptr())

    @property
    def _place(self) -> tuple[str, int]:
        return self.device.type, self.device.index or 0

    def _session(self, graph: GraphName) -> Any:
        if graph not in self._sessions:
            self._sessions[graph] = self._load(graph)
        return self._sessions[graph]

    def _load(self, graph: GraphName) -> Any:
        path = self._folder / graph_file(graph, dtype_name(self.dtype))
        try:
            session = self._library.InferenceSession(path, self._options(), providers=self._providers())
        except Exception as error:  # its binding raises several types of its own
            reason = str(error).splitlines()[0]
            raise BundleError(
                f"{path} cannot be loaded by ONNX Runtime ({reason}); free memory, or export the bundle again"
            ) from None
        if session.get_providers()[0] != PROVIDERS[self._provider]:  # it falls back to others without a word
            raise DeviceError(
                f"ONNX Runtime cannot start its {PROVIDERS[self._provider]} here; `sfrt doctor` says more, "
                "or use the torch backend"
            )
        return session

    def _options(self) -> Any:
        options = self._library.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.device.type == "cpu":  # no kernels for these weights: better unfolded once than in every pass
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.log_severity_level = 3  # errors; they are raised as well
        return options

    def _providers(self) -> list[Any]:
        if self.device.type == "cpu":
            return [PROVIDERS["cpu"]]
        assert self._stream is not None
        gpu = {"device_id": self._place[1], "user_compute_stream": str(self._stream.cuda_stream)}
        first = [(PROVIDERS["tensorrt"], gpu)] if self._provider == "tensorrt" else []
        return [*first, (PROVIDERS["cuda"], gpu), PROVIDERS["cpu"]]


def why_not(provider: str, device: torch.device, dtype: torch.dtype) -> ConfigError | DeviceError | None:
    """What keeps ONNX Runtime from running graphs of this dtype there; None where nothing does."""
    if provider not in PROVIDERS:
        return ConfigError(
            f"ONNX Runtime has no provider called {provider!r} here; choose one of: {', '.join(PROVIDERS)}"
        )
    if (provider == "cpu") != (device.type == "cpu"):
        return ConfigError(f"the ONNX provider {provider!r} does not run on {device}; choose the device's own")
    if provider == "cpu" and dtype != torch.float32:
        return ConfigError(
            f"ONNX Runtime has too few {dtype_name(dtype)} kernels for CPUs; use float32 there, or the torch backend"
        )
    try:
        import onnxruntime
    except ImportError:
        return ConfigError("the onnx backend needs ONNX Runtime; install it: pip install sfrt[onnx]")
    if tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < OLDEST:
        return ConfigError(
            f"ONNX Runtime {onnxruntime.__version__} is too old for graphs of opset 24; "
            f"install {'.'.join(map(str, OLDEST))} or newer"
        )
    available = onnxruntime.get_available_providers()
    if PROVIDERS[provider] not in available:
        return DeviceError(
            f"this ONNX Runtime has no {PROVIDERS[provider]} (it has {', '.join(available)}); "
            "install onnxruntime-gpu for a GPU"
        )
    return None
