"""The autoencoder and the text encoder on exported graphs."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from sfrt import graphs
from sfrt.backends.exported import Runner
from sfrt.config import DecoderConfig, TaehvConfig, Umt5Config
from sfrt.decoders.taehv import TIME
from sfrt.graphs import GraphName

ENCODED_TOGETHER = 3
"""Latent frames encoded at once: bounds the memory of a long clip and changes nothing in the result."""

State = tuple[Tensor, ...]
"""What a graph leaves for the next chunk, in running order."""


class ExportedDecoder:
    """An autoencoder's graphs: a `Decoder` of one video at a time, B = 1."""

    def __init__(self, runner: Runner, config: DecoderConfig) -> None:
        self._runner = runner
        self._in_time = TIME if isinstance(config, TaehvConfig) else 2 ** sum(config.temporal_downsample)

    def decode(self, latents: Tensor, state: State | None) -> tuple[Tensor, State]:
        """As Decoder.decode: latents [1, T, C, h, w] to float32 pixels [1, F, 3, 8h, 8w]."""
        graph: GraphName = "decoder_first" if state is None else "decoder"
        return self._run(graph, graphs.LATENTS, latents, graphs.PIXELS, state or ())

    def encode(self, pixels: Tensor) -> Tensor:
        """As Decoder.encode: pixels [1, F, 3, H, W] to float32 latents [1, 1 + k, C, H/8, W/8]."""
        frames, several = pixels.shape[1], ENCODED_TOGETHER * self._in_time
        # The first latent frame of a video is a single pixel frame.
        bounds = [0, *range(several - self._in_time + 1, frames, several), frames]
        graph: GraphName = "encoder_first"
        state: State = ()
        parts = []
        for start, stop in pairwise(bounds):
            part, state = self._run(graph, graphs.PIXELS, pixels[:, start:stop], graphs.LATENTS, state)
            parts.append(part)
            graph = "encoder"
        return torch.cat(parts, dim=1)

    def encode_groups(self, pixels: Tensor) -> Tensor:
        """As Taehv.encode_groups: the plain encoder over pixels [1, 4·T, 3, H, W], with nothing before them."""
        _, state = self._run("encoder_first", graphs.PIXELS, pixels[:, :1], graphs.LATENTS, ())
        return self._run("encoder", graphs.PIXELS, pixels, graphs.LATENTS, tuple(map(torch.zeros_like, state)))[0]

    def _run(self, graph: GraphName, given: str, x: Tensor, wanted: str, state: State) -> tuple[Tensor, State]:
        past = {graphs.state_in(index): tensor for index, tensor in enumerate(state)}
        made = self._runner.call(graph, {given: x.float(), **past})
        result = made.pop(wanted)
        return result, tuple(made[graphs.state_out(index)] for index in range(len(made)))


class ExportedTextEncoder:
    """The graph of a UMT5 encoder: a `PromptEncoder`."""

    def __init__(self, runner: Runner, config: Umt5Config) -> None:
        self.config = config
        self._runner = runner

    @property
    def device(self) -> torch.device:
        return self._runner.device

    def __call__(self, ids: Tensor) -> Tensor:
        """float32 [1, L, dim] from int64 ids [1, L] without padding, at most as many as the graph was made for."""
        embeds = self._runner.call("text_encoder", {graphs.TOKEN_IDS: ids})[graphs.EMBEDS]
        return embeds[None, : ids.shape[1]]
