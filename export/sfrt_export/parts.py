"""The models beside the DiT: Wan 2.1 VAE, TAEHV and UMT5, read from their published or diffusers files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from sfrt.bundle import TaehvPart, WanVaePart
from sfrt.bundle.manifest import TOKENIZER
from sfrt.config import TaehvConfig, Umt5Config, WanVaeConfig
from sfrt.decoders.taehv import Taehv
from sfrt.decoders.wan_vae import WanVae
from sfrt.errors import CheckpointError, ConfigError
from sfrt.text import Tokenizer, Umt5Encoder
from sfrt_export import spellings
from sfrt_export.checkpoint import Checkpoint, check_tensors, layers_of, named_tensors, shapes_of
from sfrt_export.reading import Source, read_source

UMT5_LAYERS = {4096: 24}
"""Depth of the published encoder that Wan reads, UMT5-XXL, by its dim."""


@dataclass(frozen=True)
class DecoderCheckpoint(Checkpoint):
    """An autoencoder, either kind."""

    part: TaehvPart | WanVaePart


@dataclass(frozen=True)
class TextCheckpoint(Checkpoint):
    """A UMT5 encoder and the tokenizer file that goes with it."""

    config: Umt5Config
    tokenizer: Path


def load_wan_vae(path: Path) -> DecoderCheckpoint:
    """`Wan2.1_VAE.pth` or a diffusers folder. Raises CheckpointError."""
    checkpoint = _load(read_source(path, "vae"), spellings.WAN_VAE, lambda name: name == "quant_conv.weight")
    names = ("decoder.head.2.weight", "conv2.weight")
    head, latents = shapes_of(path, "a Wan 2.1 VAE", checkpoint.tensors, names, (5, 5))
    try:
        config = replace(WanVaeConfig(), dim=head[1], latent_channels=latents[0])
    except ConfigError as error:
        raise CheckpointError(f"{path} is not a Wan 2.1 VAE: {error}") from None
    _check(checkpoint, f"a Wan 2.1 VAE of width {config.dim}", lambda: WanVae(config))
    return DecoderCheckpoint(path, checkpoint.files, checkpoint.tensors, WanVaePart(config))


def load_taehv(path: Path) -> DecoderCheckpoint:
    """`taew2_1.pth` or `.safetensors`. Raises CheckpointError."""
    checkpoint = _load(read_source(path, "vae"), {}, lambda name: False)
    names = ("encoder.0.weight", "decoder.1.weight", "decoder.8.weight", "decoder.14.weight", "decoder.20.weight")
    encoder, *decoder = shapes_of(path, "a TAEHV of Wan 2.1", checkpoint.tensors, names, (4,) * 5)
    first, second, third, fourth = (shape[0] for shape in decoder)
    config = TaehvConfig(decoder[0][1], encoder[0], (first, second, third, fourth))
    _check(checkpoint, "a TAEHV of Wan 2.1", lambda: Taehv(config))
    return DecoderCheckpoint(path, checkpoint.files, checkpoint.tensors, TaehvPart(config))


def load_text_encoder(path: Path, tokenizer: Path, text_len: int) -> TextCheckpoint:
    """`models_t5_umt5-xxl-enc-bf16.pth` or a transformers folder, with its tokenizer.json or the folder that has it.

    Raises CheckpointError; BundleError for a tokenizer that cannot be used.
    """
    source = read_source(path, "text_encoder")
    checkpoint = _load(source, spellings.TEXT_ENCODER, lambda name: name.startswith(("shared.", "encoder.block.")))
    model = "a UMT5 encoder"
    first = ("attn.q.weight", "ffn.fc1.weight", "pos_embedding.embedding.weight")
    names = ("token_embedding.weight", *(f"blocks.0.{name}" for name in first))
    embedding, query, ffn, position = shapes_of(path, model, checkpoint.tensors, names, (2, 2, 2, 2))
    vocab_size, dim = embedding
    said = source.config if "d_model" in source.config else {}  # a DiT's may lie in the same folder
    try:
        layers = layers_of(said, UMT5_LAYERS.get(dim), checkpoint.tensors)
        config = Umt5Config(vocab_size, dim, query[0], ffn[0], position[1], layers, position[0])
    except (ValueError, TypeError) as error:  # a ConfigError, or a config.json with words for numbers
        raise CheckpointError(f"{path} is not {model}: {error}") from None
    _check(checkpoint, f"{model} of {layers} layers", lambda: Umt5Encoder(config))
    file = _tokenizer_file(tokenizer)
    known = Tokenizer(file, text_len).vocab_size
    if known > config.vocab_size:
        raise CheckpointError(
            f"{file} knows {known} tokens but {path} only {config.vocab_size}; take both from the same model"
        )
    return TextCheckpoint(path, checkpoint.files, checkpoint.tensors, config, file)


def _tokenizer_file(path: Path) -> Path:
    for file in (path / "tokenizer" / TOKENIZER, path / TOKENIZER):
        if file.is_file():
            return file
    if path.is_dir():
        raise CheckpointError(f"{path} has no {TOKENIZER}; take it from the folder google/umt5-xxl")
    return path


def _load(source: Source, table: Mapping[str, str], is_theirs: Callable[[str], bool]) -> Checkpoint:
    """Plainly named tensors; by the table where one of the names is_theirs, which is to say not the published one."""
    data = source.data
    while isinstance(inner := data.get("state_dict", data.get("model")), Mapping):
        data = inner
    tensors = named_tensors(source, data)
    if any(map(is_theirs, tensors)):
        tensors = spellings.published_names(source.path, tensors, table)
    return Checkpoint(source.path, source.files, tensors)


def _check(checkpoint: Checkpoint, model: str, build: Callable[[], nn.Module]) -> None:
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    check_tensors(checkpoint.path, model, checkpoint.tensors, expected)
