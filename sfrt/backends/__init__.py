"""What runs the model: one protocol, several backends, each imported only when chosen.

A backend holds a model's weights on one device. A rollout is one stream's state on it: the ring, the prompt's keys and
values. All sizes are known when a rollout is made, so that nothing is allocated in the loop.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from sfrt.config import ModelConfig, StreamConfig
from sfrt.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from sfrt.capture import Work
    from sfrt.ring import ChunkPlan, ChunkSizes, Ring

BACKENDS = ("torch", "onnx", "tensorrt")
"""onnx may name the provider that runs it: onnx:cpu, onnx:cuda, onnx:tensorrt."""


@dataclass(frozen=True)
class Grid:
    """The patches of one latent frame."""

    rows: int
    columns: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns

    @classmethod
    def of(cls, model: ModelConfig, stream: StreamConfig) -> Grid:
        """The grid of a stream's frames: 8 pixels to a latent, patch_size latents to a token.

        Raises ConfigError where the frames are no whole number of patches.
        """
        _, rows, columns = model.patch_size
        if stream.height % (8 * rows) or stream.width % (8 * columns):
            raise ConfigError(
                f"{stream.width}×{stream.height} is no whole number of this model's patches; "
                f"choose multiples of {8 * columns} and {8 * rows}"
            )
        return cls(stream.height // (8 * rows), stream.width // (8 * columns))


class Rollout(Protocol):
    """One stream on a backend. Tokens are float32 [L, P] on the backend's device.

    What `place`, `set_text` and the passes leave lies where it lay before, so that passes can be captured.
    """

    def set_text(self, embeds: Tensor) -> None:
        """Take a prompt, [text_len, text_dim]; its keys and values are made here, once."""

    def place(self, plan: ChunkPlan) -> None:
        """Move on to the chunk of this plan: where the coming passes write and what they see.

        A plan of frames from 0 on begins the ring anew: what it held is never seen again.
        """

    def launch(self, key: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Run work made of this rollout's passes where it was placed last; see `sfrt.capture.Launcher`."""

    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        """One denoising pass: the flow at each token, [L, P]; the next pass may write over it."""

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        """The refresh pass: leave the keys and values of clean tokens in the ring."""

    def state(self) -> dict[str, Tensor]:
        """What the ring holds, by name; the prompt aside. It is the ring's own memory: read it before the next pass."""

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from such a state of a rollout that was made with the same arguments."""


class Backend(Protocol):
    """A model's weights, ready to run on one device."""

    device: torch.device

    def rollout(self, grid: Grid, ring: Ring, sizes: ChunkSizes, timesteps: tuple[float, ...]) -> Rollout:
        """A fresh stream of chunks of these sizes; timesteps are all that its passes will ask for.

        Raises DeviceError where memory is short.
        """


def require_backend(name: str) -> None:
    """Raise ConfigError unless there is a backend of this name."""
    kind, colon, provider = name.partition(":")
    if kind not in BACKENDS or bool(colon) != bool(provider) or (provider and kind != "onnx"):
        raise ConfigError(f"no backend is called {name!r}; choose one of: {', '.join(BACKENDS)}")
