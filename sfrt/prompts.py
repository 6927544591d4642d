"""A runtime's prompts as embeddings: kept at hand, on disk, or read by a text encoder that lies where it is told to.

A text encoder runs once a prompt. UMT5-XXL takes 10.6 GiB, four times what the 1.3B model takes that it reads for, and
half of that in eight bits (`sfrt export --quantize-text`), so where it stays is a choice:

- resident: on the model's device once it was needed. A new prompt takes milliseconds.
- on-demand: loaded there for each new prompt and let go again. Seconds each, and nothing in between.
- cpu: in main memory, mapped from its file, so that the system may take its pages back. A second or so each.
- auto: resident where it is no larger than the model, as a small model's own is; else cpu.

A prompt that was read before on this machine needs none of that: its embeddings are on disk (`sfrt.prompt_cache`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from typing import get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from sfrt import __version__
from sfrt.bundle import Manifest
from sfrt.bundle.manifest import TOKENIZER
from sfrt.config import Placement
from sfrt.errors import ConfigError
from sfrt.prompt_cache import PromptCache, users_prompts
from sfrt.text import TextEncoder, clean_prompt

_KEPT = 16
"""Switching back and forth between a few prompts in a live stream costs nothing."""
_TEXT_ENCODER = "text_encoder.safetensors"


class Prompts:
    """Reads prompts for one model on one device. The text encoder is loaded when the first new one comes."""

    def __init__(
        self,
        manifest: Manifest,
        device: torch.device,
        placement: Placement,
        load: Callable[[torch.device], TextEncoder],
        cache: PromptCache,
    ) -> None:
        """load makes the text encoder on a device, and says what is wrong where there is none."""
        self.placement = _placed(placement, manifest)
        self._model = manifest.model
        self._device = device
        self._load = load
        self._cache = cache
        self._encoder: TextEncoder | None = None
        self._latest: OrderedDict[str, Tensor] = OrderedDict()

    def encode(self, prompt: str) -> Tensor:
        """[text_len, text_dim] on the model's device: real tokens first, zeros after. Not to be written to.

        Raises PromptError when the prompt is empty or not text; what loading raises where it takes that.
        """
        text = clean_prompt(prompt)
        if text not in self._latest:
            embeds = self._cache.recall(text, self._model.text_len, self._model.text_dim)
            if embeds is None:
                embeds = self._read(prompt)
                self._cache.keep(text, embeds)
            padding = self._model.text_len - len(embeds)
            self._latest[text] = F.pad(embeds.to(self._device), (0, 0, 0, padding))
            if len(self._latest) > _KEPT:
                self._latest.popitem(last=False)
        self._latest.move_to_end(text)
        return self._latest[text]

    def _read(self, prompt: str) -> Tensor:
        """[L, text_dim] by the text encoder, which is let go again where it is not to stay."""
        encoder = self._encoder or self._load(self._reads_on)
        embeds = encoder.read(prompt)
        if self.placement != "on-demand":
            self._encoder = encoder
        elif self._device.type == "cuda":
            del encoder
            with suppress(RuntimeError):  # a stream's thread may be capturing, and torch then lets nothing go
                torch.cuda.empty_cache()  # what it would keep for itself is as much again as the model
        return embeds

    @property
    def _reads_on(self) -> torch.device:
        return torch.device("cpu") if self.placement == "cpu" else self._device


def cache_for(manifest: Manifest, backend: str, device: torch.device, placement: Placement) -> PromptCache:
    """The user's prompts as this model's text encoder reads them there; one that keeps nothing where there is none.

    The hash of the text encoder's file stands for its dtype too. Backend and kind of device are part of the reader,
    because what is read elsewhere is the same up to rounding only.
    """
    if _TEXT_ENCODER not in manifest.files:
        return PromptCache(None, ())
    where = "cpu" if _placed(placement, manifest) == "cpu" else device.type
    hashes = (manifest.files[_TEXT_ENCODER].sha256, manifest.files[TOKENIZER].sha256)
    return users_prompts((*hashes, backend, where, __version__))


def _placed(placement: Placement, manifest: Manifest) -> Placement:
    """What auto means. Raises ConfigError where there is no such place."""
    if placement not in get_args(Placement):
        raise ConfigError(f"no text encoder stays at {placement!r}; choose one of: {', '.join(get_args(Placement))}")
    if placement != "auto" or _TEXT_ENCODER not in manifest.files:
        return placement
    sizes = {name: info.bytes for name, info in manifest.files.items()}
    return "resident" if sizes[_TEXT_ENCODER] <= sizes["transformer.safetensors"] else "cpu"
