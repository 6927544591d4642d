"""The network that every stage from flow matching on trains: the transformer with the text encoder that it hears.

Shapes: B clips, G chunks, S text slots, H heads of d.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfrt.text import Umt5Encoder
from sfrt.transformer import TextKV, Transformer
from sfrt_train import reading
from sfrt_train.clips import Told
from sfrt_train.loop import weights_of
from sfrt_train.settings import Settings


class PromptedTransformer(nn.Module):
    """A transformer that is told prompts; without a text encoder they come as embeddings."""

    def __init__(self, transformer: Transformer, text_encoder: Umt5Encoder | None = None) -> None:
        super().__init__()
        self.transformer = transformer
        self.text_encoder = text_encoder

    def text_kv(self, prompts: Told) -> TextKV:
        """Text keys and values of every chunk, [layers, B, G, H, S, d]."""
        return of_chunks(self.both_text_kv(prompts), prompts.chunks)

    def both_text_kv(self, prompts: Told) -> TextKV:
        """Those of the two prompts, [layers, B, 2, H, S, d]."""
        return self.transformer.text_kv(prompts.embeds(self.text_encoder))


class VideoModel(PromptedTransformer):
    """The recipe's: new weights, and a text encoder that can read already (sfrt_train.reading) and stays so."""

    text_encoder: Umt5Encoder

    def __init__(self, settings: Settings) -> None:
        super().__init__(Transformer(settings.transformer), Umt5Encoder(settings.text).requires_grad_(False))
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.transformer.head.linear.weight)  # starts as "no flow"


def plain_attention(device: str | torch.device) -> AbstractContextManager[None]:
    """The plain formula on CPUs, where the fused attention's backward pass is several times slower for so few keys."""
    return sdpa_kernel(SDPBackend.MATH) if torch.device(device).type == "cpu" else nullcontext()


@contextmanager
def untrained(module: nn.Module) -> Iterator[None]:
    """Gradients go through the module, not to it."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


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
