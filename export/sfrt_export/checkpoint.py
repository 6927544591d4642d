"""Published layouts of the causal DiT, and of the parts beside it, to one: unwrapped, renamed, checked strictly.

The result is a mapping of published names to tensors, still mapped from the file: what is to be done with weights
before they are exported (such as merging an adapter: lora.py) is done to such a mapping.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfrt.bundle.writer import LazyTensor
from sfrt.config import ModelConfig
from sfrt.device import dtype_name
from sfrt.errors import CheckpointError
from sfrt.weights import few
from sfrt_export import spellings
from sfrt_export.layout import published_shapes
from sfrt_export.reading import Source, read_source

WAN_HEAD_DIM = 128
"""Head size of every published Wan model. Shapes do not tell it."""

WAN_LAYERS = {1536: 30, 5120: 40}
"""Depth of the published Wan models by their dim, 1.3B and 14B."""

FLAT = "flat"
"""What the weights of a file without wrappers are called."""

_EMA = "generator_ema"
_WRAPPERS = ("generator", "model", "state_dict")
_MODULE_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
_PREFIXES = ("model.", "net.")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_ADAPTER = re.compile(r"(?:^|[._])lora(?:[._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Checkpoint:
    """One model's weights under published names, strictly checked but for their values."""

    path: Path
    files: tuple[Path, ...]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class TransformerCheckpoint(Checkpoint):
    """The causal DiT. weights is what its checkpoint calls them, such as generator_ema, or flat where it does not."""

    config: ModelConfig
    weights: str


def load_transformer(
    path: Path,
    *,
    ema: bool | None = None,
    prefer_ema: bool = False,
    heads: int | None = None,
    text_len: int | None = None,
) -> TransformerCheckpoint:
    """The DiT of a checkpoint file or folder, in any published spelling.

    ema asks for one kind of weights; None takes what prefer_ema says of a file that has both. heads and text_len, which
    shapes do not tell, override a config.json beside the file, and that Wan's heads of 128 and 512 text slots.
    Raises CheckpointError, naming the file and what is wrong with it.
    """
    source = read_source(path, "transformer")
    data, weights = _unwrap(source, ema, prefer_ema)
    tensors = named_tensors(source, data)
    if any(".attn1." in name for name in tensors):
        tensors = spellings.published_names(path, tensors, spellings.TRANSFORMER)
    config = _detect_config(source, tensors, heads, text_len)
    model = f"a Wan 2.1 transformer of dim {config.dim} with {config.num_layers} layers"
    check_tensors(path, model, tensors, published_shapes(config))
    return TransformerCheckpoint(path, source.files, tensors, config, weights)


def _unwrap(source: Source, ema: bool | None, prefer_ema: bool) -> tuple[Mapping[str, Any], str]:
    """The innermost mapping of tensors, and its name within the file."""
    data, path = source.data, []
    wants_ema = prefer_ema if ema is None else ema
    order = (_EMA, *_WRAPPERS) if wants_ema else (*_WRAPPERS, _EMA)
    _refuse_adapter(source, data)
    while inner := [name for name in order if isinstance(data.get(name), Mapping)]:
        path.append(inner[0])
        data = data[inner[0]]
        _refuse_adapter(source, data)
    if ema is True and _EMA not in path:
        raise CheckpointError(f"{source.path} has no averaged weights ({_EMA}); export it without asking for EMA")
    if ema is False and _EMA in path:
        raise CheckpointError(f"{source.path} has averaged weights only ({_EMA}); export it without refusing EMA")
    return data, ".".join(path) or FLAT


def _refuse_adapter(source: Source, data: Mapping[str, Any]) -> None:
    adapter = sorted(name for name in map(str, data) if _ADAPTER.search(name))
    if adapter:
        raise CheckpointError(
            f"{source.path} holds an adapter ({few(adapter)}), which alone is no model; "
            "export its base checkpoint, and give the adapter's own file with --lora FILE"
        )


