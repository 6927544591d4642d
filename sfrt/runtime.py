"""Opens a bundle, owns its weights on one device, makes sessions."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sfrt.backends import Grid, Rollout
from sfrt.backends.loading import choose_backend, decoder_of, ops_for, text_encoder_of, transformer_of
from sfrt.backends.memory import Need, Setting, stream_need, text_encoder_need, weights_need, whole_need
from sfrt.backends.spare import Spare
from sfrt.bundle import Bundle, Manifest, resolve_model
from sfrt.config import Placement, StreamConfig
from sfrt.decoders import Decoder
from sfrt.decoders.captured import captured
from sfrt.delivery import outlet_for
from sfrt.device import dtype_name, free_bytes, memory_told, resolve_device, resolve_dtype
from sfrt.errors import BundleError, ConfigError, MediaError, PromptError
from sfrt.noise import check_seed
from sfrt.ops.choice import Pins
from sfrt.prompt_cache import PromptCache
from sfrt.prompts import Prompts, cache_for
from sfrt.ring import ChunkSizes, Ring, chunk_sizes, ring_for
from sfrt.session import Session
from sfrt.snapshot import ModelId, read_snapshot
from sfrt.source import PixelFrame, Source
from sfrt.stage import Origin, Stage, philox_noise
from sfrt.switching import Text
from sfrt.text import TextEncoder
from sfrt.timesteps import steps_of, timesteps_of

_PURE_NOISE = 0.99
"""The sigma from which on a chunk's start is taken to be noise and nothing else."""


