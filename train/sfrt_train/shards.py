"""A folder of data to fine-tune on: shards of prompts' embeddings, and of clips, behind an index that is checked.

    index.json                  what it was made from, and each shard's size and hash
    prompts-00000.safetensors   embeds [R, D]: n prompts' embeddings, one behind the other; lengths int64 [n]
    clips-00000.safetensors     the same of n clips' prompts, and their latents [n, T, C, h, w]

The very first prompt is what a video without one is told (it may have no rows at all). Shards are mapped, not read: a
step takes from the disk what it needs.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sfrt.bundle import FileInfo, Manifest, hash_file
from sfrt.bundle.manifest import TOKENIZER
from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.errors import SfrtError

INDEX = "index.json"
Kind = Literal["prompts", "clips"]


class DataError(SfrtError):
    """A folder of data is damaged, incomplete, or made for another model."""


@dataclass(frozen=True)
class Encoders:
    """What read the prompts and encoded the clips: SHA-256 of a bundle's files, None for one that it lacks."""

    model: str
    text_encoder: str | None
    tokenizer: str | None
    decoder: str | None

    @classmethod
    def of(cls, manifest: Manifest) -> Encoders:
        files = manifest.files
        names = ("text_encoder.safetensors", TOKENIZER, "decoder.safetensors")
        return cls(manifest.name, *(files[name].sha256 if name in files else None for name in names))


@dataclass(frozen=True)
class Origin:
    """All that the data is a function of. Clips are `frames` latent frames of this size."""

    encoders: Encoders
    sources: str
    """SHA-256 of the prompts, and of the clips' files and what is said of them."""
    prompts: int
    clips: int
    per_shard: int
    frames: int
    height: int
    width: int
    fps: int


@dataclass(frozen=True)
class Shard:
    """How many prompts or clips it holds, and its file."""

    count: int
    file: FileInfo


@dataclass(frozen=True)
class Index:
    """The shards that are done, in order."""

    origin: Origin
    prompts: tuple[Shard, ...] = ()
    clips: tuple[Shard, ...] = ()


def shard_name(kind: Kind, number: int) -> str:
    """Its file's."""
    return f"{kind}-{number:05d}.safetensors"


def read_index(folder: Path) -> Index | None:
    """That of a folder, None where there is none. Raises DataError where it is damaged."""
    path = folder / INDEX
    try:
        return from_json(Index, json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        problem = str(error) if isinstance(error, SchemaError) else f"it cannot be read ({error})"
        raise DataError(f"{path}: {problem}; remove the folder and prepare it again") from None


def write_index(folder: Path, index: Index) -> None:
    """In one step."""
    partial = folder / f"{INDEX}.part"
    partial.write_text(json.dumps(to_json(index), indent=2) + "\n")
    os.replace(partial, folder / INDEX)


def write_shard(folder: Path, kind: Kind, number: int, embeds: Sequence[Tensor], **more: Tensor) -> Shard:
    """Prompts' embeddings, each [L, D] of any length, and what else there is of each, in one step."""
    path = folder / shard_name(kind, number)
    partial = path.with_suffix(".part")
    lengths = torch.tensor([len(each) for each in embeds])
    save_file({"embeds": torch.cat(list(embeds)).contiguous(), "lengths": lengths, **more}, partial)
    info = FileInfo(partial.stat().st_size, hash_file(partial))
    os.replace(partial, path)
    return Shard(len(embeds), info)


@dataclass(frozen=True)
class _Opened:
    """One shard: where each prompt's rows begin, and the mapped file."""

    file: Any
    starts: tuple[int, ...]

    @classmethod
    def of(cls, path: Path, shard: Shard) -> _Opened:
        """Raises DataError where the file is not what the index says."""
        again = "remove it and prepare the folder again"
        if not path.is_file():
            raise DataError(f"{path} is missing; prepare the folder again")
        found = path.stat().st_size
        if found != shard.file.bytes:
            raise DataError(f"{path} has {found} bytes but the index says {shard.file.bytes}; {again}")
        if hash_file(path) != shard.file.sha256:
            raise DataError(f"{path} is damaged: its sha256 is not the index's; {again}")
        try:
            file: Any = safe_open(path, framework="pt")
            lengths = file.get_tensor("lengths").tolist()
        except (SafetensorError, OSError) as error:
            raise DataError(f"{path} cannot be read ({error}); {again}") from None
        return cls(file, (0, *accumulate(lengths)))

    def embeds(self, number: int) -> Tensor:
        rows: Tensor = self.file.get_slice("embeds")[self.starts[number] : self.starts[number + 1]]
        return rows

    def latents(self, number: int) -> Tensor:
        latents: Tensor = self.file.get_slice("latents")[number : number + 1]
        return latents[0]


@dataclass(frozen=True)
class _Shards:
    """Several as one."""

    opened: tuple[_Opened, ...]
    ends: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ends", tuple(accumulate(len(each.starts) - 1 for each in self.opened)))

    @classmethod
    def of(cls, folder: Path, kind: Kind, shards: Sequence[Shard]) -> _Shards:
        return cls(tuple(_Opened.of(folder / shard_name(kind, i), shard) for i, shard in enumerate(shards)))

    def at(self, number: int) -> tuple[_Opened, int]:
        """The shard that holds this one, and its number there."""
        shard = bisect_right(self.ends, number)
        return self.opened[shard], number - (self.ends[shard - 1] if shard else 0)


class DataFolder:
    """A finished folder, every shard of which was hashed when it was opened."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        """Raises DataError for a folder that is none, unfinished, damaged, or made with another model's encoders."""
        index = read_index(folder)
        if index is None:
            raise DataError(f"{folder} has no {INDEX}; make one with: python -m sfrt_train prepare --data {folder}")
        origin = self.origin = index.origin
        done = [sum(shard.count for shard in shards) for shards in (index.prompts, index.clips)]
        if done != [origin.prompts + 1, origin.clips]:
            raise DataError(f"{folder} is not finished; run the same `prepare` again and it goes on")
        encoders, wanted = origin.encoders, Encoders.of(manifest)
        parts = ["text_encoder", "tokenizer", *(["decoder"] if origin.clips else [])]
        if any(getattr(encoders, part) != getattr(wanted, part) for part in parts):
            raise DataError(
                f"{folder} was prepared with {encoders.model!r}, whose encoders are not those of {wanted.model!r}; "
                f"prepare another folder with the model that is to be trained"
            )
        self.hash = hashlib.sha256((folder / INDEX).read_bytes()).hexdigest()
        self._text_len = manifest.model.text_len
        self._prompts = _Shards.of(folder, "prompts", index.prompts)
        self._clips = _Shards.of(folder, "clips", index.clips)

    def nothing(self) -> Tensor:
        """What a video without a prompt is told, [text_len, D]."""
        return self._padded(*self._prompts.at(0))

    def prompt(self, number: int) -> Tensor:
        """[text_len, D], zeros behind its tokens, float32; numbers are from 0 to origin.prompts - 1."""
        return self._padded(*self._prompts.at(number + 1))

    def clip(self, number: int) -> tuple[Tensor, Tensor]:
        """Its latents [T, C, h, w] and prompt [text_len, D], float32."""
        shard, within = self._clips.at(number)
        return shard.latents(within).float(), self._padded(shard, within)

    def _padded(self, shard: _Opened, number: int) -> Tensor:
        rows = shard.embeds(number).float()
        return F.pad(rows, (0, 0, 0, self._text_len - len(rows)))
