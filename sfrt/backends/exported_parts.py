"""The autoencoder and the text encoder on exported graphs."""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt import graphs
from sfrt.backends.exported import Runner
from sfrt.config import DecoderConfig, TaehvConfig, Umt5Config
from sfrt.decoders import spans_to_encode
from sfrt.decoders.taehv import TIME
from sfrt.graphs import GraphName

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

    def encode(self, pixels: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """As Decoder.encode: pixels [1, F, 3, H, W] to float32 latents [1, T, C, H/8, W/8]."""
        parts = []
        for begin, end in spans_to_encode(pixels.shape[1], self._in_time, start=state is None):
            graph: GraphName = "encoder_first" if state is None else "encoder"
            part, state = self._run(graph, graphs.PIXELS, pixels[:, begin:end], graphs.LATENTS, state or ())
            parts.append(part)
        assert state is not None, "there is at least one frame"
        return torch.cat(parts, dim=1), state

    def encode_groups(self, pixels: Tensor) -> tuple[Tensor, State]:
        """As Taehv.encode_groups: the plain encoder over pixels [1, 4·T, 3, H, W], with nothing before them."""
        _, state = self.encode(pixels[:, :1])
        return self.encode(pixels, tuple(map(torch.zeros_like, state)))

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
