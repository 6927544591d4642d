"""A bundle's parts on a backend, by its name: the one place that knows which class runs what.

verify hashes the files that are used, before they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch

from sfrt.backends import Backend, Grid, require_backend
from sfrt.bundle import Bundle, DTypeName, Manifest, Part
from sfrt.decoders import Decoder, decoder_dtype, load_decoder
from sfrt.device import dtype_name, require_memory
from sfrt.text import TextEncoder, load_text_encoder, load_tokenizer

if TYPE_CHECKING:
    from sfrt.backends.onnx import OnnxRunner
    from sfrt.backends.tensorrt.running import PlanRunner

_MOST_SCORES = 256 << 20
_FRAMES_WITHOUT_WINDOW = 21
"""Latent frames of the clips that models without a window were trained on."""


def choose_backend(bundle: Bundle, name: str, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that "auto" means; any other name is checked and returned.

    ONNX Runtime on a CPU where the bundle has graphs for it and is small, as its attention holds all scores at once: a
    small model's passes take half of torch's time there (bench/results). Else torch. Raises ConfigError for a name that
    no backend has.
    """
    if name != "auto":
        require_backend(name)
        return name
    small = _score_bytes(bundle.manifest) <= _MOST_SCORES
    if device.type == "cpu" and small and _name(dtype) in bundle.manifest.graphs:
        from sfrt.backends.onnx import why_not

        if why_not("cpu", device, dtype) is None:
            return "onnx"
    return "torch"


def _score_bytes(manifest: Manifest) -> int:
    """What the attention scores of a pass take in float32, in the bundle's own stream: heads · queries · keys."""
    model, stream = manifest.model, manifest.stream
    tokens = Grid.of(model, stream).tokens
    return 4 * model.num_heads * stream.chunk * tokens * (stream.window or _FRAMES_WITHOUT_WINDOW) * tokens


def transformer_of(
    bundle: Bundle, backend: str, device: torch.device, dtype: torch.dtype, *, verify: bool = True
) -> Backend:
    """The model itself.

    Raises ConfigError, BundleError or DeviceError where backend, bundle and machine do not fit each other.
    """
    config = bundle.manifest.model
    stored: torch.dtype = getattr(torch, bundle.manifest.dtype)
    quantization = bundle.manifest.quantization
    growth = dtype.itemsize / stored.itemsize if quantization is None else 1.0  # quantised weights stay as small
    # Under ONNX Runtime step and refresh are sessions of their own, each with the weights as its kernels want them.
    copies = 2 if backend.startswith("onnx") else 1
    _require_memory(bundle, "transformer", "the transformer", device, copies * growth)
    if backend == "torch":
        from sfrt.backends.torch import TorchBackend

        weights = bundle.load("transformer", device, dtype, verify=verify)
        return TorchBackend(config, weights, device, dtype, quantization)
    if backend == "tensorrt":
        from sfrt.backends.tensorrt import TensorrtBackend

        return TensorrtBackend(_plans(bundle, device, dtype), bundle)
    from sfrt.backends.exported import ExportedBackend

    return ExportedBackend(_graphs(bundle, "transformer", backend, device, dtype, verify), config)


def decoder_of(
    bundle: Bundle, backend: str, device: torch.device, dtype: torch.dtype, *, verify: bool = True
) -> Decoder | None:
    """The autoencoder; None where the bundle has none."""
    part = bundle.manifest.decoder
    if part is None:
        return None
    _require_memory(bundle, "decoder", "the decoder", device)
    if backend == "torch":
        return load_decoder(part.config, bundle.load("decoder", device, verify=verify), device, dtype)
    from sfrt.backends.exported_parts import ExportedDecoder

    dtype = decoder_dtype(part.config, device, dtype)
    if backend == "tensorrt":
        return ExportedDecoder(_plans(bundle, device, dtype), part.config)
    return ExportedDecoder(_graphs(bundle, "decoder", backend, device, dtype, verify), part.config)


def text_encoder_of(bundle: Bundle, backend: str, device: torch.device, *, verify: bool = True) -> TextEncoder:
    """The text encoder, in the dtype it is stored in whatever the model's.

    ONNX Runtime takes over where it can run the graph of that dtype, torch elsewhere: it runs once a prompt.
    """
    _require_memory(bundle, "text_encoder", "the text encoder", device)
    config = bundle.manifest.text_encoder
    stored = bundle.stored_dtype("text_encoder") if config is not None else None
    if backend.startswith("onnx") and config is not None and stored is not None and stored in bundle.manifest.graphs:
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
    from sfrt.backends.tensorrt.running import PlanRunner

    return PlanRunner(bundle, device, _name(dtype))


def _provider(backend: str) -> str | None:
    """The "cuda" of "onnx:cuda"."""
    return backend.partition(":")[2] or None


def _require_memory(bundle: Bundle, part: Part, what: str, device: torch.device, growth: float = 1.0) -> None:
    """Raise DeviceError where a part's tensors, `growth` times their size on disk, do not fit."""
    info = bundle.manifest.files.get(f"{part}.safetensors")
    if info is not None:
        require_memory(round(info.bytes * growth), what, device)


def _name(dtype: torch.dtype) -> DTypeName:
    return cast(DTypeName, dtype_name(dtype))
