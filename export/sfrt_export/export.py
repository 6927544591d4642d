"""`sfrt export`: a published checkpoint, and the models beside it, to a bundle."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import sfrt
from sfrt.bundle import Bundle, DTypeName, FileInfo, Manifest, hash_file
from sfrt.bundle.quantization import Method, TextMethod
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.config import StreamConfig
from sfrt.errors import ConfigError
from sfrt.text import TextEncoder, Tokenizer, empty_encoder
from sfrt.weights import assign
from sfrt_export.bundle_graphs import bundle_graphs, require_onnx
from sfrt_export.checkpoint import Checkpoint, TransformerCheckpoint, finite, lazy, load_transformer
from sfrt_export.families import Family, family_of
from sfrt_export.layout import module_tensors
from sfrt_export.lora import Adapter, load_adapter
from sfrt_export.parts import DecoderCheckpoint, TextCheckpoint, load_taehv, load_text_encoder, load_wan_vae
from sfrt_export.progress import Progress, counter, silent, write_part
from sfrt_export.quantize_text import quantized_text
from sfrt_export.quantized_bundle import check_methods, quantized


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    family: str | None = None,
    ema: bool | None = None,
    lora: str | Path | None = None,
    lora_alpha: float | None = None,
    vae: str | Path | None = None,
    taehv: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    heads: int | None = None,
    text_len: int | None = None,
    stream: Mapping[str, Any] | None = None,
    dtype: DTypeName | None = None,
    onnx: Literal[True] | tuple[DTypeName, ...] = (),
    quantize: Method | None = None,
    quantize_text: TextMethod | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> Bundle:
    """Write the bundle of a checkpoint to the folder `output`, which must not exist yet.

    family names a row of `sfrt_export.families`; None guesses it from the file's name. ema: see `load_transformer`.
    lora is an adapter to merge into the transformer; lora_alpha: see `load_adapter`. vae or taehv is the decoder;
    text_encoder and tokenizer go together; paths may be files or folders. stream overrides fields of the family's
    StreamConfig. dtype converts the transformer, None keeps it as stored; other parts stay as stored. onnx writes
    ONNX graphs over the same weights: in these dtypes, or (True) in the stored one and what CPUs and GPUs stream in.
    quantize stores the transformer's big weights in eight bits (`sfrt_export.quantize`) if that passes the quality gate
    (`sfrt_export.gate`), or in any case with force; quantize_text the text encoder's (`sfrt_export.quantize_text`).
    Tensors pass one at a time, so memory stays near the size of the mapped checkpoint; the gate aside, which runs the
    model. After a Ctrl-C the same call goes on behind the last part that was finished.
    Raises CheckpointError, BundleError or ConfigError; nothing is left at `output` then. Warns of a family that was
    not told, and of what a family's bundle lacks.
    """
    output = Path(output)
    with BundleWriter(output) as writer:
        settings = family_of(family, Path(checkpoint))
        stream_config = _stream(settings, stream or {})
        _check_dtypes(dtype, *(() if onnx is True else onnx))
        check_methods(quantize, quantize_text, force)
        if onnx:
            require_onnx()
        transformer = load_transformer(
            Path(checkpoint), ema=ema, prefer_ema=settings.prefer_ema, heads=heads, text_len=text_len
        )
        adapter = _adapter(lora, lora_alpha, transformer)
        decoder = _decoder(vae, taehv)
        text = _text(text_encoder, tokenizer, transformer.config.text_len)
        weights = _transformer_tensors(transformer, adapter, dtype)
        manifest = Manifest(
            name=output.name,
            family=settings.name,
            model=transformer.config,
            stream=stream_config,
            weights=f"{transformer.weights} + {adapter.label}" if adapter else transformer.weights,
            dtype=_main_dtype(weights),
            created_by=f"sfrt {sfrt.__version__}",
            decoder=decoder.part if decoder else None,
            text_encoder=text.config if text else None,
        )
        if onnx:
            graphs = ("float32", "bfloat16", manifest.dtype) if onnx is True else onnx
            manifest = dataclasses.replace(manifest, graphs=tuple(dict.fromkeys(graphs)))
        text_weights = lazy(text.path, text.tensors) if text else {}
        if quantize_text is not None:
            if text is None:
                raise ConfigError("there is no text encoder to quantise; give one with --text-encoder and --tokenizer")
            words = Tokenizer(text.tokenizer, transformer.config.text_len)
            text_weights, facts = quantized_text(text.config, text_weights, words, quantize_text, force, progress)
            manifest = dataclasses.replace(manifest, text_quantization=facts)
        if quantize is not None:
            decoding = (decoder.part.config, _read(decoder)) if decoder else None
            reading = _text_encoder(text, transformer.config.text_len) if text else None
            weights, manifest = quantized(manifest, weights, decoding, reading, quantize, force, progress)
        writer.resume(_contents(manifest, transformer, adapter, decoder, text))
        write_part(writer, "transformer", weights, progress)
        if decoder:
            write_part(writer, "decoder", lazy(decoder.path, decoder.tensors), progress)
        if text:
            write_part(writer, "text_encoder", text_weights, progress)
            writer.add_tokenizer(text.tokenizer)
        if manifest.graphs:
            writer.add_graphs(partial(bundle_graphs, manifest))
        source = _hash_sources(
            {"transformer": transformer, "lora": adapter, "decoder": decoder, "text_encoder": text}, progress
        )
        bundle = writer.finish(dataclasses.replace(manifest, source=source))
    for caution in (settings.caution, settings.without_adapter if adapter is None else None):
        if caution is not None:
            warnings.warn(caution, stacklevel=2)
    return bundle


def _read(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A part's tensors, looked at for NaN and infinity."""
    return {name: tensor.make() for name, tensor in lazy(checkpoint.path, checkpoint.tensors).items()}


