"""export/sfrt_export/parts.py: decoders and text encoders in every published spelling."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

from sfrt.config import WanVaeConfig
from sfrt.decoders.wan_vae import WanVae
from sfrt.errors import CheckpointError
from sfrt.text import Umt5Encoder
from sfrt_export import spellings
from sfrt_export.parts import load_text_encoder, load_wan_vae
from tests.checkpoints import GOLDEN, WEIGHTS, Tensors, full_size, shallower, without


@pytest.fixture
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2}, unk_token="<unk>")
    )
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_text_encoder_without_its_last_block_is_not_a_shallower_one(tmp_path: Path, tokenizer_file: Path) -> None:
    torch.save(shallower(full_size("umt5_xxl_encoder"), 23), tmp_path / "umt5.pth")
    (tmp_path / "config.json").write_text(json.dumps({"dim": 1536, "num_layers": 23}))  # the DiT's, as Wan publishes it
    with pytest.raises(CheckpointError, match=r"of 24 layers .* keys missing \(blocks\.23\."):
        load_text_encoder(tmp_path / "umt5.pth", tokenizer_file, 512)
    torch.save(load_file(GOLDEN / "umt5" / "weights.safetensors"), tmp_path / "umt5.pth")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 32, "num_layers": 7}))
    with pytest.raises(CheckpointError, match=r"of 7 layers .* keys missing"):
        load_text_encoder(tmp_path / "umt5.pth", tokenizer_file, 24)


def test_wan_vae_and_its_diffusers_names(tmp_path: Path) -> None:
    vae = load_file(GOLDEN / "wan_vae" / "weights.safetensors")
    inverse = {ours: theirs for theirs, ours in spellings.WAN_VAE.items() if "*" not in ours}

    def theirs(name: str) -> str:
        stem, _, leaf = name.rpartition(".")
        if stem.startswith("encoder.downsamples."):
            stem = stem.replace("downsamples", "down_blocks").replace("shortcut", "conv_shortcut")
            for number, new in (("0", "norm1"), ("2", "conv1"), ("3", "norm2"), ("6", "conv2")):
                stem = stem.replace(f"residual.{number}", new)
            return f"{stem}.{leaf}"
        return f"{inverse[stem]}.{leaf}"

    torch.save(vae, tmp_path / "Wan2.1_VAE.pth")
    folder = tmp_path / "pipeline" / "vae"
    folder.mkdir(parents=True)
    renamed = {theirs(name): tensor for name, tensor in vae.items()}
    assert "decoder.up_blocks.2.resnets.1.conv2.weight" in renamed
    assert "decoder.up_blocks.1.upsamplers.0.time_conv.bias" in renamed
    save_file(renamed, folder / "diffusion_pytorch_model.safetensors")
    for path in (tmp_path / "Wan2.1_VAE.pth", tmp_path / "pipeline"):
        loaded = load_wan_vae(path)
        assert loaded.part.config == replace(WanVaeConfig(), dim=8)
        assert loaded.tensors.keys() == vae.keys()
        assert all(torch.equal(loaded.tensors[name], vae[name]) for name in vae)
    with pytest.raises(CheckpointError, match=r"is not a Wan 2\.1 VAE: it has no decoder\.head\.2\.weight"):
        load_wan_vae(WEIGHTS)


def test_diffusers_vae_table_covers_the_full_size_names() -> None:
    keys = json.loads((GOLDEN / "checkpoint_keys" / "wan2.1_vae.json").read_text())["keys"]
    with torch.device("meta"):
        own = {name: list(value.shape) for name, value in WanVae(WanVaeConfig()).state_dict().items()}
    assert own == keys
    targets = {target.replace(".*.", ".", 1) for target in spellings.WAN_VAE.values()}
    for name in keys:
        stem = name.rpartition(".")[0]
        if stem.startswith("encoder.downsamples."):
            stem = ".".join(part for index, part in enumerate(stem.split(".")) if index != 2)
        assert stem in targets, f"no diffusers name leads to {name}"


def test_umt5_and_its_transformers_names(tmp_path: Path, tokenizer_file: Path) -> None:
    published = load_file(GOLDEN / "umt5" / "weights.safetensors")
    renamed: Tensors = {}
    for name, tensor in published.items():
        new = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}.get(name)
        if new is None:
            _, number, rest = name.split(".", 2)
            rest = rest.replace("norm1", "layer.0.layer_norm").replace("norm2", "layer.1.layer_norm")
            rest = rest.replace("attn.", "layer.0.SelfAttention.").replace("ffn.", "layer.1.DenseReluDense.")
            rest = rest.replace("pos_embedding.embedding", "layer.0.SelfAttention.relative_attention_bias")
            rest = rest.replace("gate.0", "wi_0").replace("fc1", "wi_1").replace("fc2", "wo")
            new = f"encoder.block.{number}.{rest}"
        renamed[new] = tensor
    renamed["encoder.embed_tokens.weight"] = renamed["shared.weight"]
    torch.save(published, tmp_path / "umt5.pth")
    torch.save(renamed, tmp_path / "tied.bin")
    torch.save(without("shared.weight")(renamed), tmp_path / "encoder.bin")
    for file in ("umt5.pth", "tied.bin", "encoder.bin"):
        loaded = load_text_encoder(tmp_path / file, tokenizer_file, 24)
        assert loaded.tensors.keys() == published.keys()
        assert all(torch.equal(loaded.tensors[name], published[name]) for name in published)
        Umt5Encoder(loaded.config).load_state_dict(dict(loaded.tensors), strict=True)
    assert load_text_encoder(tmp_path / "umt5.pth", tokenizer_file.parent, 24).tokenizer == tokenizer_file
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json; take it from the folder google/umt5-xxl"):
        load_text_encoder(tmp_path / "umt5.pth", tmp_path, 24)
    with pytest.raises(CheckpointError, match="is not a UMT5 encoder"):
        load_text_encoder(WEIGHTS, tokenizer_file, 24)
