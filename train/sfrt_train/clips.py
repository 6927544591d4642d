"""The pools of clips that flow matching learns from, encoded once: latents in token layout and the prompts' tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sfrt.decoders.taehv import Taehv
from sfrt.ops.layout import tokens_from_latents
from sfrt.text import Tokenizer, Umt5Encoder
from sfrt_train import autoencoder
from sfrt_train.data import Clip, Scene, make_clip, say, split_scenes, switched_scene
from sfrt_train.loop import save
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer

_AT_ONCE = 16
_LATEST = 8
"""Chunks that may have passed before a late clip begins: a lap on the torus, or round the circle."""


class Told(Protocol):
    """What B videos are told: two prompts each, and which of the two each of their chunks follows, [B, G]."""

    @property
    def chunks(self) -> Tensor: ...

    def last(self, count: int) -> Told:
        """The same of the last chunks."""

    def unprompted(self) -> Told:
        """No prompt for the same videos: the other half of classifier-free guidance."""

    def to(self, device: str) -> Told: ...

    def embeds(self, encoder: Umt5Encoder | None) -> Tensor:
        """The two prompts' embeddings [B, 2, S, text_dim]; the encoder reads what is not embedded yet."""


@dataclass(frozen=True)
class Prompts:
    """The ids of B videos' two prompts [B, 2, S] (0: padding), and which of the two each chunk follows [B, G]."""

    ids: Tensor
    chunks: Tensor

    def unprompted(self) -> Prompts:
        """Ids that are all padding, as the judge learned it."""
        return Prompts(torch.zeros_like(self.ids), self.chunks)

    def embeds(self, encoder: Umt5Encoder | None) -> Tensor:
        assert encoder is not None, "ids are read by a text encoder"
        flat = self.ids.flatten(0, 1)
        embeds: Tensor = encoder(flat, flat != 0).unflatten(0, self.ids.shape[:2])
        return embeds

    def last(self, count: int) -> Prompts:
        """Those of the last chunks."""
        return Prompts(self.ids, self.chunks[:, -count:])

    def to(self, device: str) -> Prompts:
        return Prompts(self.ids.to(device), self.chunks.to(device))


@dataclass(frozen=True)
class Clips:
    """N clips of G chunks of L tokens: latents [N, G, L, P] and the prompts."""

    tokens: Tensor
    prompts: Prompts

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, index: Tensor, length: int, device: str) -> Clips:
        """The first `length` chunks of some clips, in float32."""
        tokens = self.tokens[index, :length].float()
        prompts = Prompts(self.prompts.ids[index], self.prompts.chunks[index, :length])
        return Clips(tokens.to(device), prompts.to(device))


def make_clips(settings: Settings, folder: Path, device: str, *, late: bool = False) -> Clips:
    """The pool, from the folder where it was made before; late clips begin in the middle of a longer one."""
    path = folder / ("late_clips.pt" if late else "clips.pt")
    if path.exists():
        stored = torch.load(path, weights_only=True)
        return Clips(stored["tokens"], Prompts(stored["ids"], stored["prompt"]))
    own = settings.clips
    model = autoencoder.load(settings, folder, device)
    tokenizer = Tokenizer(make_tokenizer(settings, folder), settings.transformer.text_len)
    scenes, _ = split_scenes(settings.held_out, settings.seed)

    def clip(number: int) -> Clip:
        rng = np.random.default_rng((settings.seed, 8 if late else 4, number))
        skip = 4 * settings.stream.chunk * int(rng.integers(1, _LATEST + 1)) if late else 0
        return make_clip(rng, scenes, own.chunks, settings.stream.chunk, own.switch_share, skip=skip)

    parts, count = [], own.late_clips if late else own.clips
    for start in tqdm(range(0, count, _AT_ONCE), desc=path.stem, unit=f"{_AT_ONCE} clips", mininterval=5):
        made = [clip(number) for number in range(start, min(start + _AT_ONCE, count))]
        parts.append(encode(made, model, tokenizer, settings, device))
    tokens, ids, prompt = (
        torch.cat(part) for part in zip(*((p.tokens, p.prompts.ids, p.prompts.chunks) for p in parts), strict=True)
    )
    save(path, {"tokens": tokens, "ids": ids, "prompt": prompt})
    return Clips(tokens, Prompts(ids, prompt))


@torch.no_grad()
def encode(made: list[Clip], model: Taehv, tokenizer: Tokenizer, settings: Settings, device: str) -> Clips:
    """Clips as the flow model sees them; latents are kept in half precision."""
    pixels = torch.stack([clip.pixels for clip in made]).to(device)
    with torch.autocast(pixels.device.type, torch.bfloat16):
        latents = model.encode(pixels)[0].float()
    tokens = tokens_from_latents(latents.flatten(0, 1), settings.transformer)
    tokens = tokens.unflatten(0, (len(made), settings.clips.chunks, -1)).half().cpu()
    ids = torch.stack([both_ids(clip.prompts[0], clip.prompts[-1], tokenizer) for clip in made])
    prompt = torch.tensor([[int(scene != clip.scenes[0]) for scene in clip.scenes] for clip in made])
    return Clips(tokens, Prompts(ids, prompt))


def draw_prompts(
    rng: np.random.Generator, scenes: list[Scene], tokenizer: Tokenizer, count: int, chunks: int, switch_share: float
) -> Prompts:
    """Prompts for rollouts: no video is needed. A switch_share of them change where one of the later chunks begins."""
    ids, which = [], torch.zeros(count, chunks, dtype=torch.int64)
    for number in range(count):
        first = second = scenes[int(rng.integers(len(scenes)))]
        if rng.random() < switch_share:
            second = switched_scene(first, scenes, rng)
            which[number, int(rng.integers(1, chunks)) :] = 1
        ids.append(both_ids(say(first, rng), say(second, rng), tokenizer))
    return Prompts(torch.stack(ids), which)


def both_ids(first: str, second: str, tokenizer: Tokenizer) -> Tensor:
    """[2, S]"""
    both = [torch.tensor(tokenizer.encode(prompt)) for prompt in (first, second)]
    return torch.stack([F.pad(ids, (0, tokenizer.text_len - len(ids))) for ids in both])
