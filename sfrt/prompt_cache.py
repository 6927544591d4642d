"""Embeddings of prompts on disk, so that a prompt once read needs no text encoder again.

UMT5-XXL is four times as large as the 1.3B model that it reads for, and runs once a prompt. An entry is a safetensors
file of one prompt's real tokens, about 150 kB, named by a hash: what it says cannot be read from the folder's names. An
entry that is damaged, or of another shape, is none.
"""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from sfrt.user_cache import user_folder, write_whole

MOST_BYTES = 256 << 20
"""Some 1700 prompts of UMT5-XXL; the least recently used go first."""

_EMBEDS, _CHECKSUM = "embeds", "sha256"


class PromptCache:
    """Embeddings by prompt, of one reader; where there is no folder, or nothing can be written there, it keeps nothing.

    A reader is a text encoder with its tokenizer, and what it runs on: another one gives other embeddings, if only by
    their rounding, and the cache must never change a video.
    """

    def __init__(self, folder: Path | None, reader: tuple[str, ...], most_bytes: int = MOST_BYTES) -> None:
        """reader says what it is: hashes of its files, its dtype, where it runs."""
        self._folder = folder
        self._reader = reader
        self._most_bytes = most_bytes

    def recall(self, prompt: str, text_len: int, text_dim: int) -> Tensor | None:
        """[L, text_dim] on the CPU, L at most text_len; None where there is no such entry, or none that is whole."""
        if self._folder is None:
            return None
        path = self._path(prompt)
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                embeds: Tensor = file.get_tensor(_EMBEDS)
                promised = (file.metadata() or {}).get(_CHECKSUM)
        except (OSError, safetensors.SafetensorError):
            return None
        fits = embeds.ndim == 2 and embeds.shape[1] == text_dim and 1 <= embeds.shape[0] <= text_len
        if not fits or not embeds.is_floating_point() or _checksum(embeds) != promised:
            return None
        with suppress(OSError):
            os.utime(path)  # used now: the last to go
        return embeds

    def keep(self, prompt: str, embeds: Tensor) -> None:
        """Keep [L, text_dim], without padding, and let the least recently used go where there are too many."""
        if self._folder is None:
            return
        there = embeds.cpu().contiguous()
        content = safetensors.torch.save({_EMBEDS: there}, metadata={_CHECKSUM: _checksum(there)})
        with suppress(OSError):
            write_whole(self._path(prompt), content)
            self._make_room()

    def _path(self, prompt: str) -> Path:
        assert self._folder is not None
        key = hashlib.sha256(json.dumps([*self._reader, prompt]).encode()).hexdigest()
        return self._folder / f"{key}.safetensors"

    def _make_room(self) -> None:
        """Another process may do the same at this moment, so an entry may be gone already."""
        assert self._folder is not None
        entries = []
        for path in self._folder.glob("*.safetensors"):
            with suppress(OSError):
                status = path.stat()
                entries.append((status.st_mtime_ns, status.st_size, path))
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= self._most_bytes:
                break
            path.unlink(missing_ok=True)
            total -= size


def users_prompts(reader: tuple[str, ...]) -> PromptCache:
    """The user's own, in their cache folder."""
    folder = user_folder()
    return PromptCache(None if folder is None else folder / "prompts", reader)


def _checksum(embeds: Tensor) -> str:
    """Of shape, dtype and bytes."""
    digest = hashlib.sha256(f"{embeds.dtype} {list(embeds.shape)} ".encode())
    digest.update(embeds.contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
