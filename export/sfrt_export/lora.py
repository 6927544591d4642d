"""Low-rank adapters (LoRA, arXiv 2106.09685): read strictly, and merged into the weights that they were trained on.

Names are those of PEFT, of diffusers, and of the trainers that write lora_down and lora_up. LongLive (arXiv 2509.22622)
publishes its adapter as lora.pt, beside its base model.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sfrt.bundle.writer import LazyTensor
from sfrt.errors import CheckpointError, ConfigError
from sfrt.weights import few
from sfrt_export import spellings
from sfrt_export.checkpoint import Checkpoint, TransformerCheckpoint, finite, named_tensors
from sfrt_export.reading import Source, read_json, read_source

ADAPTER_CONFIG = "adapter_config.json"
"""What PEFT writes beside an adapter's weights."""

_WRAPPERS = ("generator_lora", "generator", "state_dict", "model")
_PREFIXES = re.compile(r"^(?:(?:base_model|model|net|transformer|diffusion_model)\.)+")
_FLAT_PREFIX = "lora_unet_"  # before module names whose dots became underscores
_PART = re.compile(r"(?P<module>.+)\.(?:lora[._](?P<half>A|B|down|up)(?:\.[^.]+)?\.weight|alpha)")
_KINDS = {"A": "lora_A", "down": "lora_A", "B": "lora_B", "up": "lora_B", None: "alpha"}

_PLAIN: Mapping[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "use_dora": (False,),
    "fan_in_fan_out": (False,),
    "rank_pattern": ({},),
    "alpha_pattern": ({},),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),  # others change the base model as well
}
"""Settings of PEFT under which an adapter is nothing but its pairs, all at one scale. The first is the default."""

Parts = dict[str, Tensor]
"""What belongs to one weight: its lora_A and lora_B, and its alpha where the file says it."""


@dataclass(frozen=True)
class Pair:
    """One weight's update, scale · up · down: down [rank, in, …] and up [out, rank, …] as stored."""

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def merged_into(self, weight: Tensor) -> Tensor:
        """weight + scale · up · down, computed in float32 and returned in the dtype of the weight."""
        matrices = (tensor.float().flatten(1) for tensor in (weight, self.up, self.down))
        return torch.addmm(*matrices, alpha=self.scale).view(weight.shape).to(weight.dtype)


@dataclass(frozen=True)
class Adapter(Checkpoint):
    """An adapter that fits its base model: one pair for each published name of a weight that it changes."""

    pairs: Mapping[str, Pair]

    @property
    def label(self) -> str:
        """What a manifest says of it, such as "lora (rank 256, scale 1)"."""
        ranks = _span([pair.rank for pair in self.pairs.values()])
        scales = _span([pair.scale for pair in self.pairs.values()])
        return f"lora (rank {ranks}, scale {scales})"

    def merged(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | LazyTensor]:
        """The base model's tensors under published names, each changed weight made when its turn comes to be read.

        To be done before weights are fused or quantised. Making one raises CheckpointError where the adapter holds NaN
        or infinity.
        """
        return {name: self._lazily(name, tensor) if name in self.pairs else tensor for name, tensor in tensors.items()}

    def _lazily(self, name: str, weight: Tensor) -> LazyTensor:
        pair = self.pairs[name]

        def make() -> Tensor:
            finite(self.path, f"lora_A of {name}", pair.down)
            finite(self.path, f"lora_B of {name}", pair.up)
            return pair.merged_into(weight)

        return LazyTensor(tuple(weight.shape), weight.dtype, make)


def load_adapter(path: Path, base: TransformerCheckpoint, alpha: float | None = None) -> Adapter:
    """The adapter in a file, or in the folder that PEFT saved it to, for a base model.

    A pair is scaled by alpha / rank. The file's own alpha tensors say alpha, else PEFT's adapter_config.json beside it,
    else the argument; with none of them it is the rank, as LongLive has it.
    Raises CheckpointError for what is not wholly an adapter of this model, and where an alpha given is not the one that
    the file says; ConfigError for one that is not above 0.
    """
    if alpha is not None and not _is_positive(alpha):
        raise ConfigError(f"an adapter's alpha is {alpha}; it must be above 0 and finite")
    source = read_source(path, ".")
    tensors = named_tensors(source, _unwrap(source))
    parts, strays = _by_weight(path, tensors, base)
    if not parts:
        raise CheckpointError(
            f"{path} is not an adapter: nothing in it is called lora_A or lora_B (it has {few(sorted(tensors))}); "
            "give the file that holds the adapter"
        )
    _check(path, base, parts, strays)
    config = _config_of(path, parts)
    scales = _scales(path, parts, config, alpha)
    pairs = {name: Pair(part["lora_A"], part["lora_B"], scales[name]) for name, part in parts.items()}
    return Adapter(path, source.files if config is None else (*source.files, config), tensors, pairs)


def _unwrap(source: Source) -> Mapping[str, Any]:
    data = source.data
    while inner := [name for name in _WRAPPERS if isinstance(data.get(name), Mapping)]:
        data = data[inner[0]]
    return data


