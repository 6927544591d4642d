"""The only chunk loop there is: denoise, deliver, refresh the cache, go on (arXiv 2506.08009, Algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfrt.backends import Grid, Rollout
from sfrt.config import ModelConfig, StreamConfig
from sfrt.decoders import Decoder
from sfrt.device import memory_told
from sfrt.metrics import Stopwatch
from sfrt.noise import chunk_noise
from sfrt.ops.denoise import follow_flow, predict_x0, renoise
from sfrt.ops.layout import frames_from_pixels, latents_from_tokens, tokens_from_latents
from sfrt.ring import ChunkPlan, Ring, chunk_sizes
from sfrt.timesteps import Step, steps_of

NoiseSource = Callable[[range, int], Tensor]
"""(absolute latent frames, number of steps) → float32 normals [steps, frames · tokens, token_dim] on the device."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one chunk, as in the benchmark protocol; refresh_ms is the pass behind the previous chunk."""

    refresh_ms: float
    dit_ms: float
    decode_ms: float

    @property
    def chunk_ms(self) -> float:
        return self.refresh_ms + self.dit_ms + self.decode_ms


@dataclass(frozen=True, eq=False)
class Chunk:
    """One delivered chunk: uint8 pixel frames [F, H, W, 3] on the host, latents [T, C, h, w] float32 on the device."""

    index: int
    frames: npt.NDArray[np.uint8]
    latents: Tensor
    timings: Timings


def philox_noise(seed: int, grid: Grid, model: ModelConfig, device: torch.device) -> NoiseSource:
    """The noise every stream uses unless it is given another: see sfrt.noise."""

    def normals(frames: range, steps: int) -> Tensor:
        return chunk_noise(seed, frames, range(steps), grid.tokens, model.token_dim, device)

    return normals


@dataclass(frozen=True)
class Stage:
    """What a session runs on; made by the runtime."""

    model: ModelConfig
    stream: StreamConfig
    grid: Grid
    device: torch.device
    rollout: Rollout
    ring: Ring
    noise: NoiseSource
    decoder: Decoder | None


class Session:
    """An iterator of chunks. Use it as a context manager, or close it; a closed session yields no more.

    The refresh pass of a chunk runs when the next one is asked for, so frames leave before it, and a stream that stops
    never pays for its last. A chunk that fails or is interrupted leaves the stream where it was.
    """

    def __init__(
        self, stage: Stage, embeds: Tensor, *, initial: Tensor | None = None, limit: int | None = None
    ) -> None:
        """embeds is the prompt, [text_len, text_dim]; initial, latents [T, C, h, w] to go on from; limit, of chunks."""
        self._stage: Stage | None = stage
        self._limit = limit
        self._first_steps = steps_of(stage.stream, first_chunk=True)
        self._steps = steps_of(stage.stream)
        self._sizes = chunk_sizes(stage.stream, 0 if initial is None else initial.shape[0])
        self._index = 0
        self._next_frame = 0
        self._unrefreshed: Tensor | None = None
        self._watch = Stopwatch(stage.device)
        self._decoder_state: Any = None
        self.initial_frames: npt.NDArray[np.uint8] | None = None
        """The given start as the decoder renders it, uint8 [F, H, W, 3]; the first chunk goes on from here."""
        stage.rollout.set_text(embeds)
        if initial is not None:
            self.initial_frames = self._start_from(stage, initial)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Session:
        return self

    def close(self) -> None:
        """End the stream and let its memory go, the ring's too. Closing twice is fine."""
        self._stage = self._decoder_state = self._unrefreshed = None

    @torch.no_grad()
    def refresh(self) -> None:
        """Run the refresh pass that the last chunk still owes, if any, rather than when the next one is asked for."""
        if self._stage is None or self._unrefreshed is None:
            return
        self._watch.mark("refresh")
        self._stage.rollout.refresh(self._unrefreshed, self._stage.stream.context_noise)
        self._watch.mark("refreshed")
        self._unrefreshed = None

    @torch.no_grad()
    def __next__(self) -> Chunk:
        stage = self._stage
        if stage is None or self._index == self._limit:
            raise StopIteration
        with memory_told("the stream", stage.device):
            self.refresh()
            first, watch = self._next_frame == 0, self._watch
            watch.mark("start")
            plan = stage.ring.plan(self._next_frame, self._sizes.first if first else self._sizes.later)
            tokens = _denoise(stage, plan, self._first_steps if first else self._steps)
            latents = latents_from_tokens(tokens, stage.model, stage.grid.rows, stage.grid.columns)
            watch.mark("denoised")
            frames = self._decode(stage, latents)
            watch.mark("decoded")
        chunk = Chunk(self._index, frames, latents, _timings(watch))
        self._index, self._next_frame = self._index + 1, plan.frames.stop
        self._unrefreshed, self._watch = tokens, Stopwatch(stage.device)
        return chunk

    def _decode(self, stage: Stage, latents: Tensor) -> npt.NDArray[np.uint8]:
        """Pixel frames on the host; none where the bundle has no decoder."""
        if stage.decoder is None:
            return np.empty((0, stage.stream.height, stage.stream.width, 3), dtype=np.uint8)
        pixels, self._decoder_state = stage.decoder.decode(latents.unsqueeze(0), self._decoder_state)
        return frames_from_pixels(pixels.squeeze(0)).cpu().numpy()

    @torch.no_grad()
    def _start_from(self, stage: Stage, latents: Tensor) -> npt.NDArray[np.uint8]:
        """Put given latents in the cache and in the decoder's state, at most a chunk at a time."""
        sizes = self._sizes
        pieces = [sizes.first] + [sizes.later] * ((latents.shape[0] - sizes.first) // sizes.later)
        shown = []
        for piece in latents.float().split(pieces):
            plan = stage.ring.plan(self._next_frame, len(piece))
            stage.rollout.place(plan)
            stage.rollout.refresh(tokens_from_latents(piece, stage.model), stage.stream.context_noise)
            shown.append(self._decode(stage, piece))
            self._next_frame = plan.frames.stop
        return np.concatenate(shown)


def _denoise(stage: Stage, plan: ChunkPlan, steps: tuple[Step, ...]) -> Tensor:
    """From noise to a chunk's clean tokens, float32 [frames · tokens, token_dim]."""
    stage.rollout.place(plan)
    fresh = stage.stream.sampler == "renoise"
    noise = stage.noise(plan.frames, len(steps) if fresh else 1)
    x = noise[0]
    for number, step in enumerate(steps, start=1):
        flow = stage.rollout.flow(x, step.timestep)
        if fresh and step.next_sigma:
            x = renoise(predict_x0(x, flow, step), noise[number], step)
        else:
            x = follow_flow(x, flow, step)
    return x


def _timings(watch: Stopwatch) -> Timings:
    watch.wait("decoded")
    refresh = watch.ms("refresh", "refreshed") if watch.has("refreshed") else 0.0
    return Timings(refresh, watch.ms("start", "denoised"), watch.ms("denoised", "decoded"))
