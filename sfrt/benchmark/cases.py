"""The reference cases of the protocol, measured on a runtime: whole streams, from prompt to frames in host memory.

Each plays real sessions at full speed, so that what is counted is what a caller meets. Samples are raw; nothing is left
out but what is said to be.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.benchmark.protocol import Case, Figure, Result, case_of, forget_peak, peak
from sfrt.benchmark.roofline import operations
from sfrt.chunk import Timings
from sfrt.config import ModelConfig, StreamConfig
from sfrt.device import dtype_name
from sfrt.nvml import Gpu, Watch
from sfrt.ring import chunk_sizes, ring_for
from sfrt.runtime import Runtime
from sfrt.session import Session
from sfrt.timesteps import steps_of

PROMPT = "a red circle moving left on a white background"
CLIP_CHUNKS = 7
"""21 latent frames, 81 pixel frames."""
SWITCHES = 5

_CHANGES: dict[str, dict[str, Any]] = {
    "full21": {"chunk": 3, "window": 21, "sink": 0},
    "stream12": {"chunk": 3, "window": 12, "sink": 3},
    "frame1": {"chunk": 1, "window": 21, "sink": 0},
}
CASES = tuple(_CHANGES)


@dataclass(frozen=True)
class Effort:
    """How often and how long: repetitions of what is short, seconds of video of what is steady."""

    rounds: int = 5
    seconds: float = 60.0


@dataclass(frozen=True)
class Delivery:
    """One chunk as it came: milliseconds since the one before it, or since the stream was asked for; its own timings.

    operations are those of its denoising passes.
    """

    ms: float
    timings: Timings
    frames: int
    operations: float


class Subject:
    """A runtime to measure, prompts for it, and what its device can do."""

    def __init__(self, runtime: Runtime, matrix_rate: float, gpu: Gpu | None = None) -> None:
        """matrix_rate is in operations a second, measured in the same run (`sfrt.benchmark.roofline`)."""
        self.runtime = runtime
        self.matrix_rate = matrix_rate
        self.gpu = gpu
        self.reads_text = runtime.manifest.text_encoder is not None
        self._asked = 0
        self.known = self.fresh()

    def fresh(self) -> str | Tensor:
        """A prompt that this runtime has never seen; random embeddings where the model has no text encoder."""
        self._asked += 1
        if self.reads_text:
            return f"{PROMPT} {self._asked}"
        model = self.runtime.manifest.model
        generator = torch.Generator().manual_seed(self._asked)
        return torch.randn(model.text_len, model.text_dim, generator=generator).to(self.runtime.device)

    def stream(self, name: str) -> StreamConfig:
        """The model's own stream, but for what the case says."""
        return replace(self.runtime.stream, first_chunk=None, **_CHANGES[name])

    def case(self, name: str, stream: StreamConfig) -> Case:
        """The settings of a case."""
        manifest = self.runtime.manifest
        model = manifest.name if manifest.quantization is None else f"{manifest.name} {manifest.quantization.method}"
        names = self.runtime.backend, dtype_name(self.runtime.dtype), str(self.runtime.device)
        return case_of(name, model, stream, *names, decoder=manifest.decoder.kind if manifest.decoder else None)

    def result(
        self, name: str, stream: StreamConfig, figures: list[Figure], played: list[Delivery], watch: Watch
    ) -> Result:
        """What a case came to; figures are said to have been taken while `watch` looked on."""
        case = self.case(name, stream)
        beside = watch.summary()
        told = tuple(replace(figure, gpu=figure.gpu or beside) for figure in (*figures, peak(case.device)))
        return Result(case, told, self.runtime.memory(stream).parts, tuple(one.ms for one in played))

    def play(self, stream: StreamConfig, chunks: int | None, *, ahead: bool = False) -> Iterator[Delivery]:
        """A stream at full speed, from asking for it on; ahead as `Runtime.session` has it."""
        began = time.perf_counter()
        with self.runtime.session(self.known, stream=stream, limit=chunks, ahead=ahead) as session:
            yield from deliveries(session, self.runtime.manifest.model, stream, began)

    def forget_peak(self) -> None:
        """Begin a case."""
        forget_peak(str(self.runtime.device))


def deliveries(session: Session, model: ModelConfig, stream: StreamConfig, began: float) -> Iterator[Delivery]:
    """The chunks of a session, timed; began is when it was asked for, as time.perf_counter tells it."""
    for number, chunk in enumerate(session):
        now = time.perf_counter()
        yield Delivery((now - began) * 1e3, chunk.timings, len(chunk.frames), chunk_operations(model, stream, number))
        began = now


def chunk_operations(model: ModelConfig, stream: StreamConfig, number: int) -> float:
    """Floating point operations of a chunk's denoising passes, without the refresh pass, as the protocol has it."""
    sizes, tokens = chunk_sizes(stream), Grid.of(model, stream).tokens
    count = sizes.first if number == 0 else sizes.later
    stop = sizes.start(number) + count
    keys = min(stop, stream.window or stop)
    return len(steps_of(stream, first_chunk=number == 0)) * operations(model, count * tokens, keys * tokens)


