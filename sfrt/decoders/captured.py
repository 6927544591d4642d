"""TAEHV's decodes as CUDA graphs: its convolutions are small beside what it takes to queue them.

The Wan VAE runs as it is: a graph would hold its state, more than a gigabyte at 480×832, twice more, and its kernels
should outlast their launches. Neither has been timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfrt.capture import Graphs, Recorder, recorder_for
from sfrt.decoders import Decoder, LoadedDecoder
from sfrt.decoders.taehv import Taehv, TaehvState


class CapturedTaehv:
    """Decodes chunks of a size that it has seen before by a graph; encodes as it is. State and values are the same."""

    def __init__(self, taehv: Decoder, recorder: Recorder) -> None:
        self._taehv = taehv
        self._graphs = Graphs(recorder)

    def decode(self, latents: Tensor, state: TaehvState | None) -> tuple[Tensor, TaehvState]:
        """As Decoder.decode."""
        carried = () if state is None else state.memory
        pixels, *memory = self._graphs.launch((latents.shape, state is None), self._decode, latents, *carried)
        return pixels, TaehvState(tuple(memory))

    def encode(self, pixels: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As Decoder.encode."""
        return self._taehv.encode(pixels, state)

    def _decode(self, latents: Tensor, *memory: Tensor) -> tuple[Tensor, ...]:
        pixels, after = self._taehv.decode(latents, TaehvState(memory) if memory else None)
        return pixels, *after.memory


def captured(decoder: Decoder, device: torch.device) -> Decoder:
    """The decoder, with its decodes captured where that is possible and quicker."""
    recorder = recorder_for(device)
    if recorder is None or not isinstance(decoder, LoadedDecoder) or not isinstance(decoder.module, Taehv):
        return decoder
    return CapturedTaehv(decoder, recorder)
