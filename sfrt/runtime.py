"""Opens a bundle, owns its weights on one device, makes sessions."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.backends.loading import choose_backend, decoder_of, text_encoder_of, transformer_of
from sfrt.bundle import Bundle, Manifest, resolve_model
from sfrt.config import StreamConfig
from sfrt.device import memory_told, resolve_device, resolve_dtype
from sfrt.errors import BundleError, ConfigError, MediaError, PromptError
from sfrt.noise import check_seed
from sfrt.ring import chunk_sizes, ring_for
from sfrt.session import Session, Stage, philox_noise
from sfrt.text import TextEncoder, clean_prompt
from sfrt.timesteps import timesteps_of


class Runtime:
    """One model on one device, ready to stream; its sessions are used from one thread.

        runtime = Runtime()
        with runtime.session("a red circle moving left on a white background", seed=1) as session:
            for chunk in session:
                show(chunk.frames)  # uint8 [F, H, W, 3]

    Attributes: manifest (what the bundle says of itself), stream (its default settings), device, dtype, backend.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        backend: str = "auto",
        verify: bool = True,
    ) -> None:
        """Open a bundle's folder; None is the built-in model.

        device is auto, cpu, cuda or cuda:N; dtype is auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16 or
        float16. backend is auto (see `sfrt.backends.loading`), torch, onnx (also onnx:PROVIDER: cpu, cuda or tensorrt)
        or tensorrt. verify hashes each of the bundle's files before it is used.
        Raises BundleError, DeviceError or ConfigError where one of these does not fit.
        """
        self.device = resolve_device(device)
        self.dtype = resolve_dtype(dtype, self.device)
        self._bundle = Bundle.open(resolve_model(model), verify=False)
        self.backend: str = choose_backend(self._bundle, backend, self.device, self.dtype)
        self._verify = verify
        self.manifest: Manifest = self._bundle.manifest
        self.stream: StreamConfig = self.manifest.stream
        self._text: TextEncoder | None = None
        with memory_told(f"the model {self.manifest.name!r}", self.device):
            self._transformer = transformer_of(self._bundle, self.backend, self.device, self.dtype, verify=verify)
            self._decoder = decoder_of(self._bundle, self.backend, self.device, self.dtype, verify=verify)

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
            given = 0 if latents is None else latents.shape[0]
            ring = ring_for(stream, _frames(stream, limit, given))
            stage = Stage(
                model=self.manifest.model,
                stream=stream,
                grid=grid,
                device=self.device,
                rollout=self._transformer.rollout(grid, ring, chunk_sizes(stream, given), timesteps_of(stream)),
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
        """The text encoder, loaded when the first prompt comes."""
        if self._text is None:
            self._text = text_encoder_of(self._bundle, self.backend, self.device, verify=self._verify)
        return self._text

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
    first = stream.chunk if initial else chunk_sizes(stream).first
    return initial + first + (limit - 1) * stream.chunk
