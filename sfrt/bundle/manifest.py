"""What manifest.json says: the description of a bundle, read strictly."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from sfrt.bundle.kernels import KernelSet
from sfrt.bundle.quantization import Quantization, TextQuantization
from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.config import DecoderConfig, ModelConfig, StreamConfig, TaehvConfig, Umt5Config, WanVaeConfig
from sfrt.errors import BundleError, ConfigError
from sfrt.graphs import graph_files

SCHEMA_VERSION = 3
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"

DTypeName = Literal["float32", "float16", "bfloat16"]

_ADD_TEXT = "export the checkpoint again with --text-encoder FILE and --tokenizer FILE to use prompts"
HOW_TO_ADD = {
    "transformer.safetensors": "it is not a whole bundle; export the checkpoint again",
    "decoder.safetensors": "export the checkpoint again with --taehv FILE or --vae FILE to see pixels",
    "text_encoder.safetensors": _ADD_TEXT,
    TOKENIZER: _ADD_TEXT,
}
_ADD_KERNELS = "compile them again with sfrt export BUNDLE --kernels GPUS"
_ADD_GRAPHS = "export the checkpoint again with --onnx"
_STREAM_SINCE_2 = {"positions": "absolute", "refresh": "rolling"}
"""What version 2 added to a stream's settings, as all streams were before."""
_SINCE_3: dict[str, Any] = {"text_quantization": None, "kernels": []}
_STREAM_SINCE_3 = {"ring_dtype": "model"}
"""What version 3 added, likewise."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_FILE_NAME = re.compile(r"(?:kernels/sm_[0-9]+a?/)?[A-Za-z0-9_][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class FileInfo:
    """Size and SHA-256 of a file, in lower-case hexadecimal."""

    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if self.bytes < 0 or not _SHA256.fullmatch(self.sha256):
            raise ConfigError(f"{self.bytes} bytes with sha256 {self.sha256!r} describe no file")


@dataclass(frozen=True)
class TaehvPart:
    """decoder.safetensors holds a TAEHV."""

    config: TaehvConfig
    kind: Literal["taehv"] = "taehv"


@dataclass(frozen=True)
class WanVaePart:
    """decoder.safetensors holds a Wan 2.1 VAE."""

    config: WanVaeConfig
    kind: Literal["wan_vae"] = "wan_vae"


@dataclass(frozen=True)
class Manifest:
    """What a bundle is and holds; manifest.json is this, key by key.

    decoder and text_encoder are None where the bundle has none. weights says which of a training's weights the
    transformer holds: the name they had in the checkpoint, such as generator_ema, or flat where they had none. dtype is
    that of these weights as stored, or of most of them; of those that are not quantised, where some are. graphs are the
    dtypes that it has ONNX graphs in. quantization is None where the transformer's weights are as they were, and
    text_quantization where the text encoder's are. kernels are those that were compiled ahead of time. source describes
    the files that the bundle was made from, files those it consists of, by name.
    Raises ConfigError when the parts do not fit each other.
    """

    name: str
    family: str
    model: ModelConfig
    stream: StreamConfig
    weights: str
    dtype: DTypeName
    created_by: str
    decoder: TaehvPart | WanVaePart | None = None
    text_encoder: Umt5Config | None = None
    graphs: tuple[DTypeName, ...] = ()
    kernels: tuple[KernelSet, ...] = ()
    quantization: Quantization | None = None
    text_quantization: TextQuantization | None = None
    source: dict[str, FileInfo] = field(default_factory=dict)
    files: dict[str, FileInfo] = field(default_factory=dict)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        for name in self.files:
            if not _FILE_NAME.fullmatch(name):
                raise ConfigError(f"{name!r} cannot be a file of a bundle; files lie in the bundle's own folder")
        if self.decoder is not None and self.decoder.config.latent_channels != self.model.latent_channels:
            raise ConfigError(
                f"the decoder reads {self.decoder.config.latent_channels} latent channels "
                f"but the model makes {self.model.latent_channels}"
            )
        if self.text_encoder is not None and self.text_encoder.dim != self.model.text_dim:
            raise ConfigError(
                f"the text encoder makes embeddings of {self.text_encoder.dim} "
                f"but the model reads {self.model.text_dim}"
            )
        if self.text_quantization is not None and self.text_encoder is None:
            raise ConfigError("a text encoder is said to be quantised, but there is none")

    def expected_files(self) -> tuple[str, ...]:
        """The files that a bundle with these parts consists of, the manifest aside."""
        names = ["transformer.safetensors"]
        if self.decoder is not None:
            names.append("decoder.safetensors")
        if self.text_encoder is not None:
            names += ["text_encoder.safetensors", TOKENIZER]
        parts = [name.removesuffix(".safetensors") for name in names if name != TOKENIZER]
        return (
            *names,
            *(file for part in parts for dtype in self.graph_dtypes(part) for file in graph_files(part, dtype)),
            *(file for kernels in self.kernels for file in kernels.files),
        )

    def graph_dtypes(self, part: str) -> tuple[DTypeName, ...]:
        """The dtypes of a part's graphs. A quantised text encoder has none: it is read with torch on every backend.

        ONNX Runtime would unfold its weights when it loads them, to more than they took before.
        """
        if part == "text_encoder" and self.text_quantization is not None:
            return ()
        return tuple(dict.fromkeys(self.graph_dtype(part, dtype) for dtype in self.graphs))

    def graph_dtype(self, part: str, dtype: DTypeName) -> DTypeName:
        """The dtype of a part's graphs beside a model's in `dtype`; those in bfloat16 are for GPUs."""
        if part != "decoder" or self.decoder is None:
            return dtype
        return dtype_beside(self.decoder.config, dtype, on_gpu=True)

    def dumps(self) -> str:
        """The text of manifest.json."""
        return json.dumps(to_json(self), indent=2) + "\n"


def dtype_beside(config: DecoderConfig, dtype: DTypeName, *, on_gpu: bool) -> DTypeName:
    """The dtype an autoencoder runs in beside a model in `dtype`.

    TAEHV has no norms, so bfloat16's rounding adds up to several per cent of its pixels; it runs in float16, as it was
    published, where that is fast, and in float32 on a CPU.
    """
    if isinstance(config, TaehvConfig) and dtype == "bfloat16":
        return "float16" if on_gpu else "float32"
    return dtype


def read_manifest(path: Path) -> Manifest:
    """The manifest in this file. Raises BundleError that names the file, the key and the way out."""
    try:
        data = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError:
        raise BundleError(f"{path} cannot be read; a bundle is a folder that sfrt export wrote") from None
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{path} is not JSON ({error}); export the checkpoint again") from None
    _check_version(path, data)
    try:
        manifest = from_json(Manifest, _brought_up(data))
    except SchemaError as error:
        raise BundleError(f"{path}: {error}; correct it or export the checkpoint again") from None
    _check_files(path, manifest.files, manifest.expected_files())
    return manifest


def how_to_add(name: str) -> str:
    """What to do about a file that a bundle lacks."""
    return HOW_TO_ADD.get(name, _ADD_KERNELS if name.startswith("kernels/") else _ADD_GRAPHS)


def _check_version(path: Path, data: object) -> None:
    """Before the keys: a newer schema is expected to have others, and that is what to say about it."""
    version = data.get("schema_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(f"{path}: schema_version is {version!r}, not a whole number from 1; export again")
    if version > SCHEMA_VERSION:
        raise BundleError(
            f"{path}: schema_version is {version} and this sfrt reads up to {SCHEMA_VERSION}; "
            "update sfrt or export the checkpoint again with it"
        )


def _brought_up(data: dict[str, Any]) -> dict[str, Any]:
    """The data of a manifest of any version that is read, as this version has it."""
    version, stream = data["schema_version"], data.get("stream")
    if version < 3 and isinstance(stream, dict):
        data = {**data, "stream": {**(_STREAM_SINCE_2 if version < 2 else {}), **_STREAM_SINCE_3, **stream}}
    return {**(_SINCE_3 if version < 3 else {}), **data, "schema_version": SCHEMA_VERSION}


def _check_files(path: Path, files: Mapping[str, FileInfo], expected: tuple[str, ...]) -> None:
    for name in expected:
        if name not in files:
            raise BundleError(f"{path}: files.{name} is missing; {how_to_add(name)}")
    for name in files:
        if name not in expected:
            raise BundleError(f"{path}: files.{name} belongs to no part of this bundle; export the checkpoint again")


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")
