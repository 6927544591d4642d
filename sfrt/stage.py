"""What a session runs on: the model's parts, a ring of its own, noise, and where it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sfrt.backends import Grid, Rollout
from sfrt.config import ModelConfig, StreamConfig
from sfrt.decoders import Decoder
from sfrt.delivery import HostOutlet, Outlet
from sfrt.errors import ConfigError, SnapshotError
from sfrt.noise import chunk_noise
from sfrt.ops.choice import Ops, torch_ops
from sfrt.ring import Ring
from sfrt.snapshot import ModelId
from sfrt.source import Source

NoiseSource = Callable[[range, int], Tensor]
"""(absolute latent frames, number of steps) → float32 normals [steps, frames · tokens, token_dim] on the device."""


@dataclass(frozen=True)
class PhiloxNoise:
    """The noise every stream uses unless it is given another: see sfrt.noise. tokens are those of a latent frame."""

    seed: int
    tokens: int
    token_dim: int
    device: torch.device

    def __call__(self, frames: range, steps: int) -> Tensor:
        return chunk_noise(self.seed, frames, range(steps), self.tokens, self.token_dim, self.device)


def philox_noise(seed: int, grid: Grid, model: ModelConfig, device: torch.device) -> NoiseSource:
    """That of a stream of a seed."""
    return PhiloxNoise(seed, grid.tokens, model.token_dim, device)


@dataclass(frozen=True, eq=False)
class Origin:
    """What a session was made of, and what else it may ask its runtime for: a prompt's embeddings, another ring.

    give_back takes the session's own when it is closed.
    """

    model: ModelId
    seed: int
    embeddings: Callable[[str | Tensor], Tensor]
    rollout: Callable[[], Rollout]
    give_back: Callable[[Rollout], None]


@dataclass(frozen=True)
class Stage:
    """Made by the runtime. source and strength are of video to video.

    ops are for what is done between the passes, outlet is where frames are decoded. Without an origin a session
    streams, and that is all: it has no other prompts, no snapshots and no forks.
    """

    model: ModelConfig
    stream: StreamConfig
    grid: Grid
    device: torch.device
    rollout: Rollout
    ring: Ring
    noise: NoiseSource
    decoder: Decoder | None
    source: Source | None = None
    strength: float | None = None
    origin: Origin | None = None
    ops: Ops = field(default_factory=torch_ops)
    outlet: Outlet = field(default_factory=HostOutlet)

    def require_origin(self) -> Origin:
        """The origin. Raises ConfigError where there is none."""
        if self.origin is None:
            raise ConfigError("this session has no runtime to ask; make it with Runtime.session")
        return self.origin

    def require_no_source(self, what: str) -> None:
        """Raise SnapshotError where the stream goes by a source, and so cannot be `what`."""
        if self.source is not None:
            raise SnapshotError(f"a stream that goes by a source cannot be {what}: the source's frames would be gone")
