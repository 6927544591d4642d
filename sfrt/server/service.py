"""What all connections share: the engine, the model's facts, the limits, the places and who holds one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from sfrt.engine import Engine
from sfrt.errors import BundleError
from sfrt.runtime import Runtime
from sfrt.server.access import Access
from sfrt.server.limits import Limits
from sfrt.server.protocol import Bounds, Closing, Model
from sfrt.server.recordings import Recordings
from sfrt.server.snapshots import Snapshots
from sfrt.server.telemetry import Telemetry
from sfrt.timesteps import steps_of

_PATIENCE_S = 1.0
"""A viewer that reloads the page comes back before its old connection has been tidied up."""


class Farewell(Exception):
    """The connection is to be closed, and this is why."""

    def __init__(self, why: Closing, message: str) -> None:
        super().__init__(message)
        self.why: Closing = why


class Viewer(Protocol):
    """A connection that holds a place."""

    async def dismiss(self, farewell: Farewell) -> None:
        """Say goodbye and be gone; returns when that is done."""


class Peers(Protocol):
    """The servers behind one address, the one that asks among them."""

    async def figures(self) -> bytes:
        """What all of them count, in Prometheus' text format."""

    async def recording(self, name: str) -> bytes | None:
        """A recording that any of them keeps; None where there is none of this name."""


@dataclass
class Service:
    """Everything but the web around it. Made on one event loop's thread and used from it."""

    runtime: Runtime
    engine: Engine
    limits: Limits
    access: Access
    recordings: Recordings
    telemetry: Telemetry = field(default_factory=Telemetry)
    viewers: set[Viewer] = field(default_factory=set)
    stopping: bool = False

    def __post_init__(self) -> None:
        self.model = model_of(self.runtime)
        limits = self.limits
        self.snapshots = Snapshots(self.recordings.folder, limits)
        self.bounds = Bounds(
            prompt_characters=limits.prompt_characters,
            picture_bytes=limits.picture_bytes,
            idle_s=limits.idle_s,
            longest_s=limits.longest_s,
            record_s=limits.record_s if limits.recordings else 0.0,
            rewind_chunks=limits.rewind_chunks,
            clip_bytes=limits.clip_bytes,
            snapshots=limits.snapshots,
        )
        self.telemetry.places.set(limits.sessions)
        self.telemetry.free_places.set_function(lambda: self.free_places)
        self.telemetry.viewers.set_function(lambda: len(self.viewers))
        self.telemetry.load.set_function(lambda: self.engine.stats().load)
        self.telemetry.waiting.set_function(lambda: sum(stream.queued for stream in self.engine.stats().streams))
        self.telemetry.period.set(self.model.chunk_frames / self.model.fps)

    @property
    def free_places(self) -> int:
        """How many more viewers would be let in now."""
        return 0 if self.stopping else self.limits.sessions - len(self.viewers)

    @asynccontextmanager
    async def place(self, viewer: Viewer) -> AsyncIterator[None]:
        """One of the places for a while. Raises Farewell where there is none."""
        patience = time.monotonic() + _PATIENCE_S
        while len(self.viewers) >= self.limits.sessions and time.monotonic() < patience:
            await asyncio.sleep(_PATIENCE_S / 20)
        if self.stopping:
            raise Farewell("shutdown", "the server is shutting down; come back later")
        if len(self.viewers) >= self.limits.sessions:
            raise Farewell(
                "full", f"all {self.limits.sessions} places of this server are taken; try again when one has been left"
            )
        self.viewers.add(viewer)
        try:
            yield
        finally:
            self.viewers.discard(viewer)

    async def goodbye(self) -> None:
        """Take no more viewers, and let those that are there go in good order."""
        self.stopping = True
        farewell = Farewell("shutdown", "the server is shutting down; what was recorded is kept until then")
        await asyncio.gather(*(viewer.dismiss(farewell) for viewer in tuple(self.viewers)), return_exceptions=True)
        await asyncio.to_thread(self.snapshots.clear)


def model_of(runtime: Runtime) -> Model:
    """The facts of a model. Raises BundleError where it has no decoder, and so nothing to show."""
    manifest, stream = runtime.manifest, runtime.stream
    if manifest.decoder is None:
        raise BundleError(
            f"the model {manifest.name!r} has no decoder to see pixels with; export it again with --taehv or --vae"
        )
    return Model(
        name=manifest.name,
        device=str(runtime.device),
        backend=runtime.backend,
        width=stream.width,
        height=stream.height,
        fps=stream.fps,
        chunk=stream.chunk,
        chunk_frames=4 * stream.chunk,
        window=stream.window or 0,
        sink=stream.sink,
        sigmas=tuple(step.sigma for step in steps_of(stream)),
        first_sigmas=tuple(step.sigma for step in steps_of(stream, first_chunk=True)),
    )


def device_bytes(runtime: Runtime) -> int | None:
    """Memory that torch holds on the device; None on a CPU, where it is the process's."""
    if runtime.device.type != "cuda":
        return None
    import torch

    return torch.cuda.memory_allocated(runtime.device)