def full21(subject: Subject, effort: Effort, progress: Callable[[str], object]) -> Result:
    """Chunks 1 to 7, each with figures of its own, and the whole clip, whose chunks are begun ahead."""
    stream = subject.stream("full21")
    subject.runtime.warm_up(stream, CLIP_CHUNKS)
    subject.forget_peak()
    clips: list[list[Delivery]] = []
    ahead: list[list[Delivery]] = []
    with Watch(subject.gpu) as watch:
        for number in range(effort.rounds):
            progress(f"full21, clip {number + 1} of {effort.rounds}")
            clips.append(list(subject.play(stream, CLIP_CHUNKS)))
            ahead.append(list(subject.play(stream, CLIP_CHUNKS, ahead=True)))
    clip_ms = [sum(one.ms for one in clip) for clip in ahead]
    figures = [
        Figure("clip_ms", tuple(clip_ms)),
        *_fps([sum(one.frames for one in clip) for clip in clips], clip_ms),
        *_parts([one for clip in clips for one in clip]),
    ]
    for number, same in enumerate(zip(*clips, strict=True), start=1):
        figures += [_dit(list(same), f"[{number}]"), _roofline(subject, list(same), f"[{number}]")]
        if number > 1:  # the first follows no other
            figures.append(Figure(f"chunk_ms[{number}]", tuple(one.ms for one in same)))
    figures += _first_frames(subject, stream, effort)
    return subject.result("full21", stream, figures, clips[-1], watch)


def stream12(subject: Subject, effort: Effort, progress: Callable[[str], object]) -> Result:
    """The steady state of a long stream in a short window, and what a prompt switch takes in it.

    Its chunks are begun ahead, so that each is denoised while the one before it is decoded.
    """
    return _steady(subject, "stream12", effort, progress)


def frame1(subject: Subject, effort: Effort, progress: Callable[[str], object]) -> Result:
    """Frame by frame: the steady state, and the first frame."""
    return _steady(subject, "frame1", effort, progress)


def _steady(subject: Subject, name: str, effort: Effort, progress: Callable[[str], object]) -> Result:
    stream = subject.stream(name)
    filling = math.ceil(ring_for(stream).slots / stream.chunk)
    steady = max(2, math.ceil(effort.seconds * stream.fps / (4 * stream.chunk)))
    subject.runtime.warm_up(stream)
    subject.forget_peak()
    played: list[Delivery] = []
    with Watch(subject.gpu) as watch:
        for one in subject.play(stream, filling + steady, ahead=True):
            played.append(one)
            progress(f"{name}, chunk {len(played)} of {filling + steady}")
    late = played[filling:]
    chunk = Figure("chunk_ms", tuple(one.ms for one in late))
    figures = [
        chunk,
        *_fps([one.frames for one in late], list(chunk.samples)),
        _dit(late),
        *_parts(late),
        _roofline(subject, late),
        Figure("jitter", (chunk.percentiles["p99"] / chunk.percentiles["p50"],)),
        *_first_frames(subject, stream, effort),
        _switches(subject, stream, filling),
    ]
    return subject.result(name, stream, figures, played, watch)


def _first_frames(subject: Subject, stream: StreamConfig, effort: Effort) -> list[Figure]:
    """From asking for a stream to its first pixel frame in host memory, with a known prompt and with a new one."""
    found = []
    for name, fresh in (("ttff_without_text_ms", False), ("ttff_ms", True)):
        if fresh and not subject.reads_text:
            continue
        with Watch(subject.gpu) as watch:
            samples = []
            for _ in range(effort.rounds):
                prompt = subject.fresh() if fresh else subject.known
                samples.append(_first_frame_ms(subject.runtime, stream, prompt))
        found.append(Figure(name, tuple(samples), watch.summary()))
    return found


def _first_frame_ms(runtime: Runtime, stream: StreamConfig, prompt: str | Tensor) -> float:
    """A model that shows no frames is done with its first chunk."""
    began, shown = time.perf_counter(), [math.inf]

    def at(_: object) -> None:
        shown[0] = time.perf_counter()

    with runtime.session(prompt, stream=stream, limit=1, first_frame=at) as session:
        next(session)
    return (min(shown[0], time.perf_counter()) - began) * 1e3


def _switches(subject: Subject, stream: StreamConfig, filling: int) -> Figure:
    """From giving a new prompt to the first frames that were made under it, once the window is full.

    The default way to switch, the window recached; whether those frames show it is for an eye to say.
    """
    samples = []
    with subject.runtime.session(subject.known, stream=stream) as session:
        for _ in range(filling + 1):
            next(session)
        with Watch(subject.gpu) as watch:
            for _ in range(SWITCHES):
                prompt = subject.fresh()
                began = time.perf_counter()
                session.switch(prompt)
                next(session)
                samples.append((time.perf_counter() - began) * 1e3)
                next(session)
    return Figure("switch_ms", tuple(samples), watch.summary())


def _dit(played: list[Delivery], which: str = "") -> Figure:
    return Figure(f"dit_ms{which}", tuple(one.timings.dit_ms for one in played))


def _parts(played: list[Delivery]) -> list[Figure]:
    """The refresh passes that ran, and the decodes."""
    refreshed = tuple(one.timings.refresh_ms for one in played if one.timings.refresh_ms)
    decoded = tuple(one.timings.decode_ms for one in played if one.frames)
    return [Figure(name, each) for name, each in (("refresh_ms", refreshed), ("decode_ms", decoded)) if each]


def _roofline(subject: Subject, played: list[Delivery], which: str = "") -> Figure:
    rate = subject.matrix_rate
    return Figure(f"roofline{which}", tuple(one.operations / (one.timings.dit_ms / 1e3) / rate for one in played))


def _fps(frames: list[int], milliseconds: list[float]) -> list[Figure]:
    """None for a model that shows no frames."""
    if not all(frames):
        return []
    return [Figure("fps", tuple(1e3 * count / ms for count, ms in zip(frames, milliseconds, strict=True)))]


RUN: dict[str, Callable[[Subject, Effort, Callable[[str], object]], Result]] = {
    "full21": full21,
    "stream12": stream12,
    "frame1": frame1,
}
