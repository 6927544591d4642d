"""A stream's state between two chunks, and the one file that it is kept in.

The file is a safetensors file, so anything that reads those shows what is in it: the ring, the decoder's state, the
clean frames in view and the prompt's embeddings as tensors, all else as JSON in its metadata, with a SHA-256 over both.
Keys, frames and states come back bit for bit and in the layout they had in memory, so a stream goes on exactly as it
would have, as long as the same backend runs it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfrt.bundle import Manifest
from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.config import StreamConfig
from sfrt.decoders.taehv import TaehvState
from sfrt.decoders.wan_vae import WanVaeState
from sfrt.errors import SnapshotError
from sfrt.ring import ChunkSizes, Ring
from sfrt.switching import How, Switch, Text

VERSION = 2
_VERSION, _STREAM, _DECODER, _LAYOUTS, _HASH = "sfrt_snapshot", "stream", "decoder", "layouts", "sha256"
_STATES = {state.__name__: state for state in (TaehvState, WanVaeState)}
_GRAPHS = ".onnx"


@dataclass(frozen=True, eq=False)
class CleanFrame:
    """A finished latent frame: its tokens, and its last pixel frame, uint8 [H, W, 3], where it may be needed again."""

    tokens: Tensor
    picture: npt.NDArray[np.uint8] | None


@dataclass(frozen=True, eq=False)
class Moment:
    """Where a stream stands between two chunks. Nothing that it holds is ever written to.

    index is that of the next chunk, next_frame the number of its first latent frame; past are the frames that it sees,
    by number, sinks first; decoder is the state its frames are decoded with.
    """

    text: Text
    index: int = 0
    next_frame: int = 0
    past: Mapping[int, CleanFrame] = field(default_factory=dict)
    decoder: Any = None


@dataclass(frozen=True)
class ModelId:
    """What a stream's state can be gone on from with: sha256 is over all that decides what the model makes."""

    name: str
    sha256: str
    backend: str
    dtype: str

    @classmethod
    def of(cls, manifest: Manifest, backend: str, dtype: str) -> ModelId:
        """The model of a bundle on a backend, whichever of a backend's providers."""
        parts = (manifest.model, manifest.decoder, manifest.text_encoder, manifest.quantization)
        kernels = {name for each in manifest.kernels for name in each.files}
        kept = [name for name in manifest.files if not name.endswith(_GRAPHS) and name not in kernels]
        files = {name: manifest.files[name].sha256 for name in kept}
        said = json.dumps([*map(to_json, parts), files], sort_keys=True)
        return cls(manifest.name, hashlib.sha256(said.encode()).hexdigest(), backend.partition(":")[0], dtype)

    def require(self, other: ModelId, path: Path) -> None:
        """Raise SnapshotError where a snapshot of this one cannot be gone on from with the other."""
        if self.sha256 != other.sha256:
            raise SnapshotError(
                f"{path} was taken of the model {self.name!r} ({self.sha256[:12]}…), not of this {other.name!r} "
                f"({other.sha256[:12]}…); open the bundle it was taken of"
            )
        for what, mine, others in (("backend", self.backend, other.backend), ("dtype", self.dtype, other.dtype)):
            if mine != others:
                raise SnapshotError(
                    f"{path} was taken on {what} {mine}, not {others}; open the model with {what}={mine!r} for it"
                )


@dataclass(frozen=True)
class Settings:
    """What a stream was made with and keeps; ring is the plan of its slots."""

    model: ModelId
    seed: int
    stream: StreamConfig
    ring: Ring
    sizes: ChunkSizes
    limit: int | None


@dataclass(frozen=True, eq=False)
class Saved:
    """All that a stream goes on from. ring is what Rollout.state gives: it may be the ring's own memory.

    left_out is how many frames of the video the ring was not filled with when it was last filled anew.
    """

    settings: Settings
    at: Moment
    left_out: int
    queued: Switch | None
    ring: Mapping[str, Tensor]


@dataclass(frozen=True)
class _Queued:
    prompt: str | None
    how: How
    over: int


@dataclass(frozen=True)
class _Record:
    """What of Saved is no tensor, as it lies in the file; a prompt that was given as embeddings is null."""

    settings: Settings
    index: int
    next_frame: int
    left_out: int
    past: tuple[int, ...]
    prompt: str | None
    left: int
    queued: _Queued | None


def write_snapshot(path: str | Path, saved: Saved) -> None:
    """Write the file whole, over one of that name, or leave what was there. Raises SnapshotError where it cannot be."""
    path = Path(path)
    decoder: list[Tensor] = []
    structure = json.dumps(_take_apart(saved.at.decoder, decoder))
    tensors = {**_tensors(saved), **{f"decoder.{number}": tensor for number, tensor in enumerate(decoder)}}
    layouts = {name: order for name, tensor in tensors.items() if (order := _layout(tensor)) != sorted(order)}
    kept = {name: tensor.permute(_layout(tensor)).contiguous().cpu() for name, tensor in tensors.items()}
    metadata = {
        _VERSION: str(VERSION),
        _STREAM: json.dumps(to_json(_record(saved))),
        _DECODER: structure,
        _LAYOUTS: json.dumps(layouts),
    }
    metadata[_HASH] = _digest(kept, metadata)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(kept, partial, metadata)
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SnapshotError(
            f"{path} cannot be written ({reason}); nothing was changed there, make room or choose another place"
        ) from None
    finally:
        with suppress(OSError):
            partial.unlink()


