"""From files to named tensors, mapped and never run: safetensors and torch files, shards, model folders."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sfrt.errors import CheckpointError
from sfrt.weights import few

_WEIGHTS = ("*.safetensors", "*.pt", "*.pth", "*.bin")


@dataclass(frozen=True)
class Source:
    """What a checkpoint holds, as found: `data` may still be nested. config is the config.json beside it, if any."""

    path: Path
    files: tuple[Path, ...]
    data: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)


def read_source(path: Path, subfolder: str) -> Source:
    """Open a file, a folder of shards, or a model folder that keeps this part in `subfolder` (as diffusers does).

    Tensors are mapped: their pages are read when they are used. Raises CheckpointError for what cannot be read, and for
    a pickle that wants to run code.
    """
    if path.is_file():
        return Source(path, (path,), _read_file(path), _config_of(path.parent))
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give the path of a checkpoint file or of a model folder")
    folder = path / subfolder if (path / subfolder).is_dir() else path
    files = _weight_files(folder)
    data: dict[str, Any] = {}
    for file in files:
        for name, value in _read_file(file).items():
            if name in data:
                raise CheckpointError(
                    f"{folder} holds {name} in more than one file; give the path of one checkpoint file"
                )
            data[name] = value
    return Source(path, files, data, _config_of(folder))


def _config_of(folder: Path) -> Mapping[str, Any]:
    path = folder / "config.json"
    return read_json(path) if path.is_file() else {}


def _weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that an index lists, else all of the first kind found."""
    indexes = sorted(folder.glob("*.index.json"))
    if len(indexes) > 1:
        raise CheckpointError(
            f"{folder} has an index for each of several variants ({few(index.name for index in indexes)}); "
            "keep the one you mean in the folder"
        )
    if indexes:
        listed = read_json(indexes[0]).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise CheckpointError(f"{indexes[0]} lists no files (weight_map); download the folder again")
        # Only names inside the folder: an index must not lead elsewhere.
        return tuple(folder / Path(str(name)).name for name in sorted(set(listed.values())))
    for pattern in _WEIGHTS:
        files = tuple(sorted(folder.glob(pattern)))
        if files:
            return files
    raise CheckpointError(f"{folder} has no weights ({', '.join(_WEIGHTS)}); give the checkpoint file itself")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError where there is none."""
    try:
        data = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} is not a JSON object; download it again")
    return data


def _read_file(path: Path) -> Mapping[str, Any]:
    """Told apart by content: published files are not always named after their format."""
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}); check the path, or download it again"
        ) from None
    if not head:
        raise CheckpointError(f"{path} is empty; download it again")
    if head.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a Git LFS pointer, not the file it stands for; fetch that with: git lfs pull")
    if head[8:9] == b"{":
        return _read_safetensors(path)
    if head.startswith(b"PK"):
        if not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path} is truncated: a torch file without its end; download it again")
        return _read_torch(path, mapped=True)
    if head.startswith(b"\x80"):
        return _read_torch(path, mapped=False)  # the format before torch 1.6, which cannot be mapped
    raise CheckpointError(f"{path} is not a checkpoint: neither a safetensors nor a torch file")


def _read_safetensors(path: Path) -> dict[str, Any]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or damaged ({error}); download it again") from None


def _read_torch(path: Path, mapped: bool) -> Mapping[str, Any]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # remarks on old formats, which are read all the same
            data = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        if named is None:
            raise CheckpointError(
                f"{path} is damaged, or a pickle that cannot be read without running what is in it, "
                "which was not done; use a file that torch.save wrote of tensors only"
            ) from None
        raise CheckpointError(
            f"{path} wants to run code when it is read ({named[1]}), which was not done; "
            "use a file that holds tensors only, from a source you trust"
        ) from None
    except Exception as error:  # torch.load raises almost anything on damaged input
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} is truncated or no torch checkpoint ({reason}); download it again") from None
    if not isinstance(data, Mapping):
        raise CheckpointError(f"{path} holds a {type(data).__name__}, not named tensors; it is not a checkpoint")
    return data
