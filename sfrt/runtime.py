"""Opens a bundle, owns its weights on one device, makes sessions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sfrt.backends import Backend, Grid, load_backend, require_backend
from sfrt.bundle import Bundle, Manifest, resolve_model
from sfrt.config import StreamConfig
from sfrt.decoders import LoadedDecoder, load_decoder
from sfrt.device import memory_told, require_memory, resolve_device, resolve_dtype
from sfrt.errors import BundleError, ConfigError, MediaError, PromptError
from sfrt.noise import check_seed
from sfrt.ring import chunk_size, ring_for
from sfrt.session import Session, Stage, philox_noise
from sfrt.text import TextEncoder, clean_prompt, load_text_encoder
from sfrt.timesteps import timesteps_of


class Runtime:
    """One model on one device, ready to stream; its sessions are used from one thread.

        runtime = Runtime()
        with runtime.session("a red circle moving left on a white background", seed=1) as session:
            for chunk in session:
                show(chunk.frames)  # uint8 [F, H, W, 3]

    Attributes: manifest (what the bundle says of itself), stream (its default settings), device, dtype.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "torch",
        verify: bool = True,
    ) -> None:
        """Open a bundle's folder; None is the built-in model.

        device is auto, cpu, cuda or cuda:N; dtype is auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or
        float16. verify hashes each of the bundle's files before it is used.
        Raises BundleError, DeviceError or ConfigError where one of these does not fit.
        """
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        require_backend(backend)
        self._bundle = Bundle.open(resolve_model(model), verify=False)
        self._verify = verify
        self.manifest: Manifest = self._bundle.manifest
        self.stream: StreamConfig = self.manifest.stream
        self._text: TextEncoder | None = None
        with memory_told(f"the model {self.manifest.name!r}", self.device):
            self._backend = self._load_backend(backend)
            self._decoder = self._load_decoder()

    def session(
        self,
        prompt: str | Tensor,
        *,
        seed: int = 0,
        initial: str | Path | Tensor | None = None,
        limit: int | None = None,
        stream: StreamConfig | None = None,
    ) -> Session:
        """A new stream of this model.

        prompt is text, or its embeddings [text_len, text_dim]. The same seed gives the same video. initial is a picture
        or clip to go on from: a file, or pixels float [F, 3, H, W] in [0, 1] (F is cut to 1 + 4·k). limit is the number
        of chunks, None for no end. stream replaces the model's settings, e.g. `replace(runtime.stream, window=12)`.
        Raises PromptError, MediaError, BundleError, ConfigError or DeviceError.
        """
        stream = stream or self.stream
        check_seed(seed)
        if limit is not None and limit < 1:
            raise ConfigError(f"limit is {limit}; ask for at least one chunk")
        grid = Grid.of(self.manifest.model, stream)
        with memory_told("the session", self.device):
            embeds = self._embeddings(prompt)
            latents = None if initial is None else self._encode(initial, stream)
            ring = ring_for(stream, _frames(stream, limit, 0 if latents is None else latents.shape[0]))
            stage = Stage(
                model=self.manifest.model,
                stream=stream,
                grid=grid,
                device=self.device,
                rollout=self._backend.rollout(grid, ring, timesteps_of(stream)),
                ring=ring,
                noise=philox_noise(seed, grid, self.manifest.model, self.device),
                decoder=self._decoder,
            )
            return Session(stage, embeds, initial=latents, limit=limit)

    def _embeddings(self, prompt: str | Tensor) -> Tensor:
        """[text_len, text_dim] of a prompt; given ones are checked."""
        if not isinstance(prompt, Tensor):
            clean_prompt(prompt)  # refused before a text encoder is loaded for it
            return self._text_encoder().encode(prompt)
        wanted = (self.manifest.model.text_len, self.manifest.model.text_dim)
        if prompt.shape != wanted or not prompt.is_floating_point():
            raise PromptError(f"the embeddings are {prompt.dtype} {list(prompt.shape)}; give floats {list(wanted)}")
        return prompt

    def _text_encoder(self) -> TextEncoder:
        """The text encoder, loaded when the first prompt comes; in the dtype it is stored in, whatever the model's."""
        if self._text is None:
            self._require_memory_for("text_encoder", "the text encoder")
            self._text = load_text_encoder(self._bundle, self.device, verify=self._verify)
        return self._text

    def _load_backend(self, name: str) -> Backend:
        stored: torch.dtype = getattr(torch, self.manifest.dtype)
        self._require_memory_for("transformer", "the transformer", self.dtype.itemsize / stored.itemsize)
        weights = self._bundle.load("transformer", self.device, self.dtype, verify=self._verify)
        return load_backend(name, self.manifest.model, weights, self.device, self.dtype)

    def _load_decoder(self) -> LoadedDecoder | None:
        part = self.manifest.decoder
        if part is None:
            return None
        self._require_memory_for("decoder", "the decoder")
        weights = self._bundle.load("decoder", self.device, verify=self._verify)
        return load_decoder(part.config, weights, self.device, self.dtype)

    def _require_memory_for(self, part: str, what: str, growth: float = 1.0) -> None:
        """Raise DeviceError where a part's tensors, `growth` times their size on disk, do not fit."""
        info = self.manifest.files.get(f"{part}.safetensors")
        if info is not None:
            require_memory(round(info.bytes * growth), what, self.device)

    @torch.inference_mode()
    def _encode(self, initial: str | Path | Tensor, stream: StreamConfig) -> Tensor:
        """A picture or clip as latents [T, C, h, w]."""
        if self._decoder is None:
            raise BundleError(
                f"the bundle {self._bundle.path} has no decoder to encode a start with; export it with --taehv or --vae"
            )
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
        return self._decoder.encode(pixels[:usable].unsqueeze(0)).squeeze(0)


def _frames(stream: StreamConfig, limit: int | None, initial: int) -> int | None:
    """How many latent frames a limited stream has in all; None without a limit."""
    if limit is None:
        return None
    return initial + chunk_size(stream, first_chunk=not initial) + (limit - 1) * stream.chunk