class Runtime:
    """One model on one device, ready to stream; its sessions are used from one thread.

        runtime = Runtime()
        with runtime.session("a red circle moving left on a white background", seed=1) as session:
            for chunk in session:
                show(chunk.frames)  # uint8 [F, H, W, 3]

    Attributes: manifest (what the bundle says of itself), stream (its default settings), device, dtype, backend, ops
    (what each operation runs as), text_encoder (where that stays).
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        ops: Pins | None = None,
        verify: bool = True,
        text_encoder: Placement = "auto",
        prompt_cache: bool = True,
    ) -> None:
        """Open a bundle's folder; None is the built-in model.

        device is auto, cpu, cuda or cuda:N; dtype is auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or
        float16. backend is auto (see `sfrt.backends.loading`), torch, onnx (also onnx:PROVIDER: cpu, cuda or tensorrt)
        or tensorrt. ops names implementations of some ops, as {"modulate": "torch"}; None takes them from SFRT_OPS,
        as "modulate=torch" (see `sfrt.ops.choice`). verify hashes each of the bundle's files before it is used.
        text_encoder is where that stays, auto, resident, on-demand or cpu (see `sfrt.prompts`); prompt_cache keeps what
        it read in the user's cache folder, so that the same prompt never needs it again.
        Raises BundleError, DeviceError or ConfigError where one of these does not fit.
        """
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self._bundle = Bundle.open(resolve_model(model), verify=False)
        self.backend: str = choose_backend(self._bundle, backend, self.device, self.dtype)
        self._verify = verify
        self.manifest: Manifest = self._bundle.manifest
        self.stream: StreamConfig = self.manifest.stream
        self._setting = Setting(self.backend, dtype_name(self.dtype), on_gpu=self.device.type == "cuda")
        self._prompts = self._prompts_of(text_encoder, prompt_cache)
        self.text_encoder: Placement = self._prompts.placement
        self._outlet = outlet_for(self.device)
        # Other backends multiply what a mask hides: there a stream that went wrong would spoil the next one.
        self._spare = Spare() if self.device.type == "cuda" and self.backend == "torch" else None
        self._reading = Lock()  # a prompt may be switched from another thread than its stream's
        self._id = ModelId.of(self.manifest, self.backend, dtype_name(self.dtype))
        where = self.device, self.dtype
        weights_need(self.manifest, self._setting).require(f"the model {self.manifest.name!r}", self.device)
        with memory_told(f"the model {self.manifest.name!r}", self.device):
            self.ops = ops_for(self.manifest, *where, ops)
            self._transformer = transformer_of(self._bundle, self.backend, *where, ops=self.ops, verify=verify)
            decoder = decoder_of(self._bundle, self.backend, *where, ops=self.ops, verify=verify)
            self._decoder = None if decoder is None else captured(decoder, self.device)

    def session(
        self,
        prompt: str | Tensor,
        *,
        seed: int = 0,
        initial: str | Path | Tensor | None = None,
        source: str | Path | Iterable[PixelFrame] | None = None,
        strength: float | None = None,
        limit: int | None = None,
        stream: StreamConfig | None = None,
        history: int = 0,
        first_frame: Callable[[npt.NDArray[np.uint8]], object] | None = None,
        ahead: bool = False,
    ) -> Session:
        """A new stream of this model.

        prompt is text, or its embeddings [text_len, text_dim]. The same seed gives the same video. initial is a picture
        or clip to go on from: a file, or pixels float [F, 3, H, W] in [0, 1] (F is cut to 1 + 4·k). limit is the number
        of chunks, None for no end. stream replaces the model's settings, e.g. `replace(runtime.stream, window=12)`.
        history is how many chunks the stream can be taken back by (`Session.rewind`); each keeps its clean latents and
        a state of the decoder, which for the Wan VAE at 480×832 is more than a gigabyte. first_frame is called with the
        video's first pixel frame, uint8 [1, H, W, 3], while the rest of its chunk is still being decoded; as it is
        decoded by itself, frames may then be rounded otherwise. ahead is for most frames per second on a GPU: a chunk
        is begun before the frames of the one before it are there, so that a prompt shows a chunk later.

        source is a video to go by, frame for frame (video to video): a file, or frames as they come, from a camera or
        anywhere: float tensors [3, H, W] in [0, 1] or uint8 arrays [H, W, 3]. A chunk starts from its frames with noise
        on them, and takes only the frames it needs when it is asked for: 4·T for T latent frames, 3 less in the first
        chunk. The stream ends with the source; frames at its end that fill no chunk are left out. strength, in (0, 1],
        is the noise level (sigma) to start from: near 0 the source comes back, at 1 nothing of it is left; the model's
        steps above it are not run. None is the level of the model's own first step.

        Raises PromptError, MediaError, BundleError, ConfigError or DeviceError.
        """
        stream = stream or self.stream
        check_seed(seed)
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit}; ask for at least one chunk")
        if history < 0:
            raise ConfigError(f"history is {history}; it must not be negative")
        _check_start(stream, source is not None, strength, initial is not None)
        Grid.of(self.manifest.model, stream)  # refused before anything is loaded
        with memory_told("the session", self.device):
            text = Text.of(prompt, self._embeddings(prompt))
            latents = None if initial is None else self._encode(initial, stream)
            video = None if source is None else Source(source, stream, self._encoder(), self.device)
            given = 0 if latents is None else latents.shape[0]
            ring = ring_for(stream, _frames(stream, limit, given))
            stage = self._stage(stream, ring, chunk_sizes(stream, given), seed, video, strength)
            return Session(
                stage, text, initial=latents, limit=limit, history=history, first_frame=first_frame, ahead=ahead
            )

    def warm_up(self, stream: StreamConfig | None = None, limit: int | None = None) -> None:
        """Have what a stream of these settings makes when it first needs it: compiled, measured, and captured on a GPU.

        The next stream of the same settings is as quick from its first chunk on as any later one. Plays a stream that
        nobody sees until its ring is full, on a GPU twice, as work is captured when it comes again. Raises as session.
        """
        model, stream = self.manifest.model, stream or self.stream
        filling = -(-ring_for(stream, _frames(stream, limit, 0)).slots // stream.chunk)
        nothing = torch.zeros(model.text_len, model.text_dim)
        for _ in range(2 if self.device.type == "cuda" else 1):
            with self.session(nothing, stream=stream, limit=limit) as session:
                for _ in zip(range(filling + 2), session, strict=False):
                    pass
            with self.session(nothing, stream=stream, limit=limit, first_frame=lambda frame: None) as session:
                next(session)

    def memory(self, stream: StreamConfig | None = None) -> Need:
        """What this model takes on its device with one stream, None being its own; by part, in bytes."""
        by_it = self.device.type == "cpu" or self.text_encoder != "cpu"
        return whole_need(self.manifest, stream or self.stream, self._setting, text_encoder=by_it)

    def free_bytes(self) -> int | None:
        """Memory that new sessions can have on the device; None where the system does not say."""
        free = free_bytes(self.device)
        spare = 0 if self._spare is None else self._spare.size
        return None if free is None else free + spare

    def restore(self, path: str | Path, *, history: int = 0) -> Session:
        """The stream that `Session.snapshot` kept, to go on exactly as it would have; history as in `session`.

        The model, the backend and the dtype have to be those it was taken on; the device and the machine may be others,
        but only the same one promises the same bytes. Raises SnapshotError or DeviceError.
        """
        with memory_told("the session", self.device):
            saved = read_snapshot(path, self.device)
            kept = saved.settings
            kept.model.require(self._id, Path(path))
            return Session.resumed(self._stage(kept.stream, kept.ring, kept.sizes, kept.seed), saved, history=history)

    def _stage(
        self,
        stream: StreamConfig,
        ring: Ring,
        sizes: ChunkSizes,
        seed: int,
        video: Source | None = None,
        strength: float | None = None,
    ) -> Stage:
        """What a session runs on, with a fresh ring."""
        grid, need = Grid.of(self.manifest.model, stream), stream_need(self.manifest, stream, self._setting, ring)
        kind = (grid, ring, sizes, timesteps_of(stream, strength))
        rollout = partial(self._rollout, kind, need)
        return Stage(
            model=self.manifest.model,
            stream=stream,
            grid=grid,
            device=self.device,
            rollout=rollout(),
            ring=ring,
            noise=philox_noise(seed, grid, self.manifest.model, self.device),
            decoder=self._decoder,
            source=video,
            strength=strength,
            ops=self.ops,
            outlet=self._outlet,
            origin=Origin(self._id, seed, self._embeddings, rollout, partial(self._give_back, kind, need)),
        )

    def _rollout(self, kind: tuple[Grid, Ring, ChunkSizes, tuple[float, ...]], need: Need) -> Rollout:
        """The spare one where it is of this kind, else a fresh one."""
        spare, what = None, f"a stream with a ring of {kind[1].slots} latent frames"
        if self._spare is not None and self._spare.size:
            spare = self._spare.take(kind)
            if spare is None:
                torch.cuda.empty_cache()  # what its graphs computed in is of no other use
        (need if spare is None else need.without("ring", "prompt")).require(what, self.device)
        return spare or self._transformer.rollout(*kind)

    def _give_back(self, kind: Hashable, need: Need, rollout: Rollout) -> None:
        """Keep a rollout for the next stream, on a GPU: what was captured over it would take a while to have again."""
        if self._spare is not None:
            self._spare.keep(kind, rollout, need.parts["ring"] + need.parts["prompt"])

    def _embeddings(self, prompt: str | Tensor) -> Tensor:
        """[text_len, text_dim] of a prompt; given ones are checked."""
        if not isinstance(prompt, Tensor):
            with self._reading:
                return self._prompts.encode(prompt)
        wanted = (self.manifest.model.text_len, self.manifest.model.text_dim)
        if prompt.shape != wanted or not prompt.is_floating_point():
            raise PromptError(f"the embeddings are {prompt.dtype} {list(prompt.shape)}; give floats {list(wanted)}")
        return prompt.to(self.device, copy=True)  # a stream may go by it for long

    def _prompts_of(self, placement: Placement, cached: bool) -> Prompts:
        """This model's prompts; its text encoder is loaded when the first one comes that is not known."""

        def load(device: torch.device) -> TextEncoder:
            free, needed = free_bytes(device), text_encoder_need(self.manifest).total
            if self._spare is not None and free is not None and needed > free:
                self._spare.clear()
                torch.cuda.empty_cache()
            return text_encoder_of(self._bundle, self.backend, device, verify=self._verify)

        cache = cache_for(self.manifest, self.backend, self.device, placement) if cached else PromptCache(None, ())
        return Prompts(self.manifest, self.device, placement, load, cache)

    @torch.inference_mode()
    def _encode(self, initial: str | Path | Tensor, stream: StreamConfig) -> Tensor:
        """A picture or clip as latents [T, C, h, w]."""
        encoder = self._encoder()
        if isinstance(initial, Tensor):
            pixels = initial
        else:
            from sfrt.video import read_frames

            pixels = read_frames(initial, height=stream.height, width=stream.width, fps=stream.fps)
        wanted = (3, stream.height, stream.width)
        if pixels.ndim != 4 or not len(pixels) or pixels.shape[1:] != wanted or not pixels.is_floating_point():
            raise MediaError(
                f"the start is {pixels.dtype} {list(pixels.shape)}; "
                f"give float pixels [F, {', '.join(map(str, wanted))}] with F of 1 or more"
            )
        usable = 1 + (len(pixels) - 1) // 4 * 4
        return encoder.encode(pixels[:usable].unsqueeze(0))[0].squeeze(0)

    def _encoder(self) -> Decoder:
        """The autoencoder, to read pixels with."""
        if self._decoder is None:
            raise BundleError(
                f"the bundle {self._bundle.path} has no decoder to encode pixels with; export it with --taehv or --vae"
            )
        return self._decoder


