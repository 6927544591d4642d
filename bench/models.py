"""A transformer of random weights on any backend, without a bundle around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sfrt.backends import Backend, Grid, Rollout
from sfrt.benchmark.protocol import Case, case_of
from sfrt.benchmark.shapes import Shape, random_weights
from sfrt.device import DTYPES
from sfrt.ring import Ring, chunk_sizes, ring_for
from sfrt.session import Session
from sfrt.stage import Stage, philox_noise
from sfrt.timesteps import timesteps_of
from sfrt_export.parts_on import transformer_on


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
    with transformer_on(backend, shape.model, weights, torch.device(device), DTYPES[dtype], shape.stream) as running:
        yield RandomModel(shape, running, backend, dtype, device)
