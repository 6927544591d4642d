"""A model's parts on any backend from tensors alone, without a bundle: for verification and benchmarks.

Backends that run exported graphs get them made on the way, in a folder that lasts as long as the part is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfrt.backends import Backend, require_backend
from sfrt.backends.onnx import OnnxRunner, why_not
from sfrt.bundle import DTypeName
from sfrt.config import DecoderConfig, ModelConfig, Umt5Config
from sfrt.decoders import Decoder, load_decoder
from sfrt.device import dtype_name
from sfrt.errors import ConfigError
from sfrt.text import PromptEncoder, Umt5Encoder
from sfrt.weights import assign
from sfrt_export.bundle_graphs import require_onnx

if TYPE_CHECKING:
    from sfrt_export.onnx_graph import Graphs


@contextmanager
def transformer_on(
    backend: str, config: ModelConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[Backend]:
    """The transformer over tensors named as in a bundle, which it takes over: the mapping may be emptied."""
    _require_runner(backend, device, dtype)
    if backend == "torch":
        from sfrt.backends.torch import TorchBackend

        yield TorchBackend(config, weights, device, dtype)
        return
    from sfrt.backends.exported import ExportedBackend
    from sfrt_export.onnx_graph import transformer_graphs

    with _graphs_of("transformer", weights, partial(transformer_graphs, config), backend, device, dtype) as runner:
        yield ExportedBackend(runner, config)


@contextmanager
def decoder_on(
    backend: str, config: DecoderConfig, weights: dict[str, Tensor], device: torch.device, dtype: torch.dtype
) -> Iterator[Decoder]:
    """The autoencoder over its tensors."""
    _require_runner(backend, device, dtype)
    if backend == "torch":
        yield load_decoder(config, weights, device, dtype)
        return
    from sfrt.backends.exported_parts import ExportedDecoder
    from sfrt_export.onnx_graph import decoder_graphs

    with _graphs_of("decoder", weights, partial(decoder_graphs, config), backend, device, dtype) as runner:
        yield ExportedDecoder(runner, config)


@contextmanager
def text_encoder_on(
    backend: str,
    config: Umt5Config,
    text_len: int,
    weights: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[PromptEncoder]:
    """The text encoder over its tensors."""
    _require_runner(backend, device, dtype)
    if backend == "torch":
        with torch.device("meta"):
            encoder = Umt5Encoder(config)
        assign(encoder, {name: weight.to(device, dtype) for name, weight in weights.items()}, "the text encoder")
        yield encoder.requires_grad_(False)
        return
    from sfrt.backends.exported_parts import ExportedTextEncoder
    from sfrt_export.onnx_graph import text_encoder_graphs

    make = partial(text_encoder_graphs, config, text_len)
    with _graphs_of("text_encoder", weights, make, backend, device, dtype) as runner:
        yield ExportedTextEncoder(runner, config)


def _require_runner(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError or DeviceError, before graphs are made, for a backend that cannot run them here."""
    require_backend(backend)
    if backend == "tensorrt":
        raise ConfigError(
            "TensorRT runs plans that are built for a bundle; export one with --tensorrt and open it, "
            "or verify and measure its graphs with --backend onnx"
        )
    if backend != "torch":
        require_onnx()
        if (reason := why_not(_provider(backend) or device.type, device, dtype)) is not None:
            raise reason


@contextmanager
def _graphs_of(
    part: str,
    weights: dict[str, Tensor],
    make: Callable[[Path, DTypeName], Graphs],
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[OnnxRunner]:
    """What runs the graphs that `make` makes over these weights."""
    from sfrt_export.onnx_graph import write_graphs

    name = cast(DTypeName, dtype_name(dtype))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({key: weight.cpu().contiguous() for key, weight in weights.items()}, folder / f"{part}.safetensors")
        write_graphs(make(folder, name), folder, name)
        yield OnnxRunner(folder, device, dtype, _provider(backend))


def _provider(backend: str) -> str | None:
    return backend.partition(":")[2] or None
