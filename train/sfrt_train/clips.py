"""The pool of clips the flow model is trained on, encoded once: latents in token layout and the prompts' tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from sfrt.decoders.taehv import Taehv
from sfrt.ops.layout import tokens_from_latents
from sfrt.text import Tokenizer
from sfrt_train import autoencoder
from sfrt_train.data import Clip, make_clip, split_scenes
from sfrt_train.loop import save
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer

FILE = "clips.pt"
_AT_ONCE = 16


@dataclass(frozen=True)
class Clips:
    """N clips of G chunks of L tokens.

    Latents [N, G, L, P], the ids of both prompts [N, 2, S] (0: padding), and which of the two a chunk follows [N, G].
    """

    tokens: Tensor
    ids: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, index: Tensor, length: int, device: str) -> Clips:
        """The first `length` chunks of some clips, in float32."""
        tokens, prompt = self.tokens[index, :length].float(), self.prompt[index, :length]
        return Clips(tokens.to(device), self.ids[index].to(device), prompt.to(device))


def make_clips(settings: Settings, folder: Path, device: str) -> Clips:
    """The pool, from the folder where it was made before."""
    path = folder / FILE
    if path.exists():
        return Clips(**torch.load(path, weights_only=True))
    model = autoencoder.load(settings, folder, device)
    tokenizer = Tokenizer(make_tokenizer(settings, folder), settings.transformer.text_len)
    scenes, _ = split_scenes(settings.held_out, settings.seed)
    own, parts = settings.flow, []
    for start in tqdm(range(0, own.clips, _AT_ONCE), desc="clips", unit=f"{_AT_ONCE} clips", mininterval=5):
        made = [
            make_clip(
                np.random.default_rng((settings.seed, 4, i)),
                scenes,
                own.chunks,
                settings.stream.chunk,
                own.switch_share,
            )
            for i in range(start, min(start + _AT_ONCE, own.clips))
        ]
        parts.append(encode(made, model, tokenizer, settings, device))
    clips = Clips(*(torch.cat(part) for part in zip(*((p.tokens, p.ids, p.prompt) for p in parts), strict=True)))
    save(path, {"tokens": clips.tokens, "ids": clips.ids, "prompt": clips.prompt})
    return clips


@torch.no_grad()
def encode(made: list[Clip], model: Taehv, tokenizer: Tokenizer, settings: Settings, device: str) -> Clips:
    """Clips as the flow model sees them; latents are kept in half precision."""
    pixels = torch.stack([clip.pixels for clip in made]).to(device)
    with torch.autocast(pixels.device.type, torch.bfloat16):
        latents = model.encode(pixels).float()
    tokens = tokens_from_latents(latents.flatten(0, 1), settings.transformer)
    tokens = tokens.unflatten(0, (len(made), settings.flow.chunks, -1)).half().cpu()
    ids = torch.stack([torch.stack([_ids(clip.prompts[end], tokenizer) for end in (0, -1)]) for clip in made])
    prompt = torch.tensor([[int(scene != clip.scenes[0]) for scene in clip.scenes] for clip in made])
    return Clips(tokens, ids, prompt)


def _ids(prompt: str, tokenizer: Tokenizer) -> Tensor:
    ids = torch.tensor(tokenizer.encode(prompt))
    return F.pad(ids, (0, tokenizer.text_len - len(ids)))
