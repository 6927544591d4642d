"""The quality gate of quantisation: the quantised model beside the one it was made from, on the same work.

Two things are asked of it. Pass by pass: what the unquantised model was given at every pass, and every clean chunk it
went on from, is given to the quantised one, so that a pass's error is its own. And as a whole: both roll out from the
same noise, so that errors add up as a viewer would see them; a few-step model has little room to find another video
that is as good. Beside that, each layer's share: quantised alone, in one pass over one frame of noise.

The work is small, for a model of any size: two prompts, three chunks, frames of at most 96 × 96 pixels, and a pass over
one frame for each layer. For Wan 2.1 1.3B in four steps that is 84 passes over 108 tokens and 211 over 36, or some 45
TFLOP: minutes on a CPU, seconds on a GPU. The unquantised model is held in memory, in the dtype that it would run in
(float32 on a CPU, bfloat16 on a GPU).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sfrt.backends import Grid, Rollout
from sfrt.backends.torch import TorchBackend
from sfrt.bundle.quantization import Method, Quality, Quantization, in_dtype
from sfrt.bundle.writer import LazyTensor
from sfrt.capture import Eager
from sfrt.config import ModelConfig, StreamConfig
from sfrt.decoders import Decoder
from sfrt.errors import ConfigError
from sfrt.noise import chunk_noise
from sfrt.ops.quantized_linear import place_quantized
from sfrt.ring import ChunkPlan, ChunkSizes, Ring, chunk_sizes, ring_for
from sfrt.session import Session
from sfrt.stage import Stage, philox_noise
from sfrt.text import TextEncoder
from sfrt.timesteps import steps_of, timesteps_of
from sfrt.weights import assign
from sfrt_export.quantize import quantizable, quantized_tensors
from sfrt_export.verify import relative_error

PROMPTS = ("a red circle moving left on a white background", "a cat walks through tall grass in the evening sun")
"""One stream each, its number being its seed."""

CHUNKS = 3
LARGEST_SIDE = 96

MOST_FLOW_ERROR = 0.1
MOST_LATENT_ERROR = 0.2
LEAST_FRAME_PSNR = 25.0
"""What a quantised model must keep to."""

_BEST_PSNR = 100.0


@dataclass(frozen=True)
class Subject:
    """A model about to be quantised: its settings and tensors, a prompt's embeddings for each of the gate's streams."""

    model: ModelConfig
    stream: StreamConfig
    weights: Mapping[str, LazyTensor]
    embeds: tuple[Tensor, ...]
    decoder: Decoder | None


def embeddings(encoder: TextEncoder | None, model: ModelConfig) -> tuple[Tensor, ...]:
    """Those of the gate's prompts; seeded normals where there is nothing to read text with."""
    if encoder is not None:
        return tuple(encoder.encode(prompt) for prompt in PROMPTS)
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(model.text_len, model.text_dim, generator=generator) for _ in PROMPTS)


