"""A batch of streams of one model, rolled out as sfrt.session rolls out one, with gradients where they are asked for.

The transformer, the ring's slots, the timesteps, the noise and the update between steps are those of inference. What is
apart is only where keys and values lie: inference writes a chunk's own over and over into one ring in place, which no
gradient could pass; here a pass joins its own keys to those of the past, and the refresh pass alone writes the ring.
Keys and values in the ring carry no gradient (arXiv 2506.08009, section 3.2 and Algorithm 1).

Shapes: B streams, G chunks, L tokens a chunk, P features a token, H heads of d, S text slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.config import ModelConfig, StreamConfig
from sfrt.errors import ConfigError
from sfrt.noise import chunk_noise
from sfrt.ops.attention import attention
from sfrt.ops.denoise import follow_flow, predict_x0, renoise
from sfrt.ops.rolling_kv import QKV
from sfrt.ops.shift_keys import shift_keys
from sfrt.ring import ChunkPlan, Ring, chunk_sizes, ring_for
from sfrt.timesteps import Step, steps_of, timesteps_of
from sfrt.transformer import Attend, TextKV, Transformer, rotary_phases
from sfrt_train.clips import Told
from sfrt_train.model import PromptedTransformer, of_chunks, plain_attention


class BatchRing:
    """What sfrt.cache.KVCache keeps for one stream, for a batch of them: a layer's keys [B, H, slots · tokens, d]."""

    def __init__(self, config: ModelConfig, ring: Ring, tokens: int) -> None:
        self.ring, self.tokens = ring, tokens
        self._turned = 2 * config.rotary_pairs[0]  # features of the frame axis, which sinks are shifted in
        self._base = config.rotary_base
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._past: list[tuple[Tensor, Tensor]] = []
        self._own: Tensor

    def place(self, plan: ChunkPlan) -> None:
        """Choose what the coming passes see beside themselves, and where the refresh pass will write."""
        past = self.ring.context(plan.frames.start, len(plan.frames))
        sinks = sum(frame < self.ring.sink for frame in past)
        slots = self._elements(map(self.ring.slot, past))
        self._past = []  # let go of the last one first
        self._past = [self._seen(k[:, :, slots], v[:, :, slots], sinks, plan.sink_shift) for k, v in self._layers]
        self._own = self._elements(map(self.ring.slot, plan.frames))

    def attend(self, rows: slice) -> Attend:
        """How some streams' chunk attends to their past and itself, [rows, L, H, d].

        It sees this chunk's past even where it is called again later: as gradient checkpointing does.
        """
        past = self._past

        def attend(layer: int, qkv: QKV) -> Tensor:
            q, k, v = qkv.split()
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            if past:
                past_k, past_v = past[layer]
                k, v = torch.cat((past_k[rows], k), dim=2), torch.cat((past_v[rows], v), dim=2)
            return attention(q, k, v)

        return attend

    def write(self, layer: int, qkv: QKV) -> None:
        """Put the keys and values of all streams' chunk into their slots."""
        _, k, v = qkv.split()
        if layer == len(self._layers):
            batch, _, heads, width = k.shape
            shape = (batch, heads, self.ring.slots * self.tokens, width)
            self._layers.append((k.new_zeros(shape), v.new_zeros(shape)))
        for kept, part in zip(self._layers[layer], (k, v), strict=True):
            kept[:, :, self._own] = part.detach().transpose(1, 2)

    def _seen(self, k: Tensor, v: Tensor, sinks: int, shift: int) -> tuple[Tensor, Tensor]:
        """The past as this chunk sees it: in a ring whose positions are the window's, the sinks have moved on."""
        if shift and sinks:
            of_sinks = k[:, :, : sinks * self.tokens, : self._turned]
            k[:, :, : sinks * self.tokens, : self._turned] = shift_keys(of_sinks, shift, self._base)
        return k, v

    def _elements(self, slots: Iterable[int]) -> Tensor:
        first = torch.tensor(list(slots), dtype=torch.int64).unsqueeze(1) * self.tokens
        return (first + torch.arange(self.tokens)).flatten()


@dataclass(frozen=True)
class Trained:
    """How a rollout is trained. Without one it is inference.

    ends are the steps that each of the streams ends its chunks at, ascending: its prediction there is its chunk,
    however many more steps inference would take. gradient is how many chunks, the last ones, carry a gradient.
    """

    ends: Sequence[int]
    gradient: int


@dataclass(frozen=True)
class Denoised:
    """One chunk of all streams: its clean tokens [B, L, P], and what each step started from [steps, B, L, P].

    The latter is kept by inference alone.
    """

    tokens: Tensor
    starts: list[Tensor]


@dataclass(frozen=True)
class _Chunk:
    """What the passes over one chunk share: its prompts [layers, B, H, S, d] and its place on the three axes."""

    text: TextKV
    rotary: Tensor


