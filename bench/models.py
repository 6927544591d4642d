"""The models that are measured: the built-in one, and random weights where a shape is all that matters."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.protocol import Case
from sfrt.backends import Backend, Grid, Rollout
from sfrt.config import DecoderConfig, ModelConfig, StreamConfig, TaehvConfig, WanVaeConfig
from sfrt.decoders import LoadedDecoder, load_decoder
from sfrt.decoders.taehv import Taehv
from sfrt.decoders.wan_vae import WanVae
from sfrt.device import DTYPES
from sfrt.ring import Ring, chunk_sizes, ring_for
from sfrt.session import Session, Stage, philox_noise
from sfrt.timesteps import timesteps_of
from sfrt.transformer import Transformer
from sfrt_export.parts_on import transformer_on


@dataclass(frozen=True)
class Shape:
    """A model of random weights, the stream it runs, and the autoencoders of its size by kind."""

    name: str
    model: ModelConfig
    stream: StreamConfig
    decoders: dict[str, DecoderConfig]


CPU256 = Shape(
    name="cpu256",
    model=ModelConfig(dim=256, ffn_dim=1024, num_heads=4, num_layers=8, text_dim=512, text_len=64),
    stream=StreamConfig(height=128, width=128, window=21),
    decoders={
        "wan_vae": WanVaeConfig(dim=24),
        "taehv": TaehvConfig(encoder_width=16, decoder_widths=(64, 32, 16, 16)),
    },
)
"""Small enough for a CPU: 64 tokens a latent frame, 21 frames in chunks of 3, 4 + 1 passes."""

WAN_1_3B = Shape(
    name="full21",
    model=ModelConfig(),
    stream=StreamConfig(),
    decoders={"wan_vae": WanVaeConfig(), "taehv": TaehvConfig()},
)
"""Wan 2.1 1.3B at 480×832, window 21."""

SHAPES = {shape.name: shape for shape in (CPU256, WAN_1_3B)}


class RandomModel:
    """Random weights of a shape on a backend, spread as trained ones are; speed does not depend on them."""

    def __init__(self, shape: Shape, backend: Backend, name: str, dtype: str, device: str) -> None:
        self.shape = shape
        self.backend = backend
        self.device = torch.device(device)
        self.dtype = DTYPES[dtype]
        self._names = (name, dtype, device)
        self.grid = Grid.of(shape.model, shape.stream)
        self.text = torch.randn(shape.model.text_len, shape.model.text_dim, device=self.device)

    def rollout(self, ring: Ring) -> Rollout:
        """Without a prompt yet."""
        stream = self.shape.stream
        return self.backend.rollout(self.grid, ring, chunk_sizes(stream), timesteps_of(stream))

    def full_rollout(self) -> tuple[Rollout, int]:
        """With a prompt and every slot of the ring in view of the next chunk; how many keys that are."""
        ring = ring_for(self.shape.stream)
        rollout = self.rollout(ring)
        rollout.set_text(self.text)
        chunk = self.shape.stream.chunk
        for start in range(0, ring.slots + chunk, chunk):  # what was never written could be slow to compute with
            rollout.place(ring.plan(start, chunk))
            rollout.refresh(self.tokens(), 0.0)
        return rollout, ring.slots * self.grid.tokens

    def session(self, chunks: int) -> Session:
        """A stream without a decoder: what is left is the model's own work."""
        model, stream = self.shape.model, self.shape.stream
        ring = ring_for(stream, chunks * stream.chunk)
        noise = philox_noise(0, self.grid, model, self.device)
        stage = Stage(model, stream, self.grid, self.device, self.rollout(ring), ring, noise, decoder=None)
        return Session(stage, self.text, limit=chunks)

    def run(self, work: Callable[[], object]) -> None:
        """Do some work to its end, on a GPU too."""
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def tokens(self) -> Tensor:
        """Noise of one chunk."""
        count = self.shape.stream.chunk * self.grid.tokens
        return torch.randn(count, self.shape.model.token_dim, device=self.device)

    def case(self) -> Case:
        return case_of(self.shape.name, f"random {self.shape.model}", self.shape.stream, *self._names, decoder=None)


@contextmanager
def random_model(shape: Shape, backend: str, dtype: str, device: str) -> Iterator[RandomModel]:
    """Ready to be measured. Raises ConfigError or DeviceError where this backend does not run so here."""
    torch.manual_seed(0)
    weights = random_weights(shape.model, torch.device(device), DTYPES[dtype])
    with transformer_on(backend, shape.model, weights, torch.device(device), DTYPES[dtype]) as running:
        yield RandomModel(shape, running, backend, dtype, device)


def random_weights(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Transformer tensors: products scaled by fan-in, norms at one."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in Transformer(config).state_dict().items()}
    return {
        name: torch.ones(shape, device=device, dtype=dtype)
        if len(shape) == 1
        else torch.randn(shape, device=device, dtype=dtype) / shape[-1] ** 0.5
        for name, shape in shapes.items()
    }


def random_decoder(config: DecoderConfig, dtype: str, device: str) -> LoadedDecoder:
    """An autoencoder of random weights."""
    torch.manual_seed(0)
    module = Taehv(config) if isinstance(config, TaehvConfig) else WanVae(config)
    return load_decoder(config, module.state_dict(), torch.device(device), DTYPES[dtype])


def case_of(
    name: str, model: str, stream: StreamConfig, backend: str, dtype: str, device: str, decoder: str | None
) -> Case:
    stated = {
        field: getattr(stream, field)
        for field in ("height", "width", "chunk", "window", "sink", "steps", "sampler", "shift")
    }
    return Case(name=name, model=model, backend=backend, dtype=dtype, device=device, decoder=decoder, **stated)