def gate(
    subject: Subject,
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    *,
    force: bool = False,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> tuple[dict[str, LazyTensor], Quantization]:
    """The quantised tensors, and what the manifest says of them; progress is told of measurements done and in all.

    Raises ConfigError for a model that strays beyond the bounds above, unless forced to let it pass.
    """
    tensors, quantization = _measured(subject, method, device, dtype, progress)
    if not force and (excesses := list(_excesses(quantization.quality))):
        worst = max(quantization.layers, key=quantization.layers.__getitem__)
        raise ConfigError(
            f"quantised to {method} the model strays too far: {', '.join(excesses)}, "
            f"and {worst} alone moves the flow by {quantization.layers[worst]:.1%}; "
            "choose another method, or take it as it is with --force"
        )
    return tensors, quantization


def _excesses(quality: Quality) -> Iterator[str]:
    if quality.flow_error > MOST_FLOW_ERROR:
        yield f"its flow by {quality.flow_error:.1%} where {MOST_FLOW_ERROR:.0%} are allowed"
    if quality.latent_error > MOST_LATENT_ERROR:
        yield f"its latents by {quality.latent_error:.1%} where {MOST_LATENT_ERROR:.0%} are allowed"
    if quality.frame_psnr is not None and quality.frame_psnr < LEAST_FRAME_PSNR:
        yield f"its frames to {quality.frame_psnr:.1f} dB where {LEAST_FRAME_PSNR:g} are asked for"


@torch.inference_mode()
def _measured(
    subject: Subject,
    method: Method,
    device: torch.device,
    dtype: torch.dtype,
    progress: Callable[[int, int], object],
) -> tuple[dict[str, LazyTensor], Quantization]:
    layers = quantizable(subject.model)
    total = len(layers) + 3 * len(subject.embeds)
    done = iter(range(1, total + 1))

    def tick() -> None:
        progress(next(done), total)

    # One model in memory: the unquantised one, whose layers are then replaced one by one.
    weights = {name: tensor.make() for name, tensor in subject.weights.items()}
    backend = TorchBackend(subject.model, weights, device, dtype)
    streams = [_Stream(subject, backend, number) for number in range(len(subject.embeds))]
    with _input_peaks(backend.model, layers if method == "float8-static" else ()) as peaks:
        originals = [stream.roll_out(tick) for stream in streams]
    tensors = quantized_tensors(subject.weights, method, layers, peaks)
    shares = _shares(subject, backend, method, layers, tensors, tick)
    for layer in layers:
        _replace(backend, layer, method, tensors)
    flows = [stream.flows_on_the_way_of(original, tick) for stream, original in zip(streams, originals, strict=True)]
    videos = [stream.roll_out(tick) for stream in streams]
    quality = Quality(
        flow_error=relative_error(_joined(flows), _joined(original.way.flows for original in originals)),
        latent_error=relative_error(_latents(videos), _latents(originals)),
        frame_psnr=None if subject.decoder is None else _psnr(_frames(videos), _frames(originals)),
    )
    figures = (quality.flow_error, quality.latent_error, *shares.values())
    if not all(map(math.isfinite, figures)):
        raise ConfigError(
            f"the model, or what becomes of it as {method}, makes values that are no numbers; export it plainly and see"
        )
    return tensors, Quantization(method, quality, shares)


def _shares(
    subject: Subject,
    backend: TorchBackend,
    method: Method,
    layers: Iterable[str],
    tensors: Mapping[str, LazyTensor],
    tick: Callable[[], None],
) -> dict[str, float]:
    """The error of the flow where a layer alone is quantised, for each of them."""
    probe = _Probe(subject, backend)
    shares = {}
    for layer in layers:
        plain = backend.model.get_submodule(layer)
        _replace(backend, layer, method, tensors)
        shares[layer] = probe.error()
        backend.model.set_submodule(layer, plain)
        tick()
    return shares


class Way(Eager):
    """A rollout that keeps the flows it gave, and what it was asked, to ask it of another model."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self.asked: list[Callable[[Rollout], Tensor | None]] = []
        self.flows: list[Tensor] = []

    def set_text(self, embeds: Tensor) -> None:
        self._ask(lambda rollout: rollout.set_text(embeds))

    def place(self, plan: ChunkPlan) -> None:
        self._ask(lambda rollout: rollout.place(plan))

    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        given = tokens.clone()
        flow = self._ask(lambda rollout: rollout.flow(given, timestep))
        assert flow is not None
        self.flows.append(flow.float().clone())
        return flow

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        given = tokens.clone()
        self._ask(lambda rollout: rollout.refresh(given, timestep))

    def state(self) -> dict[str, Tensor]:
        return self._rollout.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._ask(lambda rollout: rollout.load_state(state))

    def _ask(self, ask: Callable[[Rollout], Tensor | None]) -> Tensor | None:
        self.asked.append(ask)
        return ask(self._rollout)


@dataclass(frozen=True, eq=False)
class Video:
    """Latents [T, C, h, w], uint8 frames [F, H, W, 3] and the way they were made."""

    latents: Tensor
    frames: npt.NDArray[np.uint8]
    way: Way


class _Stream:
    """One of the gate's streams, to be run as often as it takes."""

    def __init__(self, subject: Subject, backend: TorchBackend, number: int) -> None:
        self._subject = subject
        self._backend = backend
        self._number = number
        self._settings = _small(subject.stream)
        if subject.decoder is None and self._settings.refresh == "reencode":
            self._settings = dataclasses.replace(self._settings, refresh="rebuild")
        self._grid = Grid.of(subject.model, self._settings)
        sizes = chunk_sizes(self._settings)
        self._ring = ring_for(self._settings, sizes.start(CHUNKS))

    def roll_out(self, tick: Callable[[], None]) -> Video:
        """From this stream's noise on, by whatever the backend's model is now."""
        subject, way = self._subject, Way(self._rollout())
        noise = philox_noise(self._number, self._grid, subject.model, self._backend.device)
        stage = Stage(
            subject.model, self._settings, self._grid, self._backend.device, way, self._ring, noise, subject.decoder
        )
        with Session(stage, subject.embeds[self._number], limit=CHUNKS) as session:
            chunks = list(session)
        tick()
        return Video(torch.cat([c.latents for c in chunks]), np.concatenate([c.frames for c in chunks]), way)

    def flows_on_the_way_of(self, original: Video, tick: Callable[[], None]) -> list[Tensor]:
        """The flows at each pass of a video, given what it was given there."""
        rollout = self._rollout()
        flows = [flow.float().clone() for ask in original.way.asked if (flow := ask(rollout)) is not None]
        tick()
        return flows

    def _rollout(self) -> Rollout:
        return self._backend.rollout(self._grid, self._ring, chunk_sizes(self._settings), timesteps_of(self._settings))


class _Probe:
    """One pass over one latent frame of noise, and how far its flow is from what it was at first."""

    def __init__(self, subject: Subject, backend: TorchBackend) -> None:
        settings, device = _small(subject.stream), backend.device
        self._backend = backend
        self._grid = Grid.of(subject.model, settings)
        self._embeds = subject.embeds[0]
        self._timestep = steps_of(settings)[0].timestep
        self._noise = chunk_noise(0, range(1), range(1), self._grid.tokens, subject.model.token_dim, device)[0]
        self._expected = self._flow()

    def error(self) -> float:
        return relative_error(self._flow(), self._expected)

    def _flow(self) -> Tensor:
        ring = Ring(1)
        rollout = self._backend.rollout(self._grid, ring, ChunkSizes(1, 1), (self._timestep,))
        rollout.set_text(self._embeds)
        rollout.place(ring.plan(0, 1))
        return rollout.flow(self._noise, self._timestep).float()


def _small(stream: StreamConfig) -> StreamConfig:
    """The stream with frames that are cheap to make; in a plain ring, so that what is seen is of the weights."""
    height, width = (min(side, LARGEST_SIDE) for side in (stream.height, stream.width))
    return dataclasses.replace(stream, height=height, width=width, ring_dtype="model")


def _replace(backend: TorchBackend, layer: str, method: Method, tensors: Mapping[str, LazyTensor]) -> None:
    """Put the quantised layer in the place of whatever is there."""
    place_quantized(backend.model, method, (layer,), backend.ops)
    fresh = backend.model.get_submodule(layer)
    names = {name: f"{layer}.{name}" for name in fresh.state_dict()}
    values = {name: tensors[full].make().to(backend.device) for name, full in names.items()}
    assign(fresh, {name: in_dtype(names[name], value, backend.dtype) for name, value in values.items()}, layer)


@contextmanager
def _input_peaks(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, float]]:
    """The largest value that each of the layers is given meanwhile."""
    peaks: dict[str, float] = {}

    def watch(layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            peaks[layer] = max(peaks.get(layer, 0.0), float(inputs[0].abs().max()))

        return see

    hooks = [model.get_submodule(layer).register_forward_pre_hook(watch(layer)) for layer in layers]
    try:
        yield peaks
    finally:
        for hook in hooks:
            hook.remove()


def _joined(flows: Iterable[list[Tensor]]) -> Tensor:
    return torch.cat([flow for of_a_stream in flows for flow in of_a_stream])


def _latents(videos: list[Video]) -> Tensor:
    return torch.stack([video.latents for video in videos])


def _frames(videos: list[Video]) -> npt.NDArray[np.uint8]:
    return np.stack([video.frames for video in videos])


def _psnr(frames: npt.NDArray[np.uint8], reference: npt.NDArray[np.uint8]) -> float:
    """In dB, of eight-bit values."""
    error = float(np.square(frames.astype(np.float64) - reference).mean()) / 255**2
    return min(-10 * math.log10(error), _BEST_PSNR) if error else _BEST_PSNR
