"""What a client asked to see, made ready: a start from a prompt, a picture, a clip or a camera, or from a snapshot."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from sfrt.engine import Stream
from sfrt.errors import ConfigError
from sfrt.ring import chunk_sizes
from sfrt.server.footage import Footage, play
from sfrt.server.pictures import pixels_of
from sfrt.server.protocol import Restore, Start
from sfrt.server.service import Service
from sfrt.server.uploads import Uploads
from sfrt.session import Session
from sfrt.snapshot import read_snapshot
from sfrt.video import stream_frames

_STRENGTHS = 20
"""As many as are told apart: what a stream costs is measured once for each."""


@dataclass(frozen=True)
class Beginning:
    """Everything that can be refused has been, but for room on the device.

    open: the stream; footage: what it goes by; camera: whether the client sends that; first: its first chunk's index.
    """

    prompt: str
    seed: int
    open: Callable[[], Awaitable[Stream[Session]]]
    footage: Footage | None = None
    camera: bool = False
    first: int = 0


def beginning_of(message: Start | Restore, service: Service, uploads: Uploads) -> Beginning:
    """Reads files, so an event loop calls it in a thread. Raises SfrtError."""
    if isinstance(message, Restore):
        return _restored(message.name, service)
    if message.source != "none":
        return _by_a_source(message, service, uploads)
    model, history = service.model, service.limits.history
    initial = pixels_of(uploads.picture(), height=model.height, width=model.width) if message.picture else None
    return Beginning(message.prompt, message.seed, _opening(message, service, initial=initial, history=history))


def _opening(message: Start, service: Service, **settings: Any) -> Callable[[], Awaitable[Stream[Session]]]:
    return partial(service.engine.open_async, message.prompt, queue=service.limits.ahead, seed=message.seed, **settings)


def _by_a_source(message: Start, service: Service, uploads: Uploads) -> Beginning:
    """Without a history: a source's frames cannot be had again."""
    if message.picture:
        raise ConfigError("a picture and a source both say what the stream starts from; give one of them")
    if not 0 < message.strength <= 1:
        raise ConfigError(f"strength is {message.strength}; it must be above 0 and at most 1")
    strength = max(1, round(message.strength * _STRENGTHS)) / _STRENGTHS
    first, later = (4 * frames for frames in (chunk_sizes(service.runtime.stream).first, service.model.chunk))
    footage = Footage(first - 3, later)
    open_stream = _opening(message, service, source=footage, strength=strength, ready=footage.ready)
    if message.source == "camera":
        return Beginning(message.prompt, message.seed, open_stream, footage, camera=True)
    model = service.model
    frames = stream_frames(uploads.clip(), height=model.height, width=model.width, fps=model.fps, foreign=True)

    async def open_and_play() -> Stream[Session]:
        stream = await open_stream()
        play(frames, footage, stream.wake)
        return stream

    return Beginning(message.prompt, message.seed, open_and_play, footage)


def _restored(name: str, service: Service) -> Beginning:
    kept, limits = service.snapshots.find(name), service.limits
    read_snapshot(kept.path, torch.device("cpu"))  # a damaged one is refused before what plays is ended
    make = partial(service.runtime.restore, kept.path, history=limits.history)
    open_stream = partial(service.engine.host_async, make, history=limits.history, queue=limits.ahead)
    return Beginning(kept.prompt, kept.seed, open_stream, first=kept.chunk)
