"""A bundle's stream played on no device: every launch of a Triton kernel that it makes, and nothing computed.

The real session, transformer and decoder run over tensors of the "meta" device, which have shapes, strides and dtypes
but no values. What they ask of a kernel is planned and written down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.backends.loading import workloads_of
from sfrt.backends.memory import FRAMES_WITHOUT_WINDOW
from sfrt.backends.torch import TorchBackend
from sfrt.bundle import Manifest
from sfrt.bundle.manifest import DTypeName, dtype_beside
from sfrt.config import DecoderConfig, TaehvConfig
from sfrt.decoders import Decoder, load_decoder
from sfrt.decoders.taehv import Taehv
from sfrt.decoders.wan_vae import WanVae
from sfrt.delivery import Wait
from sfrt.device import DTYPES
from sfrt.ops.catalogue import OPS
from sfrt.ops.choice import Ops
from sfrt.ops.op import Draw, Op
from sfrt.ops.quantized_linear import place_quantized
from sfrt.ops.triton_kernels.launch import Launch, Launches
from sfrt.ring import chunk_sizes, ring_for
from sfrt.session import Session
from sfrt.stage import Stage, philox_noise
from sfrt.timesteps import timesteps_of
from sfrt.transformer import Transformer

P = ParamSpec("P")
R = TypeVar("R")

_NOWHERE = torch.device("meta")
_UNCHANGED = 2
"""Chunks behind a full ring that are played, as all later ones are like them."""


class Score(Ops):
    """Runs each op as its Triton kernel, or as its reference where it has none; keeps the launches, and makes none."""

    def __init__(self) -> None:
        super().__init__(_NOWHERE, pins={})
        self.launches: list[Launch] = []

    def __call__(self, op: Op[P, R]) -> Callable[P, R]:
        if "triton" not in op.kernels:
            return op.reference
        kernel = cast("Launches[P, R]", op.kernel("triton"))

        def written_down(*args: P.args, **kwargs: P.kwargs) -> R:
            op.check(*args, **kwargs)
            launches, result = kernel.plan(*args, **kwargs)
            self.launches += launches
            return result

        return written_down


class _NoHost:
    """An outlet whose frames are of the right shape when they arrive."""

    beside = True

    def behind(self, *given: Tensor) -> AbstractContextManager[object]:
        return nullcontext()

    def to_host(self, frames: Tensor) -> tuple[Tensor, Wait]:
        return torch.empty(frames.shape, dtype=frames.dtype), lambda: None


def launches_of(manifest: Manifest, dtype: DTypeName = "bfloat16") -> list[Launch]:
    """What a GPU is given by the torch backend, over a bundle's own stream, of any length, from noise and a prompt."""
    manifest, score = _shortened(manifest), Score()
    backend = TorchBackend(manifest.model, _weights(manifest), _NOWHERE, DTYPES[dtype], manifest.quantization, score)
    decoder = None if manifest.decoder is None else _decoder(manifest.decoder.config, dtype, score)
    _play(manifest, backend, decoder, score, 1, lambda frame: None)  # the first frame, decoded by itself
    for limit in _limits(manifest):
        _play(manifest, backend, decoder, score, limit)
    for name, make in workloads_of(manifest).items():  # what is measured when the model is opened
        op = next(op for op in OPS if op.name == name)
        score(op)(**make(Draw(DTYPES[dtype], _NOWHERE)))
    return score.launches


def _shortened(manifest: Manifest) -> Manifest:
    """Of blocks that are quantised alike, the first two: the second's keys begin where the first's end."""
    layers = {} if manifest.quantization is None else manifest.quantization.layers
    kept: list[dict[str, float]] = []
    for number in range(manifest.model.num_layers):
        prefix = f"blocks.{number}."
        block = {name.removeprefix(prefix): error for name, error in layers.items() if name.startswith(prefix)}
        if [other.keys() for other in kept].count(block.keys()) < 2:
            kept.append(block)
    quantization = manifest.quantization
    if quantization is not None:
        named = {f"blocks.{number}.{name}": error for number, block in enumerate(kept) for name, error in block.items()}
        quantization = replace(quantization, layers=named)
    return replace(manifest, model=replace(manifest.model, num_layers=len(kept)), quantization=quantization)


def _limits(manifest: Manifest) -> Iterable[int | None]:
    """Chunks of a stream: any number that a ring of its own size is made for, and no end."""
    stream = manifest.stream
    longest = stream.window or FRAMES_WITHOUT_WINDOW
    counts = range(1, 1 + len(chunk_sizes(stream).pieces(longest)))
    return [*counts, *([] if stream.window is None else [None])]


def _play(
    manifest: Manifest,
    backend: TorchBackend,
    decoder: Decoder | None,
    score: Score,
    limit: int | None,
    first_frame: Callable[[Any], object] | None = None,
) -> None:
    model, stream, sizes = manifest.model, manifest.stream, chunk_sizes(manifest.stream)
    frames = None if limit is None else sizes.start(limit)
    grid, ring = Grid.of(model, stream), ring_for(stream, frames)
    stage = Stage(
        model=model,
        stream=stream,
        grid=grid,
        device=_NOWHERE,
        rollout=backend.rollout(grid, ring, sizes, timesteps_of(stream)),
        ring=ring,
        noise=philox_noise(0, grid, model, _NOWHERE),
        decoder=decoder,
        ops=score,
        outlet=_NoHost(),
    )
    text = torch.empty(model.text_len, model.text_dim, device=_NOWHERE)
    chunks = len(sizes.pieces(ring.slots)) + _UNCHANGED
    with Session(stage, text, limit=limit, first_frame=first_frame) as session:
        for _ in zip(range(chunks), session, strict=False):
            pass


def _weights(manifest: Manifest) -> dict[str, Tensor]:
    """The transformer's, quantised as the manifest says."""
    with _NOWHERE:
        module = Transformer(manifest.model)
    if manifest.quantization is not None:
        place_quantized(module, manifest.quantization.method, manifest.quantization.layers)
    return dict(module.state_dict())


def _decoder(config: DecoderConfig, dtype: DTypeName, ops: Ops) -> Decoder:
    with _NOWHERE:
        module = Taehv(config) if isinstance(config, TaehvConfig) else WanVae(config)
    beside = DTYPES[dtype_beside(config, dtype, on_gpu=True)]
    return load_decoder(config, dict(module.state_dict()), _NOWHERE, beside, ops)
