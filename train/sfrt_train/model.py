"""The network that every stage from flow matching on trains: the transformer with the text encoder that it hears.

Shapes: B clips, G chunks, S text slots, H heads of d.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfrt.text import Umt5Encoder
from sfrt.transformer import TextKV, Transformer
from sfrt_train import reading
from sfrt_train.clips import Prompts
from sfrt_train.loop import weights_of
from sfrt_train.settings import Settings


class VideoModel(nn.Module):
    """The transformer, and the text encoder, which can read already (sfrt_train.reading) and stays so."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.transformer = Transformer(settings.transformer)
        self.text_encoder = Umt5Encoder(settings.text).requires_grad_(False)
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.transformer.head.linear.weight)  # starts as "no flow"

    def text_kv(self, prompts: Prompts) -> TextKV:
        """Text keys and values of every chunk, [layers, B, G, H, S, d]."""
        return of_chunks(self.both_text_kv(prompts), prompts.chunks)

    def both_text_kv(self, prompts: Prompts) -> TextKV:
        """Those of the two prompts, [layers, B, 2, H, S, d].

        Ids that are all padding are no prompt: the unconditional half of classifier-free guidance.
        """
        flat = prompts.ids.flatten(0, 1)
        embeds = self.text_encoder(flat, flat != 0).unflatten(0, prompts.ids.shape[:2])
        return self.transformer.text_kv(embeds)


def plain_attention(device: str | torch.device) -> AbstractContextManager[None]:
    """The plain formula on CPUs, where the fused attention's backward pass is several times slower for so few keys."""
    return sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()


def of_chunks(both: TextKV, chunks: Tensor) -> TextKV:
    """From two prompts' [layers, B, 2, H, S, d] those that chunks [B] or [B, G] follow."""
    clip = torch.arange(len(chunks), device=chunks.device).view(-1, *[1] * (chunks.ndim - 1))
    return TextKV(both.k[:, clip, chunks], both.v[:, clip, chunks])


def fresh_model(settings: Settings, folder: Path, start: str | None, device: str) -> VideoModel:
    """A model to train: with the weights of the stage `start`, or new ones behind the encoder that learned to read."""
    torch.manual_seed(settings.seed)
    model = VideoModel(settings).to(device)
    if start is None:
        model.text_encoder.load_state_dict(reading.weights(folder))
    else:
        model.load_state_dict(weights_of(folder, start))
    return model


def trained_model(settings: Settings, folder: Path, stage: str, device: str) -> VideoModel:
    """What a stage has made so far, frozen."""
    return fresh_model(settings, folder, stage, device).eval().requires_grad_(False)
