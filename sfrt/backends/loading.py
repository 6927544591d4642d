"""A bundle's parts on a backend, by its name: the one place that knows which class runs what.

verify hashes the files that are used, before they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from sfrt.backends import Backend, Grid, require_backend
from sfrt.backends.kernels import kernels_loaded
from sfrt.backends.memory import FRAMES_WITHOUT_WINDOW, text_encoder_need
from sfrt.bundle import Bundle, DTypeName, Manifest, Part
from sfrt.decoders import Decoder, decoder_dtype, load_decoder
from sfrt.device import dtype_name
from sfrt.ops.attention import ATTENTION, ATTENTION_FLOAT8, workload, workload_float8
from sfrt.ops.choice import Ops, Pins
from sfrt.ops.op import Maker
from sfrt.text import TextEncoder, load_text_encoder, load_tokenizer

if TYPE_CHECKING:
    from sfrt.backends.onnx import OnnxRunner
    from sfrt.backends.tensorrt.running import PlanRunner

_MOST_SCORES = 256 << 20


def choose_backend(bundle: Bundle, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that "auto" means; any other name is checked and returned.

    ONNX Runtime on a CPU where the bundle has graphs for it and is small, as its attention holds all scores at once: a
    small model's passes take half of torch's time there (bench/results). Else torch, as for rings in float8. Raises
    ConfigError for a name that no backend has.
    """
    if name != "auto":
        require_backend(name)
        return name
    small = _score_bytes(bundle.manifest) <= _MOST_SCORES
    plain = bundle.manifest.stream.ring_dtype == "model"
    if device.type == "cpu" and small and plain and _name(dtype) in bundle.manifest.graphs:
        from sfrt.backends.onnx import why_not

        if why_not("cpu", device, dtype) is None:
            return "onnx"
    return "torch"


def _score_bytes(manifest: Manifest) -> int:
    """What the attention scores of a pass take in float32, in the bundle's own stream: heads · queries · keys."""
    model, stream = manifest.model, manifest.stream
    tokens = Grid.of(model, stream).tokens
    return 4 * model.num_heads * stream.chunk * tokens * (stream.window or FRAMES_WITHOUT_WINDOW) * tokens


def ops_for(manifest: Manifest, device: torch.device, dtype: torch.dtype, pins: Pins | None = None) -> Ops:
    """The implementations that a bundle's model runs with; those to be measured are, at its own stream's sizes.

    pins name some; None takes them from SFRT_OPS. Raises ConfigError for a pin that cannot be kept.
    """
    return Ops(device, pins, dtype, workloads_of(manifest))


def workloads_of(manifest: Manifest) -> dict[str, Maker]:
    """What the ops that are measured are measured on, by their names."""
    model, stream = manifest.model, manifest.stream
    tokens = Grid.of(model, stream).tokens
    keys = (stream.window or FRAMES_WITHOUT_WINDOW) * tokens
    sizes = stream.chunk * tokens, keys, model.num_heads, model.head_dim
    workloads = {ATTENTION.name: workload(*sizes)}
    if stream.ring_dtype == "float8":
        workloads[ATTENTION_FLOAT8.name] = workload_float8(*sizes)
    return workloads


def transformer_of(
    bundle: Bundle,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ops: Ops | None = None,
    verify: bool = True,
) -> Backend:
    """The model itself; ops are what the torch backend runs with.

    Raises ConfigError, BundleError or DeviceError where backend, bundle and machine do not fit each other.
    """
    config = bundle.manifest.model
    quantization = bundle.manifest.quantization
    if backend == "torch":
        from sfrt.backends.torch import TorchBackend

        with kernels_loaded(bundle, device, dtype, verify=verify):
            weights = bundle.load("transformer", device, dtype, verify=verify)
        return TorchBackend(config, weights, device, dtype, quantization, ops)
    if backend == "tensorrt":
        from sfrt.backends.tensorrt import TensorrtBackend

        return TensorrtBackend(_plans(bundle, device, dtype), config)
    from sfrt.backends.exported import ExportedBackend

    return ExportedBackend(_graphs(bundle, "transformer", backend, device, dtype, verify), config)


def decoder_of(
    bundle: Bundle,
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    ops: Ops | None = None,
    verify: bool = True,
) -> Decoder | None:
    """The autoencoder; None where the bundle has none. ops are what the torch backend runs with."""
    part = bundle.manifest.decoder
    if part is None:
        return None
    own_dtype = decoder_dtype(part.config, device, dtype)
    if backend == "torch":
        weights = bundle.load("decoder", device, own_dtype, verify=verify)
        return load_decoder(part.config, weights, device, dtype, ops)
    from sfrt.backends.exported_parts import ExportedDecoder

    if backend == "tensorrt":
        return ExportedDecoder(_plans(bundle, device, own_dtype), part.config)
    return ExportedDecoder(_graphs(bundle, "decoder", backend, device, own_dtype, verify), part.config)


def text_encoder_of(bundle: Bundle, backend: str, device: torch.device, *, verify: bool = True) -> TextEncoder:
    """The text encoder, in the dtype it is stored in whatever the model's.

    ONNX Runtime takes over where it can run the graph of that dtype, torch elsewhere: it runs once a prompt.
    """
    text_encoder_need(bundle.manifest).require("the text encoder", device)
    config, graphs = bundle.manifest.text_encoder, bundle.manifest.graph_dtypes("text_encoder")
    stored = bundle.stored_dtype("text_encoder") if config is not None and graphs else None
    if backend.startswith("onnx") and config is not None and stored is not None and stored in graphs:
        from sfrt.backends.exported_parts import ExportedTextEncoder
        from sfrt.backends.onnx import why_not

        dtype: torch.dtype = getattr(torch, stored)
        if why_not(_provider(backend) or device.type, device, dtype) is None:
            runner = _graphs(bundle, "text_encoder", backend, device, dtype, verify)
            return TextEncoder(load_tokenizer(bundle, verify=verify), ExportedTextEncoder(runner, config))
    return load_text_encoder(bundle, device, verify=verify)


def _graphs(
    bundle: Bundle, part: Part, backend: str, device: torch.device, dtype: torch.dtype, verify: bool
) -> OnnxRunner:
    from sfrt.backends.onnx import OnnxRunner

    folder = bundle.graph_folder(part, _name(dtype), verify=verify)
    return OnnxRunner(folder, device, dtype, _provider(backend))


def _plans(bundle: Bundle, device: torch.device, dtype: torch.dtype) -> PlanRunner:
    from sfrt.backends.tensorrt.plans import Origin
    from sfrt.backends.tensorrt.running import PlanRunner

    return PlanRunner(Origin.of(bundle), device, _name(dtype))


def _provider(backend: str) -> str | None:
    """The "cuda" of "onnx:cuda"."""
    return backend.partition(":")[2] or None


def _name(dtype: torch.dtype) -> DTypeName:
    return cast(DTypeName, dtype_name(dtype))