def named_tensors(source: Source, data: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tensors by plain parameter names: what wraps modules in training is removed, and a leading model. or net. too.

    Raises CheckpointError where there are none, two get the same name, or one is of another dtype than weights have.
    """
    tensors: dict[str, Tensor] = {}
    for full_name, value in data.items():
        if not isinstance(value, Tensor):
            continue
        name = plain_name(str(full_name))
        if name in tensors:
            raise CheckpointError(f"{source.path} holds {name} twice, under different prefixes; it is not one model")
        if value.dtype not in _DTYPES:
            kind = dtype_name(value.dtype)
            raise CheckpointError(
                f"{source.path}: {name} is {kind}, not a 16- or 32-bit float; use the checkpoint that is not quantised"
            )
        tensors[name] = value
    if not tensors:
        held = few(sorted(map(str, data))) or "nothing"
        raise CheckpointError(
            f"{source.path} holds no tensors where a model's should be (it holds {held}); it is not a checkpoint"
        )
    return tensors


def plain_name(name: str) -> str:
    """A parameter's name without what FSDP, activation checkpointing, torch.compile and wrapper classes put in it."""
    for wrapper in _MODULE_WRAPPERS:
        name = name.replace(wrapper, "")
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _detect_config(
    source: Source, tensors: Mapping[str, Tensor], heads: int | None, text_len: int | None
) -> ModelConfig:
    names = ("patch_embedding.weight", "text_embedding.0.weight", "time_embedding.0.weight", "blocks.0.ffn.0.weight")
    patch, text, time, ffn = shapes_of(source.path, "a Wan 2.1 transformer", tensors, names, (5, 2, 2, 2))
    dim = patch[0]
    said = {} if "d_model" in source.config else source.config  # Wan's own folder may hold a text encoder's
    if heads is None:
        heads = said.get("num_attention_heads", said.get("num_heads"))
    if heads is None:
        if dim % WAN_HEAD_DIM:
            raise CheckpointError(
                f"{source.path}: a model of dim {dim} does not split into heads of {WAN_HEAD_DIM}; "
                "say how many it has (--heads N)"
            )
        heads = dim // WAN_HEAD_DIM
    defaults = ModelConfig()
    try:
        return ModelConfig(
            dim=dim,
            ffn_dim=ffn[0],
            num_heads=int(heads),
            num_layers=layers_of(said, WAN_LAYERS.get(dim), tensors),
            freq_dim=time[1],
            text_dim=text[1],
            text_len=int(said.get("text_len", defaults.text_len) if text_len is None else text_len),
            latent_channels=patch[1],
            patch_size=(patch[2], patch[3], patch[4]),
            eps=float(said.get("eps", defaults.eps)),
        )
    except (ValueError, TypeError) as error:  # a ConfigError, or a config.json with words for numbers
        raise CheckpointError(f"{source.path} does not describe a model: {error}") from None


def shapes_of(
    path: Path, model: str, tensors: Mapping[str, Tensor], names: Iterable[str], ranks: Iterable[int]
) -> list[tuple[int, ...]]:
    """Shapes of the tensors that tell a model's sizes. Raises CheckpointError where one is not there."""
    found = []
    for name, rank in zip(names, ranks, strict=True):
        if name not in tensors or tensors[name].ndim != rank:
            raise CheckpointError(
                f"{path} is not {model}: it has no {name} of {rank} axes (it has {few(sorted(tensors))}); "
                "check that it is the file you mean"
            )
        found.append(tuple(tensors[name].shape))
    return found


def layers_of(said: Mapping[str, Any], published: int | None, tensors: Mapping[str, Tensor]) -> int:
    """How deep a model should be: as its config.json says, else as the published one of its width is, else as it is.

    Only where nothing else tells are the names blocks.N.… counted: what lacks its last blocks would pass as whole.
    Raises ValueError or TypeError for a config.json that gives no number.
    """
    if (layers := said.get("num_layers", published)) is not None:
        return int(layers)
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def check_tensors(
    path: Path, model: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless names and shapes are exactly those expected; it shows a few and counts all."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, not {list(shape)}"
        for name, shape in expected.items()
        if name in tensors and tuple(tensors[name].shape) != shape
    ]
    findings = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    problems = [f"{len(names)} keys {what} ({few(names)})" for what, names in findings if names]
    if problems:
        raise CheckpointError(
            f"{path} is not {model} ({len(expected)} keys): {'; '.join(problems)}; "
            "check that it is whole and the model you mean"
        )


def lazy(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, LazyTensor]:
    """Tensors to be written as they are, each read and looked at for NaN and infinity when its turn comes."""

    def entry(name: str, tensor: Tensor) -> LazyTensor:
        return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: finite(path, name, tensor))

    return {name: entry(name, tensor) for name, tensor in tensors.items()}


def finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor itself. Raises CheckpointError when it holds NaN or infinity."""
    if not torch.isfinite(tensor).all():
        count = int((~torch.isfinite(tensor)).sum())
        raise CheckpointError(
            f"{path}: {name} holds {count} values that are NaN or infinite; its training went wrong, use an earlier one"
        )
    return tensor
