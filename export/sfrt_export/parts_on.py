"""A model's parts on any backend from tensors alone, without a bundle: for verification and benchmarks.

Backends that run exported graphs, or plans built from those, get them made on the way, in a folder that lasts as long
as the part is used. Plans are for certain sizes, so each part is told what streams it is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, cast

import torch
from safetensors.torch import save_file
from torch import Tensor

from sfrt.backends import Backend, require_backend
from sfrt.backends.onnx import OnnxRunner, why_not
from sfrt.backends.tensorrt.library import require_tensorrt
from sfrt.bundle import DTypeName, FileInfo, Part, hash_file
from sfrt.config import DecoderConfig, ModelConfig, StreamConfig, Umt5Config
from sfrt.decoders import Decoder, decoder_dtype, load_decoder
from sfrt.device import dtype_name
from sfrt.text import PromptEncoder, empty_encoder
from sfrt.weights import assign
from sfrt_export.bundle_graphs import require_onnx

if TYPE_CHECKING:
    from sfrt.backends.exported import Runner
    from sfrt.backends.tensorrt.running import PlanRunner
    from sfrt_export.onnx_graph import Graphs
    from sfrt_export.tensorrt_graph import StreamSizes


@contextmanager
def transformer_on(
    backend: str,
    config: ModelConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    stream: StreamConfig,
    frames: int | None = None,
    *,
    any_start: bool = False,
) -> Iterator[Backend]:
    """The transformer over tensors named as in a bundle, which it takes over: the mapping may be emptied.

    It is for streams of these settings, of at most so many latent frames; any_start: see `PlanSettings`.
    """
    _require_runner(backend, device, dtype)
    if backend == "torch":
        from sfrt.backends.torch import TorchBackend

        yield TorchBackend(config, weights, device, dtype)
        return
    from sfrt_export.onnx_graph import transformer_graphs

    make, sizes = partial(transformer_graphs, config), [_sizes(config, stream, frames, any_start)]
    with _graphs_of("transformer", weights, make, backend, device, dtype, sizes) as runner:
        yield _transformer_of(runner, backend, config)


@contextmanager
def decoder_on(
    backend: str,
    config: DecoderConfig,
    weights: dict[str, Tensor],
    device: torch.device,
    dtype: torch.dtype,
    streams: Iterable[StreamConfig],
) -> Iterator[Decoder]:
    """The autoencoder over its tensors, for the chunks of these streams."""
    _require_runner(backend, device, dtype)
    if backend == "torch":
        yield load_decoder(config, weights, device, dtype)
        return
    from sfrt.backends.exported_parts import ExportedDecoder
    from sfrt_export.onnx_graph import decoder_graphs

    make, dtype = partial(decoder_graphs, config), decoder_dtype(config, device, dtype)
    sizes = [_sizes(ModelConfig(), stream, stream.chunk) for stream in streams]
    with _graphs_of("decoder", weights, make, backend, device, dtype, sizes) as runner:
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
        encoder = empty_encoder(config)
        assign(encoder, {name: weight.to(device, dtype) for name, weight in weights.items()}, "the text encoder")
        yield encoder
        return
    from sfrt.backends.exported_parts import ExportedTextEncoder
    from sfrt_export.onnx_graph import text_encoder_graphs

    make = partial(text_encoder_graphs, config, text_len)
    sizes = [_sizes(replace(ModelConfig(), text_len=text_len), StreamConfig())]
    with _graphs_of("text_encoder", weights, make, backend, device, dtype, sizes) as runner:
        yield ExportedTextEncoder(runner, config)


def _require_runner(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ConfigError or DeviceError, before graphs are made, for a backend that cannot run them here."""
    require_backend(backend)
    if backend == "torch":
        return
    require_onnx()
    if backend == "tensorrt":
        require_tensorrt(device)
    elif (reason := why_not(_provider(backend) or device.type, device, dtype)) is not None:
        raise reason


@contextmanager
def _graphs_of(
    part: Part,
    weights: dict[str, Tensor],
    make: Callable[[Path, DTypeName], Graphs],
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    sizes: Iterable[StreamSizes],
) -> Iterator[Runner]:
    """What runs the graphs that `make` makes over these weights, or plans of them for these sizes."""
    from sfrt_export.onnx_graph import write_graphs

    name = cast(DTypeName, dtype_name(dtype))
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file({key: weight.cpu().contiguous() for key, weight in weights.items()}, folder / f"{part}.safetensors")
        write_graphs(make(folder, name), folder, name)
        if backend == "tensorrt":
            yield _planned(folder, part, name, device, sizes)
        else:
            yield OnnxRunner(folder, device, dtype, _provider(backend))


def _planned(folder: Path, part: Part, dtype: DTypeName, device: torch.device, sizes: Iterable[StreamSizes]) -> Runner:
    """What runs plans of the graphs in a folder."""
    from sfrt.backends.tensorrt.plans import Origin
    from sfrt.backends.tensorrt.running import PlanRunner
    from sfrt_export.tensorrt_plan import build_part

    origin = Origin(folder, {file.name: FileInfo(file.stat().st_size, hash_file(file)) for file in folder.iterdir()})
    build_part(origin, part, dtype, sizes, device)
    return PlanRunner(origin, device, dtype)


def _transformer_of(runner: Runner, backend: str, config: ModelConfig) -> Backend:
    from sfrt.backends.exported import ExportedBackend
    from sfrt.backends.tensorrt import TensorrtBackend

    if backend == "tensorrt":
        return TensorrtBackend(cast("PlanRunner", runner), config)
    return ExportedBackend(runner, config)


def _sizes(
    config: ModelConfig, stream: StreamConfig, frames: int | None = None, any_start: bool = False
) -> StreamSizes:
    from sfrt_export.tensorrt_graph import StreamSizes

    return StreamSizes.of(config, stream, frames, any_start=any_start)


def _provider(backend: str) -> str | None:
    return backend.partition(":")[2] or None
