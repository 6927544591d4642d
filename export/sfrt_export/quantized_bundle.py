"""A model quantised on its way into a bundle, if the gate lets it pass; and a bundle made of another one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from sfrt.bundle import Bundle, Manifest, Part
from sfrt.bundle.manifest import how_to_add
from sfrt.bundle.quantization import Method, TextMethod
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.config import DecoderConfig
from sfrt.decoders import load_decoder
from sfrt.device import memory_told, resolve_device, resolve_dtype
from sfrt.errors import ConfigError
from sfrt.text import TextEncoder, load_text_encoder, load_tokenizer
from sfrt_export.bundle_graphs import bundle_graphs, require_onnx
from sfrt_export.checkpoint import lazy
from sfrt_export.gate import Subject, embeddings, gate
from sfrt_export.progress import Progress, silent, write_part
from sfrt_export.quantize_text import quantized_text


def quantize_bundle(
    source: Bundle,
    output: str | Path,
    method: Method | None,
    *,
    text: TextMethod | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """The (verified) bundle with its transformer quantised by `method`, its text encoder by `text`, or both.

    It is written to the folder `output`, which must not exist yet. Raises BundleError, or ConfigError where it is
    quantised already or a gate refuses; nothing is left then.
    """
    output, given = Path(output), source.manifest
    check_methods(method, text, force)
    _check_plain(source, method, text)
    if given.graphs:
        require_onnx()
    with BundleWriter(output) as writer:
        manifest = dataclasses.replace(given, name=output.name, kernels=())  # it runs others
        parts: dict[Part, dict[str, LazyTensor]] = {}
        if text is not None and given.text_encoder is not None:
            tensors = lazy(source.path, source.load("text_encoder"))
            parts["text_encoder"], facts = quantized_text(
                given.text_encoder, tensors, load_tokenizer(source), text, force, progress
            )
            manifest = dataclasses.replace(manifest, text_quantization=facts)
        if method is not None:
            decoding = (given.decoder.config, source.load("decoder")) if given.decoder else None
            reading = load_text_encoder(source, torch.device("cpu")) if given.text_encoder else None
            plain = lazy(source.path, source.load("transformer"))
            parts["transformer"], manifest = quantized(manifest, plain, decoding, reading, method, force, progress)
        for part, quantised in parts.items():
            write_part(writer, part, quantised, progress)
        for name in given.files:
            if name.endswith(".safetensors") and Path(name).stem not in parts:
                writer.add_file(name, source.path / name)
        if given.text_encoder:
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


def check_methods(method: str | None, text: str | None, force: bool) -> None:
    """Raise ConfigError for what no quantisation is called, and for a gate to be passed by force that there is not."""
    for given, known, what in (
        (method, get_args(Method), "quantisation"),
        (text, get_args(TextMethod), "quantisation of a text encoder"),
    ):
        if given is not None and given not in known:
            raise ConfigError(f"no {what} is called {given!r}; choose one of: {', '.join(known)}")
    if force and method is None and text is None:
        raise ConfigError("force is for a quantised model that the quality gate refuses; say how to quantise it")


def _check_plain(source: Bundle, method: Method | None, text: TextMethod | None) -> None:
    """Raise ConfigError where what is to be quantised is so already, or is not there, or nothing is to be."""
    given = source.manifest
    if method is None and text is None:
        raise ConfigError(f"say what of {source.path} to quantise, and how: the transformer, the text encoder or both")
    if text is not None and given.text_encoder is None:
        raise ConfigError(f"{source.path} has no text encoder to quantise; {how_to_add('text_encoder.safetensors')}")
    for asked, found, what in (
        (method, given.quantization, source.path),
        (text, given.text_quantization, f"the text encoder of {source.path}"),
    ):
        if asked is not None and found is not None:
            raise ConfigError(f"{what} is quantised already ({found.method}); give the one it came from")
