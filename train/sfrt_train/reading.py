"""Teaches the text encoder to read before it meets a picture, as UMT5 was before it met Wan.

From every prompt's mean embedding, four linear heads tell the colour, the shape, the motion and the background. Learned
from the pictures' loss alone, the encoder stays a bag of words for a long time, to which "a red circle on blue" is "a
blue circle on red": a wrong guess there costs little more than no guess.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfrt.text import Tokenizer, Umt5Encoder
from sfrt_train.data import COLOURS, MOTIONS, SHAPES, Scene, say, split_scenes
from sfrt_train.loop import Descent, Loop, LoopSettings, Losses, Trainee, weights_of
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer

NAME = "reading"
PARTS: dict[str, tuple[str, ...]] = {
    "colour": tuple(COLOURS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "background": tuple(COLOURS),
}


class Reader(nn.Module):
    """The text encoder with one linear head for each part of a scene."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.text_encoder = Umt5Encoder(settings.text)
        self.heads = nn.ModuleDict({part: nn.Linear(settings.text.dim, len(names)) for part, names in PARTS.items()})

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Logits [B, names] of each part from ids and mask [B, L]."""
        embeds = self.text_encoder(ids, mask)
        mean = embeds.sum(1) / mask.sum(1, keepdim=True)
        return {part: head(mean) for part, head in self.heads.items()}


def train(settings: Settings, folder: Path, device: str, until: int | None = None) -> None:
    """Train to the end, or to step `until`, going on from the checkpoint in `folder`."""
    own = settings.reading
    tokenizer = Tokenizer(make_tokenizer(settings, folder), settings.transformer.text_len)
    scenes, _ = split_scenes(settings.held_out, settings.seed)
    torch.manual_seed(settings.seed)
    model = Reader(settings).to(device)

    def losses_of(step: int) -> Losses:
        rng = np.random.default_rng((settings.seed, 7, step))
        batch = [scenes[i] for i in rng.integers(len(scenes), size=own.batch)]
        ids, mask = tokenizer.batch([say(scene, rng) for scene in batch])
        return losses(model(ids.to(device), mask.to(device)), batch)

    Loop(Trainee(model, Descent(own.learning_rate)), LoopSettings(own.steps, own.warmup), folder, NAME).descend(
        losses_of, until
    )


def losses(logits: dict[str, Tensor], scenes: list[Scene]) -> Losses:
    """Cross entropies of the four parts."""
    each = {}
    for part, names in PARTS.items():
        wanted = torch.tensor([names.index(getattr(scene, part)) for scene in scenes])
        each[part] = F.cross_entropy(logits[part], wanted.to(logits[part].device))
    return {"loss": torch.stack(list(each.values())).sum(), **each}


def weights(folder: Path) -> dict[str, Tensor]:
    """The text encoder's weights as trained so far."""
    prefix = "text_encoder."
    return {k.removeprefix(prefix): v for k, v in weights_of(folder, NAME).items() if k.startswith(prefix)}