def _by_weight(
    path: Path, tensors: Mapping[str, Tensor], base: TransformerCheckpoint
) -> tuple[dict[str, Parts], list[str]]:
    """The adapter's tensors by the published name of the weight that they change, and the names of those of none."""
    parts: defaultdict[str, Parts] = defaultdict(dict)
    strays = []
    flat = {_FLAT_PREFIX + name.removesuffix(".weight").replace(".", "_"): name for name in base.tensors}
    for name, tensor in tensors.items():
        match = _PART.fullmatch(name)
        if match is None:
            strays.append(name)
            continue
        module, kind = _PREFIXES.sub("", match["module"]), _KINDS[match["half"]]
        weight = flat.get(module) or spellings.published_name(f"{module}.weight", spellings.TRANSFORMER)
        if kind in parts[weight]:
            raise CheckpointError(
                f"{path} holds {kind} of {weight} twice, under different names; give a file with one adapter"
            )
        parts[weight][kind] = tensor
    return parts, strays


def _check(path: Path, base: TransformerCheckpoint, parts: Mapping[str, Parts], strays: list[str]) -> None:
    """Raise CheckpointError unless every pair is whole and fits a weight of the model, and nothing else is there."""
    needed = {"lora_A", "lora_B"}.union(*parts.values())  # where one pair has its alpha, all must
    unknown, incomplete, misshapen = [], [], []
    for name, part in parts.items():
        if name not in base.tensors:
            unknown.append(name)
        elif missing := sorted(needed - part.keys()):
            incomplete.append(f"{name} without {' and '.join(missing)}")
        elif not _fits(base.tensors[name], part):
            product = f"{list(part['lora_B'].shape)} · {list(part['lora_A'].shape)}"
            misshapen.append(f"{product} for {name} of {list(base.tensors[name].shape)}")
    findings = (
        ("tensors of no pair", strays),
        ("pairs for weights that the model has not", unknown),
        ("incomplete pairs", incomplete),
        ("misshapen pairs", misshapen),
    )
    problems = [f"{len(names)} {what} ({few(names)})" for what, names in findings if names]
    if problems:
        raise CheckpointError(
            f"{path} is no LoRA of {base.path}: {'; '.join(problems)}; check that it is whole and made for this model"
        )


def _fits(weight: Tensor, part: Parts) -> bool:
    """Whether lora_B · lora_A has the weight's shape; for a convolution, B is one of size 1 behind A."""
    down, up = tuple(part["lora_A"].shape), tuple(part["lora_B"].shape)
    if weight.ndim < 2 or len(down) < 2 or down[0] == 0:
        return False
    return down[1:] == weight.shape[1:] and up == (weight.shape[0], down[0], *(1,) * (weight.ndim - 2))


def _config_of(path: Path, parts: Mapping[str, Parts]) -> Path | None:
    """The file beside the adapter's that says its alpha, where that does not say it itself."""
    file = (path if path.is_dir() else path.parent) / ADAPTER_CONFIG
    return file if file.is_file() and not any("alpha" in part for part in parts.values()) else None


def _scales(path: Path, parts: Mapping[str, Parts], file: Path | None, given: float | None) -> dict[str, float]:
    """What each pair is multiplied by; file is the adapter's configuration."""
    ranks = {name: part["lora_A"].shape[0] for name, part in parts.items()}
    said = {name: _alpha(path, name, part["alpha"]) for name, part in parts.items() if "alpha" in part}
    power = 1.0
    if file is not None:
        config = read_json(file)
        said = dict.fromkeys(parts, _configured_alpha(file, config, ranks))
        power = 0.5 if config.get("use_rslora") else 1.0  # rank-stabilised, arXiv 2312.03732
    for name, alpha in said.items():
        if given is not None and alpha != given:
            raise CheckpointError(
                f"{path} is made for an alpha of {alpha:g} ({name}), not of {given:g}; leave --lora-alpha out"
            )
    return {name: said.get(name, rank if given is None else given) / rank**power for name, rank in ranks.items()}


def _alpha(path: Path, name: str, tensor: Tensor) -> float:
    if tensor.numel() != 1 or not _is_positive(alpha := float(tensor)):
        raise CheckpointError(f"{path}: the alpha of {name} is not one number above 0; download the adapter again")
    return alpha


def _configured_alpha(file: Path, config: Mapping[str, Any], ranks: Mapping[str, int]) -> float:
    odd = [name for name, plain in _PLAIN.items() if config.get(name, plain[0]) not in (*plain, None)]
    if odd:
        raise CheckpointError(
            f"{file} sets {few(odd)}, which makes it more than a plain LoRA; merge it with PEFT and export the result"
        )
    alpha, rank = config.get("lora_alpha"), config.get("r")
    if not _is_positive(alpha):
        raise CheckpointError(f"{file} says lora_alpha is {alpha!r}, not a number above 0; download the adapter again")
    for name, found in ranks.items():
        if found != rank:
            raise CheckpointError(
                f"{file} says r is {rank!r} but the pair of {name} has rank {found}; the two are not of one adapter"
            )
    return float(alpha)


def _is_positive(value: object) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and 0 < value < math.inf


def _span(values: list[int] | list[float]) -> str:
    low, high = f"{min(values):g}", f"{max(values):g}"
    return low if low == high else f"{low} to {high}"
