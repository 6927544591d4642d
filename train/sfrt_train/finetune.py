"""Self Forcing for other models: from published bundles and a folder of data to a bundle that streams.

The loop is that of the recipe (sfrt_train.self_forcing); what it is made from comes from elsewhere. The generator
starts as one bundle's transformer, the judge is another's, a bidirectional teacher's, and the critic starts as a third,
or as the judge.
"""

from __future__ import annotations

import json
import sys
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfrt.bundle import Bundle
from sfrt.bundle.manifest import Manifest
from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.config import ModelConfig, StreamConfig
from sfrt.decoders import load_decoder
from sfrt.device import DTYPES
from sfrt.errors import ConfigError
from sfrt.ops.choice import torch_ops
from sfrt.ops.layout import tokens_from_latents
from sfrt.text import Umt5Encoder
from sfrt_train import self_forcing
from sfrt_train.export import replacing
from sfrt_train.loop import weights_of
from sfrt_train.material import Coder
from sfrt_train.model import PromptedTransformer
from sfrt_train.published import frozen, trainable
from sfrt_train.settings import SelfForcingSettings
from sfrt_train.shards import DataFolder

NAME = "finetune"
_RUN = "run.json"

PUBLISHED = SelfForcingSettings(
    steps=600,
    batch=1,
    learning_rate=2e-6,
    critic_learning_rate=4e-7,
    betas=(0.0, 0.999),
    warmup=0,
    decay=0.0,
    guidance=3.0,
    long_share=0.0,
    switch_share=0.0,
    ema=0.99,
    ema_from=200,
    checkpoint_seconds=1800.0,
)
"""As the paper trained with DMD, but for its batch of 64 (arXiv 2506.08009, and its published configuration)."""


@dataclass(frozen=True)
class FinetuneSettings:
    """What a TOML file says of a run, key by key; the rest is as here, and the stream as the bundle has it."""

    stream: StreamConfig
    seed: int = 7
    chunks: int = 7
    """Of a video as it is judged: 21 latent frames in chunks of three."""
    checkpointing: bool = True
    self_forcing: SelfForcingSettings = PUBLISHED

    def __post_init__(self) -> None:
        stream = self.stream
        if self.chunks < 1:
            raise ConfigError(f"chunks is {self.chunks}; it must be at least 1")
        if stream.sampler != "renoise":
            raise ConfigError(
                f"sampler {stream.sampler!r} is of many steps; few are trained with stream.sampler 'renoise'"
            )
        if stream.first_chunk not in (None, stream.chunk) or stream.first_steps is not None:
            raise ConfigError("a first chunk of another size or with other steps is not trained; leave both out")


@dataclass(frozen=True)
class Finetuning:
    """The settings, for the model that they are for: a sfrt_train.settings.SelfForcingRun."""

    settings: FinetuneSettings
    transformer: ModelConfig

    @property
    def seed(self) -> int:
        return self.settings.seed

    @property
    def chunks(self) -> int:
        return self.settings.chunks

    @property
    def stream(self) -> StreamConfig:
        return self.settings.stream

    @property
    def self_forcing(self) -> SelfForcingSettings:
        return self.settings.self_forcing


def read_settings(path: Path | None, manifest: Manifest) -> FinetuneSettings:
    """Those of a TOML file for this model. Raises ConfigError, naming the file and the key."""
    defaults = {each.name: to_json(each.default) for each in fields(FinetuneSettings) if each.default is not MISSING}
    given = _read_toml(path) if path else {}
    try:
        return from_json(FinetuneSettings, _over({"stream": to_json(manifest.stream), **defaults}, given))
    except SchemaError as error:
        raise ConfigError(f"{path or 'the stream of the bundle'}: {error}") from None


def _over(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """What is given, key by key, and the defaults beside it; keys that are unknown stay, to be found."""
    nested = {
        key: _over(defaults[key], value)
        for key, value in given.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict)
    }
    return {**defaults, **given, **nested}


def _read_toml(path: Path) -> dict[str, Any]:
    if sys.version_info < (3, 11):
        raise ConfigError("--config is read with Python 3.11 or newer, which knows TOML")
    else:
        import tomllib

        try:
            return tomllib.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path} cannot be read as TOML: {error}") from None


@dataclass(frozen=True)
class Embedded:
    """Prompts as embeddings (sfrt_train.clips.Told): two for each of B videos [B, 2, S, D], and what none is [S, D]."""

    two: Tensor
    chunks: Tensor
    nothing: Tensor

    def last(self, count: int) -> Embedded:
        return Embedded(self.two, self.chunks[:, -count:], self.nothing)

    def unprompted(self) -> Embedded:
        return Embedded(self.nothing.expand_as(self.two), self.chunks, self.nothing)

    def to(self, device: str) -> Embedded:
        return Embedded(self.two.to(device), self.chunks.to(device), self.nothing.to(device))

    def embeds(self, encoder: Umt5Encoder | None) -> Tensor:
        return self.two


@dataclass(frozen=True)
class RealClips:
    """Clips [B, G, L, P] with their prompts."""

    tokens: Tensor
    prompts: Embedded