def _frames(stream: StreamConfig, limit: int | None, initial: int) -> int | None:
    """How many latent frames a limited stream has in all; None without a limit."""
    if limit is None:
        return None
    first = stream.chunk if initial else chunk_sizes(stream).first
    return initial + first + (limit - 1) * stream.chunk


def _check_start(stream: StreamConfig, source: bool, strength: float | None, initial: bool) -> None:
    """Raise ConfigError where what a stream is to start from does not go together."""
    if source and initial:
        raise ConfigError("a source and an initial clip both say what the stream starts from; give one of them")
    if strength is not None:
        if not source:
            raise ConfigError("strength says how far to change a source; give a source with it")
        if not 0 < strength <= 1:
            raise ConfigError(f"strength is {strength}; it must be above 0 and at most 1")
        return
    levels = [steps_of(stream, first_chunk=first)[0].sigma for first in (True, False)]
    if source and max(levels) >= _PURE_NOISE:
        raise ConfigError(
            "this model starts from pure noise, which leaves nothing of a source; give a strength below 1, such as 0.5"
        )
    if not source and min(levels) < _PURE_NOISE:
        raise ConfigError(
            f"the steps start at a noise level of {min(levels):.2f}, where there is a source to start from; "
            "give a source, or steps that start at 1000"
        )
