"""Names of diffusers and transformers for the parameters of Wan 2.1, translated to the published ones.

One table per model; `*` stands for a number. What is not in a table keeps its name, and the strict check that follows
refuses it if it is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfrt.errors import CheckpointError

TRANSFORMER = {
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "scale_shift_table": "head.modulation",
    "proj_out": "head.head",
    "blocks.*.scale_shift_table": "blocks.*.modulation",
    "blocks.*.attn1.to_q": "blocks.*.self_attn.q",
    "blocks.*.attn1.to_k": "blocks.*.self_attn.k",
    "blocks.*.attn1.to_v": "blocks.*.self_attn.v",
    "blocks.*.attn1.to_out.0": "blocks.*.self_attn.o",
    "blocks.*.attn1.norm_q": "blocks.*.self_attn.norm_q",
    "blocks.*.attn1.norm_k": "blocks.*.self_attn.norm_k",
    "blocks.*.attn2.to_q": "blocks.*.cross_attn.q",
    "blocks.*.attn2.to_k": "blocks.*.cross_attn.k",
    "blocks.*.attn2.to_v": "blocks.*.cross_attn.v",
    "blocks.*.attn2.to_out.0": "blocks.*.cross_attn.o",
    "blocks.*.attn2.norm_q": "blocks.*.cross_attn.norm_q",
    "blocks.*.attn2.norm_k": "blocks.*.cross_attn.norm_k",
    # Norms are numbered by order of use there and by order of definition in the published code.
    "blocks.*.norm2": "blocks.*.norm3",
    "blocks.*.ffn.net.0.proj": "blocks.*.ffn.0",
    "blocks.*.ffn.net.2": "blocks.*.ffn.2",
}

TEXT_ENCODER = {
    "shared": "token_embedding",
    "encoder.embed_tokens": "token_embedding",
    "encoder.final_layer_norm": "norm",
    "encoder.block.*.layer.0.layer_norm": "blocks.*.norm1",
    "encoder.block.*.layer.0.SelfAttention.q": "blocks.*.attn.q",
    "encoder.block.*.layer.0.SelfAttention.k": "blocks.*.attn.k",
    "encoder.block.*.layer.0.SelfAttention.v": "blocks.*.attn.v",
    "encoder.block.*.layer.0.SelfAttention.o": "blocks.*.attn.o",
    "encoder.block.*.layer.0.SelfAttention.relative_attention_bias": "blocks.*.pos_embedding.embedding",
    "encoder.block.*.layer.1.layer_norm": "blocks.*.norm2",
    "encoder.block.*.layer.1.DenseReluDense.wi_0": "blocks.*.ffn.gate.0",
    "encoder.block.*.layer.1.DenseReluDense.wi_1": "blocks.*.ffn.fc1",
    "encoder.block.*.layer.1.DenseReluDense.wo": "blocks.*.ffn.fc2",
}

_RESNET = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def _vae_table() -> dict[str, str]:
    table = {"quant_conv": "conv1", "post_quant_conv": "conv2"}
    for half in ("encoder", "decoder"):
        table[f"{half}.conv_in"] = f"{half}.conv1"
        table[f"{half}.norm_out"] = f"{half}.head.0"
        table[f"{half}.conv_out"] = f"{half}.head.2"
        for theirs, ours in _RESNET.items():
            table[f"{half}.mid_block.resnets.0.{theirs}"] = f"{half}.middle.0.{ours}"
            table[f"{half}.mid_block.resnets.1.{theirs}"] = f"{half}.middle.2.{ours}"
        for name in ("norm", "to_qkv", "proj"):
            table[f"{half}.mid_block.attentions.0.{name}"] = f"{half}.middle.1.{name}"
    for theirs, ours in _RESNET.items():
        table[f"encoder.down_blocks.*.{theirs}"] = f"encoder.downsamples.*.{ours}"
    for name in ("resample.1", "time_conv"):
        table[f"encoder.down_blocks.*.{name}"] = f"encoder.downsamples.*.{name}"
    # The decoder's levels, of three residual blocks and an upsampler each, are one flat list in the published code.
    for level in range(4):
        for theirs, ours in _RESNET.items():
            for block in range(3):
                table[f"decoder.up_blocks.{level}.resnets.{block}.{theirs}"] = (
                    f"decoder.upsamples.{4 * level + block}.{ours}"
                )
        for name in ("resample.1", "time_conv"):
            table[f"decoder.up_blocks.{level}.upsamplers.0.{name}"] = f"decoder.upsamples.{4 * level + 3}.{name}"
    return table


WAN_VAE = _vae_table()


def published_name(name: str, table: Mapping[str, str]) -> str:
    """A parameter's published name; the name itself where the table does not have it."""
    stem, dot, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias", "gamma"):
        stem, dot, leaf = name, "", ""
    number = re.search(r"\.(\d+)\.", stem)
    for key in (stem, stem.replace(number[0], ".*.", 1) if number else stem):
        if key in table:
            return table[key].replace("*", number[1] if number else "") + dot + leaf
    return name


def published_names(path: Path, tensors: Mapping[str, Tensor], table: Mapping[str, str]) -> dict[str, Tensor]:
    """The same tensors under published names. Two names for one parameter (tied embeddings) become one entry.

    Raises CheckpointError, naming the file at `path`, where two different tensors would get the same name.
    """
    published: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = published_name(name, table)
        if not _same(published.setdefault(new, tensor), tensor):
            raise CheckpointError(
                f"{path} holds two different tensors for {new}, one of them {name}; it is not one model"
            )
    return published


def _same(one: Tensor, other: Tensor) -> bool:
    return one is other or (one.dtype == other.dtype and torch.equal(one, other))
