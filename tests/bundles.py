"""Small bundles, and how to break their manifests."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import tokenizers
import torch
from torch import Tensor

from sfrt.bundle import Bundle, FileInfo, Manifest, TaehvPart
from sfrt.bundle.writer import BundleWriter
from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, Umt5Config
from sfrt.text import Umt5Encoder

TEXT = Umt5Config(vocab_size=8, dim=16, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1)
MANIFEST = Manifest(
    name="tiny",
    family="self-forcing",
    model=ModelConfig(dim=24, ffn_dim=32, num_heads=2, num_layers=1, text_dim=16, text_len=12),
    stream=StreamConfig(window=None, first_steps=(1000.0, 500.0)),
    weights="generator_ema",
    dtype="float32",
    created_by="tests",
    source={"tiny.pt": FileInfo(3, hashlib.sha256(b"abc").hexdigest())},
)
FULL = replace(MANIFEST, decoder=TaehvPart(TaehvConfig(decoder_widths=(8, 8, 4, 4))), text_encoder=TEXT)


def tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "half": torch.randn(3, generator=generator).bfloat16(),
        "matrix": torch.randn(5, 7, generator=generator),
        "transposed": torch.randn(4, 6, generator=generator).half().T,
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
    }


def write(directory: Path, manifest: Manifest = MANIFEST) -> Bundle:
    with BundleWriter(directory) as writer:
        writer.add_tensors("transformer", tensors())
        if manifest.decoder is not None:
            writer.add_tensors("decoder", {"weight": torch.ones(2)})
        if manifest.text_encoder is not None:
            torch.manual_seed(0)
            writer.add_tensors("text_encoder", Umt5Encoder(manifest.text_encoder).state_dict())
            writer.add_tokenizer(tokenizer_file(directory.parent))
        return writer.finish(manifest)


def tokenizer_file(folder: Path) -> Path:
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", "red", "circle"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "words.json"))
    return folder / "words.json"


def edit_manifest(bundle: Path, edit: Callable[[Any], object]) -> None:
    data = json.loads((bundle / "manifest.json").read_text())
    edit(data)
    (bundle / "manifest.json").write_text(json.dumps(data))


def set_at(*keys: str, value: object) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return edit


def drop(*keys: str) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return edit