def _text_encoder(text: TextCheckpoint, text_len: int) -> TextEncoder:
    """What reads the gate's prompts, over the mapped file."""
    encoder = empty_encoder(text.config)
    assign(encoder, _read(text), "the text encoder")
    return TextEncoder(Tokenizer(text.tokenizer, text_len), encoder)


def _check_dtypes(*names: str | None) -> None:
    for name in names:
        if name is not None and name not in get_args(DTypeName):
            raise ConfigError(f"dtype {name!r} is not one of: {', '.join(get_args(DTypeName))}")


def _stream(family: Family, overrides: Mapping[str, Any]) -> StreamConfig:
    known = {field.name for field in dataclasses.fields(StreamConfig)}
    for name in overrides:
        if name not in known:
            raise ConfigError(f"a stream has no setting {name!r}; it has {', '.join(sorted(known))}")
    return dataclasses.replace(family.stream, **overrides)


def _adapter(lora: str | Path | None, alpha: float | None, base: TransformerCheckpoint) -> Adapter | None:
    if lora is not None:
        return load_adapter(Path(lora), base, alpha)
    if alpha is not None:
        raise ConfigError(f"alpha {alpha:g} is of no adapter; give the file of one with --lora")
    return None


def _decoder(vae: str | Path | None, taehv: str | Path | None) -> DecoderCheckpoint | None:
    if vae is not None and taehv is not None:
        raise ConfigError("a bundle has one decoder; give the Wan VAE (better) or the TAEHV (faster), not both")
    if vae is not None:
        return load_wan_vae(Path(vae))
    return load_taehv(Path(taehv)) if taehv is not None else None


def _text(text_encoder: str | Path | None, tokenizer: str | Path | None, text_len: int) -> TextCheckpoint | None:
    if text_encoder is None and tokenizer is None:
        return None
    if text_encoder is None or tokenizer is None:
        raise ConfigError("a text encoder and its tokenizer go together; give both or neither")
    return load_text_encoder(Path(text_encoder), Path(tokenizer), text_len)


def _transformer_tensors(
    transformer: TransformerCheckpoint, adapter: Adapter | None, dtype: DTypeName | None
) -> dict[str, LazyTensor]:
    target = None if dtype is None else getattr(torch, dtype)
    tensors = transformer.tensors if adapter is None else adapter.merged(transformer.tensors)
    return module_tensors(transformer.config, tensors, target, partial(finite, transformer.path))


def _main_dtype(weights: Mapping[str, LazyTensor]) -> DTypeName:
    """The dtype of most of the weights: published files may keep a few in another."""
    sizes: Counter[str] = Counter()
    for weight in weights.values():
        sizes[str(weight.dtype)] += weight.nbytes
    (name, _), *_ = sizes.most_common(1)
    names: dict[str, DTypeName] = {f"torch.{known}": known for known in get_args(DTypeName)}
    return names[name]


def _contents(manifest: Manifest, *sources: Checkpoint | None) -> str:
    """What a bundle is made of: its settings, and the files as they are now."""
    files = [file for source in sources if source is not None for file in source.files]
    stats = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return f"{manifest.dumps()}{stats}"


def _hash_sources(checkpoints: Mapping[str, Checkpoint | None], progress: Progress) -> dict[str, FileInfo]:
    """Every file read, as PART/NAME: files of different parts may share a name."""
    given = {part: checkpoint for part, checkpoint in checkpoints.items() if checkpoint is not None}
    files = {f"{part}/{file.name}": file for part, checkpoint in given.items() for file in checkpoint.files}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    count = counter("hash", sum(sizes.values()), progress)
    return {name: FileInfo(sizes[name], hash_file(file, count)) for name, file in files.items()}