class Rollout:
    """Streams that differ in their noise and prompts, chunk by chunk."""

    def __init__(self, model: PromptedTransformer, stream: StreamConfig, prompts: Told, seeds: Sequence[int]) -> None:
        """As many chunks as the prompts are for; seeds [B] are as a session takes them.

        Raises ConfigError for a stream that is refreshed in another way than by rolling on.
        """
        if stream.refresh != "rolling":
            raise ConfigError(f"training rolls on as refresh 'rolling' does; refresh {stream.refresh!r} is inference's")
        self.chunks = prompts.chunks.shape[1]
        self._stream, self._prompts, self._seeds = stream, prompts, seeds
        self._model: Transformer = model.transformer
        self._text = model.both_text_kv(prompts)
        self._device = self._text.k.device
        self._sizes, config = chunk_sizes(stream), self._model.config
        self._grid = Grid.of(config, stream)
        self._ring = BatchRing(config, ring_for(stream, self._sizes.start(self.chunks)), self._grid.tokens)
        with torch.autocast(self._device.type, enabled=False):
            times = timesteps_of(stream)
            self._modulations = {
                time: self._model.modulation(torch.tensor(time, device=self._device)) for time in times
            }

    def video(self, trained: Trained | None = None) -> Tensor:
        """All chunks' clean tokens, [B, G, L, P]; every chunk is of one size."""
        return torch.stack([chunk.tokens for chunk in self.run(trained)], dim=1)

    def run(self, trained: Trained | None = None) -> Iterator[Denoised]:
        """Chunk after chunk: denoise it, then run it once more at the context's level to leave its keys and values."""
        gradient_from = self.chunks - (trained.gradient if trained else 0)
        for number in range(self.chunks):
            frames = range(self._sizes.start(number), self._sizes.start(number + 1))
            chunk = self._place(number, self._ring.ring.plan(frames.start, len(frames)))
            steps = steps_of(self._stream, first_chunk=number == 0)
            noise = self._noise(frames, len(steps) if self._stream.sampler == "renoise" else 1)
            if trained is None:
                denoised = self._denoise(chunk, noise, steps)
            else:
                denoised = Denoised(self._until(chunk, noise, steps, trained.ends, number >= gradient_from), [])
            yield denoised
            if number + 1 < self.chunks:
                self._refresh(chunk, denoised.tokens)

    def _place(self, number: int, plan: ChunkPlan) -> _Chunk:
        self._ring.place(plan)
        rotary = rotary_phases(self._model.config, plan.positions, self._grid.rows, self._grid.columns, self._device)
        return _Chunk(of_chunks(self._text, self._prompts.chunks[:, number]), rotary)

    def _noise(self, frames: range, steps: int) -> Tensor:
        """[steps, B, L, P]"""
        size = (self._grid.tokens, self._model.config.token_dim)
        each = [chunk_noise(seed, frames, range(steps), *size, self._device) for seed in self._seeds]
        return torch.stack(each, dim=1)

    @torch.no_grad()
    def _denoise(self, chunk: _Chunk, noise: Tensor, steps: Sequence[Step]) -> Denoised:
        """All steps, as in inference."""
        x, starts = noise[0], []
        for number, step in enumerate(steps, start=1):
            starts.append(x)
            flow = self._flow(chunk, x, step, slice(None))
            if self._stream.sampler == "renoise" and step.next_sigma:
                x = renoise(predict_x0(x, flow, step), noise[number], step)
            else:
                x = follow_flow(x, flow, step)
        return Denoised(x, starts)

    def _until(
        self, chunk: _Chunk, noise: Tensor, steps: Sequence[Step], ends: Sequence[int], gradient: bool
    ) -> Tensor:
        """Each stream as far as the step it ends at; that one alone carries a gradient, where there is to be one.

        As the ends ascend, the streams that end at a step are the first of those that still run.
        """
        x, done, clean = noise[0], 0, []
        for number, step in enumerate(steps):
            ending = ends.count(number)
            if ending:
                with torch.set_grad_enabled(gradient):
                    flow = self._flow(chunk, x[:ending], step, slice(done, done + ending))
                    clean.append(predict_x0(x[:ending], flow, step))
            done, x = done + ending, x[ending:]
            if not len(x):
                break
            with torch.no_grad():
                x0 = predict_x0(x, self._flow(chunk, x, step, slice(done, None)), step)
                x = renoise(x0, noise[number + 1, done:], step)
        return torch.cat(clean)

    @torch.no_grad()
    def _refresh(self, chunk: _Chunk, tokens: Tensor) -> None:
        """Leave the keys and values of clean tokens [B, L, P] in the ring."""
        ring = self._ring
        seen = ring.attend(slice(None))

        def attend(layer: int, qkv: QKV) -> Tensor:
            ring.write(layer, qkv)
            return seen(layer, qkv)

        modulation = self._modulations[self._stream.context_noise]
        self._model.refresh(tokens, modulation, chunk.rotary, chunk.text, attend, ring.write)

    def _flow(self, chunk: _Chunk, x: Tensor, step: Step, rows: slice) -> Tensor:
        """The flow of some of the streams, [rows, L, P]."""
        text = TextKV(chunk.text.k[:, rows], chunk.text.v[:, rows])
        with plain_attention(self._device) if torch.is_grad_enabled() else nullcontext():
            flow: Tensor = self._model(x, self._modulations[step.timestep], chunk.rotary, text, self._ring.attend(rows))
        return flow