def read_snapshot(path: str | Path, device: torch.device) -> Saved:
    """What write_snapshot wrote, its tensors on a device; a prompt's embeddings stand for its text where it had none.

    Raises SnapshotError for a file that is damaged, of a newer version, or no snapshot.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            _check_version(path, metadata)
            kept = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise SnapshotError(f"{path} cannot be read as a snapshot ({reason}); take another one") from None
    if metadata.pop(_HASH, None) != _digest(kept, metadata):
        raise SnapshotError(f"{path} is damaged: it is not what its sha256 was taken of; take another snapshot")
    try:
        record = from_json(_Record, _brought_up(json.loads(metadata[_STREAM]), metadata[_VERSION]))
        layouts = json.loads(metadata[_LAYOUTS])
        tensors = {name: _laid_out(tensor, layouts.get(name)).to(device) for name, tensor in kept.items()}
        return _saved(record, tensors, json.loads(metadata[_DECODER]))
    except (SchemaError, LookupError, ValueError, TypeError) as error:
        raise SnapshotError(f"{path} is no snapshot of version {VERSION} ({error}); take another one") from None


def _check_version(path: Path, metadata: Mapping[str, str]) -> None:
    version = metadata.get(_VERSION)
    if version is None:
        raise SnapshotError(f"{path} is a safetensors file but no snapshot; give one that Session.snapshot wrote")
    if version not in ("1", str(VERSION)):
        raise SnapshotError(f"{path} is a snapshot of version {version} and this sfrt reads {VERSION}; update sfrt")


def _brought_up(stream: dict[str, Any], version: str) -> dict[str, Any]:
    """What a snapshot of any version that is read says of its stream, as this version has it."""
    if version == "1":  # when all rings were of the model's dtype
        settings = stream["settings"]
        settings["stream"]["ring_dtype"] = settings["ring"]["dtype"] = "model"
    return stream


def _record(saved: Saved) -> _Record:
    at, queued = saved.at, saved.queued
    return _Record(
        settings=saved.settings,
        index=at.index,
        next_frame=at.next_frame,
        left_out=saved.left_out,
        past=tuple(at.past),
        prompt=_words(at.text.prompt),
        left=at.text.left,
        queued=None if queued is None else _Queued(_words(queued.prompt), queued.how, queued.over),
    )


def _words(prompt: str | Tensor) -> str | None:
    return prompt if isinstance(prompt, str) else None


def _tensors(saved: Saved) -> dict[str, Tensor]:
    """All of them by name, the decoder's aside."""
    text = saved.at.text
    tensors = {f"ring.{name}": tensor for name, tensor in saved.ring.items()}
    tensors["text.goal"] = text.goal
    if text.left:
        tensors["text.embeds"] = text.embeds
    if saved.queued is not None:
        tensors["queued"] = saved.queued.embeds.clone()  # perhaps the very tensor of the text: one prompt, asked twice
    for number, frame in saved.at.past.items():
        tensors[f"frame.{number}.tokens"] = frame.tokens
        if frame.picture is not None:
            tensors[f"frame.{number}.picture"] = torch.from_numpy(frame.picture)
    return tensors


def _saved(record: _Record, tensors: Mapping[str, Tensor], decoder: Any) -> Saved:
    goal = tensors["text.goal"]
    prompt = goal if record.prompt is None else record.prompt
    at = Moment(
        text=Text(prompt, goal, tensors["text.embeds"] if record.left else goal, record.left),
        index=record.index,
        next_frame=record.next_frame,
        past={number: _frame(tensors, number) for number in record.past},
        decoder=_put_together(decoder, tensors),
    )
    queued = None
    if record.queued is not None:
        words, embeds = record.queued.prompt, tensors["queued"]
        queued = Switch(embeds if words is None else words, embeds, record.queued.how, record.queued.over)
    ring = {name.removeprefix("ring."): tensor for name, tensor in tensors.items() if name.startswith("ring.")}
    return Saved(record.settings, at, record.left_out, queued, ring)


def _frame(tensors: Mapping[str, Tensor], number: int) -> CleanFrame:
    picture = tensors.get(f"frame.{number}.picture")
    return CleanFrame(tensors[f"frame.{number}.tokens"], None if picture is None else picture.cpu().numpy())


def _take_apart(state: Any, tensors: list[Tensor]) -> Any:
    """What a decoder's state is made of, as JSON: its tensors, put into the list, by their places there."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        tensors.append(state)
        return len(tensors) - 1
    if isinstance(state, tuple):
        return [_take_apart(part, tensors) for part in state]
    parts = [_take_apart(getattr(state, part.name), tensors) for part in dataclasses.fields(state)]
    return {type(state).__name__: parts}


def _put_together(structure: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state again."""
    if structure is None:
        return None
    if isinstance(structure, int):
        return tensors[f"decoder.{structure}"]
    if isinstance(structure, list):
        return tuple(_put_together(part, tensors) for part in structure)
    ((name, parts),) = structure.items()
    return _STATES[name](*(_put_together(part, tensors) for part in parts))


def _layout(tensor: Tensor) -> list[int]:
    """The dimensions from the one that moves farthest in memory on: channels-last activations are to stay so."""
    strides = tensor.stride()
    return sorted(range(tensor.ndim), key=lambda axis: -strides[axis])


def _laid_out(tensor: Tensor, order: list[int] | None) -> Tensor:
    return tensor if order is None else tensor.permute(sorted(range(len(order)), key=order.__getitem__))


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for block in _blocks(tensors):
        digest.update(block)
    return digest.hexdigest()


def _blocks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """All that tensors hold: names, shapes and dtypes too."""
    for name, tensor in sorted(tensors.items()):
        yield f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode()
        yield tensor.reshape(-1).view(torch.uint8).numpy().data