class RealPool:
    """The clips of a folder of data. They may begin anywhere in a video, so late ones are no others."""

    def __init__(self, data: DataFolder, settings: Finetuning) -> None:
        """Raises ConfigError where the folder has none, or of another size."""
        origin, stream = data.origin, settings.stream
        if not origin.clips:
            raise ConfigError("the loss 'gan' compares with clips and the data has none; prepare it with --clips")
        found = origin.frames, origin.height, origin.width
        wanted = settings.chunks * stream.chunk, stream.height, stream.width
        if found != wanted:
            raise ConfigError(
                f"the data's clips are {_size(*found)}, the stream's videos {_size(*wanted)}; prepare them again, or "
                "set chunks, stream.height and stream.width to what they are"
            )
        self._data, self._settings = data, settings

    def __len__(self) -> int:
        return self._data.origin.clips

    def pick(self, index: Tensor, length: int, device: str) -> RealClips:
        clips = [self._data.clip(number) for number in index.tolist()]
        model, chunks = self._settings.transformer, self._settings.chunks
        tokens = torch.stack([tokens_from_latents(latents, model).unflatten(0, (chunks, -1)) for latents, _ in clips])
        two = torch.stack([prompt for _, prompt in clips]).unsqueeze(1).expand(-1, 2, -1, -1)
        prompts = Embedded(two, torch.zeros(len(clips), length, dtype=torch.int64), self._data.nothing())
        return RealClips(tokens[:, :length].to(device), prompts.to(device))


def _size(frames: int, height: int, width: int) -> str:
    return f"{frames} latent frames of {width}×{height}"


@dataclass(frozen=True)
class Published:
    """The material (sfrt_train.material) of a fine-tuning: bundles, opened, and data."""

    settings: Finetuning
    model: Bundle
    teacher: Bundle
    fake: Bundle
    """What the critic starts as: the teacher again, unless that is larger than what is to be trained."""
    data: DataFolder
    device: str

    def __post_init__(self) -> None:
        for bundle in (self.teacher, self.fake):
            check_fits(self.model, bundle)

    def generator(self) -> PromptedTransformer:
        return trainable(self.model, self.device, checkpointing=self.settings.settings.checkpointing)

    def judge(self) -> PromptedTransformer:
        own = self.settings
        return frozen(self.teacher, self.device, own.self_forcing.precision, checkpointing=own.settings.checkpointing)

    def critic(self) -> PromptedTransformer:
        return trainable(self.fake, self.device, checkpointing=self.settings.settings.checkpointing)

    def coder(self) -> Coder:
        part = self.model.manifest.decoder
        weights = self.model.load("decoder", verify=True)
        assert part is not None  # the manifest lists the tensors exactly when it has their config
        dtype = DTYPES[self.settings.self_forcing.precision]
        return load_decoder(part.config, weights, torch.device(self.device), dtype, torch_ops())

    def prompts(self, rng: np.random.Generator, count: int, chunks: int) -> Embedded:
        two, which = [], torch.zeros(count, chunks, dtype=torch.int64)
        for number in range(count):
            first = second = int(rng.integers(self.data.origin.prompts))
            if rng.random() < self.settings.self_forcing.switch_share:
                second = int(rng.integers(self.data.origin.prompts))
                which[number, int(rng.integers(1, chunks)) :] = 1
            two.append(torch.stack((self.data.prompt(first), self.data.prompt(second))))
        return Embedded(torch.stack(two), which, self.data.nothing())

    def clips(self, late: bool) -> RealPool:
        return RealPool(self.data, self.settings)


def check_fits(model: Bundle, other: Bundle) -> None:
    """Raise ConfigError where one transformer cannot judge what the other makes."""
    for name in ("latent_channels", "patch_size", "text_dim", "text_len"):
        own, theirs = getattr(model.manifest.model, name), getattr(other.manifest.model, name)
        if own != theirs:
            raise ConfigError(
                f"{other.path} cannot judge {model.path}: its {name} is {theirs}, the model's {own}; "
                "take a teacher of the same family"
            )


def finetune(material: Published, folder: Path, until: int | None = None) -> None:
    """Train to the end, or to step `until`, going on where the run in `folder` stopped.

    Raises ConfigError where that was another run: of other settings, models or data.
    """
    said = {
        "settings": to_json(material.settings.settings),
        "model": _weights_hash(material.model),
        "judge": _weights_hash(material.teacher),
        "critic": _weights_hash(material.fake),
        "data": material.data.hash,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / _RUN
    before = json.loads(path.read_text()) if path.is_file() else said
    if other := [name for name in said if before.get(name) != said[name]]:
        raise ConfigError(
            f"the run in {folder} has other {' and '.join(other)}; go on with its own, or choose a folder"
        )
    path.write_text(json.dumps(said, indent=2) + "\n")
    self_forcing.run(material.settings, material, folder, NAME, material.device, until)


def export(model: Bundle, settings: FinetuneSettings, folder: Path, target: Path) -> Bundle:
    """Write the bundle of what the run in `folder` has come to; all but the transformer is the model's own, as it is.

    It has neither ONNX graphs nor compiled kernels: those belong to the weights before. A bundle at `target` is
    replaced. Raises BundleError where something else is there.
    """
    manifest = replace(
        model.manifest,
        name=f"{model.manifest.name}-{NAME}",
        stream=settings.stream,
        weights="ema" if settings.self_forcing.ema else "trained",
        created_by="sfrt_train",
        graphs=(),
        kernels=(),
        files={},
    )
    trained, prefix, dtype = weights_of(folder, NAME), "transformer.", DTYPES[model.manifest.dtype]
    with replacing(target) as writer:
        writer.add_tensors("transformer", {key.removeprefix(prefix): value.to(dtype) for key, value in trained.items()})
        for name in manifest.expected_files():
            if name != "transformer.safetensors":
                writer.add_file(name, model.path / name)
        writer.finish(manifest)
    return Bundle.open(target)


def _weights_hash(bundle: Bundle) -> str:
    return bundle.manifest.files["transformer.safetensors"].sha256
