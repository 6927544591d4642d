"""What Self Forcing is made from: the first weights of its networks, prompts, clips and an autoencoder.

The recipe of the built-in model makes all of it up (here); fine-tuning reads it from bundles and a folder of data
(sfrt_train.finetune).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from sfrt.text import Tokenizer
from sfrt_train import autoencoder, pairs
from sfrt_train.clips import Clips, Prompts, Told, draw_prompts, make_clips
from sfrt_train.data import split_scenes
from sfrt_train.judging import Pool
from sfrt_train.model import PromptedTransformer, VideoModel, fresh_model, trained_model
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer

JUDGE = "judge"


class Coder(Protocol):
    """An autoencoder, as far as rollouts are begun anew: see sfrt.decoders.Decoder."""

    def decode(self, latents: Tensor, state: Any) -> tuple[Tensor, Any]: ...

    def encode(self, pixels: Tensor, state: Any = None) -> tuple[Tensor, Any]: ...


class Material(Protocol):
    """Each is asked for once, but for prompts. Weights lie on the device; what is trained is float32."""

    def generator(self) -> PromptedTransformer: ...

    def judge(self) -> PromptedTransformer:
        """The real score, frozen."""

    def critic(self) -> PromptedTransformer | None:
        """What the critic starts as; None is a copy of the judge."""

    def coder(self) -> Coder:
        """Asked for only where rollouts go on beyond the judged length."""

    def prompts(self, rng: np.random.Generator, count: int, chunks: int) -> Told:
        """Those of `count` rollouts of so many chunks; some change where a chunk begins. On any device."""

    def clips(self, late: bool) -> Pool:
        """Real ones, for the GAN; late ones begin in the middle of something."""


class MadeUp:
    """The recipe's own: made-up scenes, and weights that its earlier stages left in the folder."""

    def __init__(self, settings: Settings, folder: Path, device: str) -> None:
        self._settings, self._folder, self._device = settings, folder, device
        self._tokenizer = Tokenizer(make_tokenizer(settings, folder), settings.transformer.text_len)
        self._scenes, _ = split_scenes(settings.held_out, settings.seed)

    def generator(self) -> VideoModel:
        return fresh_model(self._settings, self._folder, pairs.NAME, self._device)

    def judge(self) -> VideoModel:
        return trained_model(self._settings, self._folder, JUDGE, self._device)

    def critic(self) -> None:
        return None

    def coder(self) -> Coder:
        return autoencoder.load(self._settings, self._folder, self._device)

    def prompts(self, rng: np.random.Generator, count: int, chunks: int) -> Prompts:
        share = self._settings.self_forcing.switch_share
        return draw_prompts(rng, self._scenes, self._tokenizer, count, chunks, share)

    def clips(self, late: bool) -> Clips:
        return make_clips(self._settings, self._folder, self._device, late=late)
