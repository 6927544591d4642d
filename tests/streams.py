"""Chunks of a stream: some of them, and whether they are the same."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from sfrt import Chunk, Session


def take(session: Session, chunks: int) -> list[Chunk]:
    return list(itertools.islice(session, chunks))


def same(ours: list[Chunk], theirs: list[Chunk]) -> bool:
    """The very bytes of the same chunks."""
    pairs = list(zip(ours, theirs, strict=True))
    assert [one.index for one, _ in pairs] == [other.index for _, other in pairs]
    return all(torch.equal(a.latents, b.latents) and np.array_equal(a.frames, b.frames) for a, b in pairs)
