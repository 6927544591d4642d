"""`sfrt export`: a published checkpoint, and the models beside it, to a bundle."""

from __future__ import annotations

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args

import torch

import sfrt
from sfrt.bundle import Bundle, DTypeName, FileInfo, Manifest, Part, hash_file
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.config import StreamConfig
from sfrt.errors import ConfigError
from sfrt_export.checkpoint import Checkpoint, TransformerCheckpoint, finite, lazy, load_transformer
from sfrt_export.families import Family, family_of
from sfrt_export.layout import module_tensors
from sfrt_export.parts import DecoderCheckpoint, TextCheckpoint, load_taehv, load_text_encoder, load_wan_vae


class Progress(Protocol):
    """Told of a stage ("hash" or a part's name), the bytes of it that are done and all its bytes."""

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def _silent(stage: str, done: int, total: int, /) -> None:
    """No progress shown."""


def export_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    *,
    family: str | None = None,
    ema: bool | None = None,
    vae: str | Path | None = None,
    taehv: str | Path | None = None,
    text_encoder: str | Path | None = None,
    tokenizer: str | Path | None = None,
    heads: int | None = None,
    text_len: int | None = None,
    stream: Mapping[str, Any] | None = None,
    dtype: DTypeName | None = None,
    progress: Progress = _silent,
) -> Bundle:
    """Write the bundle of a checkpoint to the folder `output`, which must not exist yet.

    family names a row of `sfrt_export.families`; None guesses it from the file's name. ema: see `load_transformer`.
    vae or taehv is the decoder; text_encoder and tokenizer go together; paths may be files or folders. stream overrides
    fields of the family's StreamConfig. dtype converts the transformer, None keeps it as stored; other parts stay as
    stored. Tensors pass one at a time, so memory stays near the size of the mapped checkpoint.
    Raises CheckpointError, BundleError or ConfigError; nothing is left at `output` then. Warns of a family that was
    not told, and of what a family's bundle lacks.
    """
    output = Path(output)
    with BundleWriter(output) as writer:
        settings = family_of(family, Path(checkpoint))
        stream_config = _stream(settings, stream or {})
        if dtype is not None and dtype not in get_args(DTypeName):
            raise ConfigError(f"dtype {dtype!r} is not one of: {', '.join(get_args(DTypeName))}")
        transformer = load_transformer(
            Path(checkpoint), ema=ema, prefer_ema=settings.prefer_ema, heads=heads, text_len=text_len
        )
        decoder = _decoder(vae, taehv)
        text = _text(text_encoder, tokenizer, transformer.config.text_len)
        weights = _transformer_tensors(transformer, dtype)
        manifest = Manifest(
            name=output.name,
            family=settings.name,
            model=transformer.config,
            stream=stream_config,
            weights=transformer.weights,
            dtype=_main_dtype(weights),
            created_by=f"sfrt {sfrt.__version__}",
            decoder=decoder.part if decoder else None,
            text_encoder=text.config if text else None,
        )
        _write(writer, "transformer", weights, progress)
        if decoder:
            _write(writer, "decoder", lazy(decoder.path, decoder.tensors), progress)
        if text:
            _write(writer, "text_encoder", lazy(text.path, text.tensors), progress)
            writer.add_tokenizer(text.tokenizer)
        source = _hash_sources({"transformer": transformer, "decoder": decoder, "text_encoder": text}, progress)
        bundle = writer.finish(dataclasses.replace(manifest, source=source))
    if settings.caution is not None:
        warnings.warn(settings.caution, stacklevel=2)
    return bundle


def _stream(family: Family, overrides: Mapping[str, Any]) -> StreamConfig:
    known = {field.name for field in dataclasses.fields(StreamConfig)}
    for name in overrides:
        if name not in known:
            raise ConfigError(f"a stream has no setting {name!r}; it has {', '.join(sorted(known))}")
    return dataclasses.replace(family.stream, **overrides)


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


def _transformer_tensors(transformer: TransformerCheckpoint, dtype: DTypeName | None) -> dict[str, LazyTensor]:
    target = None if dtype is None else getattr(torch, dtype)
    return module_tensors(transformer.config, transformer.tensors, target, partial(finite, transformer.path))


def _main_dtype(weights: Mapping[str, LazyTensor]) -> DTypeName:
    """The dtype of most of the weights: published files may keep a few in another."""
    sizes: Counter[str] = Counter()
    for weight in weights.values():
        sizes[str(weight.dtype)] += weight.nbytes
    (name, _), *_ = sizes.most_common(1)
    names: dict[str, DTypeName] = {f"torch.{known}": known for known in get_args(DTypeName)}
    return names[name]


def _write(writer: BundleWriter, part: Part, tensors: Mapping[str, LazyTensor], progress: Progress) -> None:
    writer.add_tensors(part, tensors, _counter(part, sum(tensor.nbytes for tensor in tensors.values()), progress))


def _hash_sources(checkpoints: Mapping[str, Checkpoint | None], progress: Progress) -> dict[str, FileInfo]:
    """Every file read, as PART/NAME: files of different parts may share a name."""
    given = {part: checkpoint for part, checkpoint in checkpoints.items() if checkpoint is not None}
    files = {f"{part}/{file.name}": file for part, checkpoint in given.items() for file in checkpoint.files}
    sizes = {name: file.stat().st_size for name, file in files.items()}
    count = _counter("hash", sum(sizes.values()), progress)
    return {name: FileInfo(sizes[name], hash_file(file, count)) for name, file in files.items()}


def _counter(stage: str, total: int, progress: Progress) -> Callable[[int], None]:
    """Turns counts of bytes into a running sum. Headers are not counted, so the sum is held to the total."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done = min(done + more, total)
        progress(stage, done, total)

    return count
