"""A model quantised on its way into a bundle, if the gate lets it pass; and a bundle made of another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from sfrt.bundle import Bundle, Manifest
from sfrt.bundle.quantization import Method
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.config import DecoderConfig
from sfrt.decoders import load_decoder
from sfrt.device import memory_told, resolve_device, resolve_dtype
from sfrt.errors import ConfigError
from sfrt.text import TextEncoder, load_text_encoder
from sfrt_export.bundle_graphs import bundle_graphs, require_onnx
from sfrt_export.checkpoint import lazy
from sfrt_export.gate import Subject, embeddings, gate
from sfrt_export.progress import Progress, silent, write_part


def quantize_bundle(
    source: Bundle, output: str | Path, method: Method, *, force: bool = False, progress: Progress = silent
) -> Bundle:
    """The (verified) bundle with its transformer quantised, written to the folder `output`, which must not exist yet.

    Raises BundleError, or ConfigError where it is quantised already or the gate refuses; nothing is left then.
    """
    output, given = Path(output), source.manifest
    check_method(method, force)
    if given.quantization is not None:
        raise ConfigError(
            f"{source.path} is quantised already ({given.quantization.method}); give the one it came from"
        )
    if given.graphs:
        require_onnx()
    with BundleWriter(output) as writer:
        manifest = dataclasses.replace(given, name=output.name)
        decoding = (given.decoder.config, source.load("decoder")) if given.decoder else None
        reading = load_text_encoder(source, torch.device("cpu")) if given.text_encoder else None
        plain = lazy(source.path, source.load("transformer"))
        weights, manifest = quantized(manifest, plain, decoding, reading, method, force, progress)
        write_part(writer, "transformer", weights, progress)
        if given.decoder:
            writer.add_file("decoder.safetensors", source.path / "decoder.safetensors")
        if given.text_encoder:
            writer.add_file("text_encoder.safetensors", source.path / "text_encoder.safetensors")
            writer.add_tokenizer(source.tokenizer_path)
        if given.graphs:
            writer.add_graphs(partial(bundle_graphs, manifest))
        return writer.finish(manifest)


def quantized(
    manifest: Manifest,
    weights: Mapping[str, LazyTensor],
    decoder: tuple[DecoderConfig, dict[str, Tensor]] | None,
    text: TextEncoder | None,
    method: Method,
    force: bool,
    progress: Progress,
) -> tuple[dict[str, LazyTensor], Manifest]:
    """The transformer's tensors quantised, and the manifest that says so, once the gate has let them pass."""
    device = resolve_device("auto")
    dtype = resolve_dtype("auto", device)
    subject = Subject(
        model=manifest.model,
        stream=manifest.stream,
        weights=weights,
        embeds=embeddings(text, manifest.model),
        decoder=load_decoder(*decoder, device, dtype) if decoder else None,
    )
    with memory_told("the gate of quantisation", device):
        tensors, quantization = gate(subject, method, device, dtype, force=force, progress=partial(progress, "gate"))
    return tensors, dataclasses.replace(manifest, quantization=quantization)


def check_method(method: str | None, force: bool) -> None:
    """Raise ConfigError for what no quantisation is called, and for a gate to be passed by force that there is not."""
    if method is not None and method not in get_args(Method):
        raise ConfigError(f"no quantisation is called {method!r}; choose one of: {', '.join(get_args(Method))}")
    if force and method is None:
        raise ConfigError("force is for a quantised model that the quality gate refuses; say how to quantise it")
