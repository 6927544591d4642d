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
from sfrt.decoders import LoadedDecoder
from sfrt.metrics import Stopwatch
from sfrt.noise import chunk_noise
from sfrt.ops.denoise import predict_x0, renoise
from sfrt.ops.layout import frames_from_pixels, latents_from_tokens, tokens_from_latents
from sfrt.ring import ChunkPlan, Ring, chunk_size
from sfrt.timesteps import Step, steps_of

NoiseSource = Callable[[range, int], Tensor]
"""(absolute latent frames, number of steps) → float32 normals [steps, frames · tokens, token_dim] on the device."""


@dataclass(frozen=True)
class Timings:
    """Milliseconds of one chunk, as in the benchmark protocol: refresh_ms is the previous chunk's, run first."""

    refresh_ms: float
    dit_ms: float
    decode_ms: float

    @property
    def chunk_ms(self) -> float:
        return self.refresh_ms + self.dit_ms + self.decode_ms


@dataclass(frozen=True)
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
    decoder: LoadedDecoder | None


class Session:
    """An iterator of chunks. Use it as a context manager, or close it; a closed session yields no more.

    The refresh pass of a chunk runs when the next one is asked for, so frames leave before it, and a stream that stops
    never pays for its last.
    """

    def __init__(
        self, stage: Stage, embeds: Tensor, *, initial: Tensor | None = None, limit: int | None = None
    ) -> None:
        """embeds is the prompt, [text_len, text_dim]; initial, latents [T, C, h, w] to go on from; limit, of chunks."""
        self._stage = stage
        self._limit = limit
        self._index = 0
        self._next_frame = 0
        self._unrefreshed: Tensor | None = None
        self._decoder_state: Any = None
        self._closed = False
        self.initial_frames: npt.NDArray[np.uint8] | None = None
        """The given start as the decoder renders it, uint8 [F, H, W, 3]; the first chunk goes on from here."""
        stage.rollout.set_text(embeds)
        if initial is not None:
            self._start_from(initial)

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Session:
        return self

    def close(self) -> None:
        """End the stream and let its memory go. Closing twice is fine."""
        self._closed = True
        self._decoder_state = self._unrefreshed = None

    @torch.inference_mode()
    def refresh(self) -> None:
        """Run the refresh pass that the last chunk still owes, if any, rather than when the next one is asked for."""
        if self._unrefreshed is not None:
            self._stage.rollout.refresh(self._unrefreshed, self._stage.stream.context_noise)
            self._unrefreshed = None

    @torch.inference_mode()
    def __next__(self) -> Chunk:
        if self._closed or self._index == self._limit:
            raise StopIteration
        stage, watch = self._stage, Stopwatch(self._stage.device)
        first = self._next_frame == 0
        steps = steps_of(stage.stream, first_chunk=first)

        watch.mark("start")
        self.refresh()
        watch.mark("refreshed")
        plan = self._advance(chunk_size(stage.stream, first_chunk=first))
        tokens = self._denoise(plan, steps)
        latents = latents_from_tokens(tokens, stage.model, stage.grid.rows, stage.grid.columns)
        watch.mark("denoised")
        frames = self._decode(latents)
        watch.mark("decoded")

        self._unrefreshed = tokens
        chunk = Chunk(self._index, frames, latents, _timings(watch, stage.device))
        self._index += 1
        return chunk

    def _advance(self, frames: int) -> ChunkPlan:
        plan = self._stage.ring.plan(self._next_frame, frames)
        self._stage.rollout.place(plan)
        self._next_frame = plan.frames.stop
        return plan

    def _denoise(self, plan: ChunkPlan, steps: tuple[Step, ...]) -> Tensor:
        """From noise to clean tokens, float32 [frames · tokens, token_dim]."""
        rollout = self._stage.rollout
        noise = self._stage.noise(plan.frames, len(steps))
        x = noise[0]
        for number, step in enumerate(steps, start=1):
            x0 = predict_x0(x, rollout.flow(x, step.timestep), step)
            x = renoise(x0, noise[number], step) if step.next_sigma else x0
        return x

    def _decode(self, latents: Tensor) -> npt.NDArray[np.uint8]:
        """Pixel frames on the host; none where the bundle has no decoder."""
        if self._stage.decoder is None:
            return np.empty((0, self._stage.stream.height, self._stage.stream.width, 3), dtype=np.uint8)
        pixels, self._decoder_state = self._stage.decoder.decode(latents.unsqueeze(0), self._decoder_state)
        return frames_from_pixels(pixels.squeeze(0)).cpu().numpy()

    @torch.inference_mode()
    def _start_from(self, latents: Tensor) -> None:
        """Put given latents in the cache, at most a chunk at a time, and in the decoder's state."""
        stage = self._stage
        remainder = latents.shape[0] % stage.stream.chunk
        pieces = [remainder] * bool(remainder) + [stage.stream.chunk] * (latents.shape[0] // stage.stream.chunk)
        for piece in latents.float().split(pieces):
            self._advance(len(piece))
            stage.rollout.refresh(tokens_from_latents(piece, stage.model), stage.stream.context_noise)
        self.initial_frames = self._decode(latents)


def _timings(watch: Stopwatch, device: torch.device) -> Timings:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()  # the frames are on the host by now, so this waits for nothing
    return Timings(watch.ms("start", "refreshed"), watch.ms("refreshed", "denoised"), watch.ms("denoised", "decoded"))
