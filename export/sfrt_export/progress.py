"""What long work tells of itself: stages, and how far each has come."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from sfrt.bundle import Part
from sfrt.bundle.writer import BundleWriter, LazyTensor


class Progress(Protocol):
    """Told of a stage ("hash", "gate", "text gate" or a part's name), the bytes of it that are done and all its bytes.

    The gates of quantisation count measurements instead, and the stage "kernels" counts those.
    """

    def __call__(self, stage: str, done: int, total: int, /) -> None: ...


def silent(stage: str, done: int, total: int, /) -> None:
    """No progress shown."""


def counter(stage: str, total: int, progress: Progress) -> Callable[[int], None]:
    """Turns counts of bytes into a running sum. Headers are not counted, so the sum is held to the total."""
    done = 0

    def count(more: int) -> None:
        nonlocal done
        done = min(done + more, total)
        progress(stage, done, total)

    return count


def write_part(writer: BundleWriter, part: Part, tensors: Mapping[str, LazyTensor], progress: Progress) -> None:
    """Write a part's tensors."""
    writer.add_tensors(part, tensors, counter(part, sum(tensor.nbytes for tensor in tensors.values()), progress))
