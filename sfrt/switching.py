"""Prompts that change while a stream runs: the text it goes by, the switch to another one, and what that cost.

A switch takes effect where a chunk begins, in one of three ways:

- recache: the clean frames in view, sinks too, are run once more under the new text, so that the chunk finds a past
  that agrees with it. Keys and values that were made under the old text keep calling for it (LongLive, arXiv
  2509.22622, section 3.1). The default: a model that was trained to be prompted once knows no other past.
- cross: only the text's keys and values change. Costs next to nothing.
- blend: the same, by equal steps from the one prompt's embeddings to the other's, over some chunks.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sfrt.errors import ConfigError

How = Literal["recache", "cross", "blend"]


@dataclass(frozen=True, eq=False)
class Text:
    """What a stream goes by: the prompt as it was given, its embeddings [text_len, text_dim], and those now in use.

    The two are the same but for a blend, which has `left` chunks to go.
    """

    prompt: str | Tensor
    goal: Tensor
    embeds: Tensor
    left: int = 0

    @classmethod
    def of(cls, prompt: str | Tensor, embeds: Tensor) -> Text:
        """A prompt in full effect."""
        return cls(prompt, embeds, embeds)

    def onward(self) -> Text:
        """That of the next chunk: a blend goes on by a step."""
        if self.left == 0:
            return self
        if self.left == 1:
            return Text.of(self.prompt, self.goal)
        nearer = torch.lerp(self.embeds.float(), self.goal.float(), 1 / self.left)
        return replace(self, embeds=nearer, left=self.left - 1)


@dataclass(frozen=True)
class Receipt:
    """A prompt switch that took effect, on the first chunk that was made under it.

    prompt is the text, None where embeddings were given; chunk is that chunk's index; over is how many chunks it took
    to be in full effect; ms is the work it made: encoding the text, its keys and values, and the replay of a recache.
    """

    prompt: str | None
    how: How
    over: int
    chunk: int
    ms: float


@dataclass(frozen=True, eq=False)
class Switch:
    """A prompt on its way in, with its embeddings and how long making them took."""

    prompt: str | Tensor
    embeds: Tensor
    how: How = "recache"
    over: int = 1
    encode_ms: float = 0.0

    def onto(self, text: Text) -> Text:
        """The text of the first chunk that it is in effect in, after this one."""
        return Text(self.prompt, self.embeds, text.embeds, self.over).onward()

    def receipt(self, chunk: int, ms: float) -> Receipt:
        """For that chunk, where taking effect took `ms`."""
        said = self.prompt if isinstance(self.prompt, str) else None
        return Receipt(said, self.how, self.over, chunk, self.encode_ms + ms)


def check_switch(how: How, over: int) -> None:
    """Raise ConfigError where there is no such way to switch."""
    if how not in get_args(How):
        raise ConfigError(f"a prompt cannot be switched by {how!r}; choose one of: {', '.join(get_args(How))}")
    if over < 1 or (over > 1 and how != "blend"):
        raise ConfigError(f"a switch over {over} chunks by {how!r} is none; blend over 1 or more, the others take 1")
