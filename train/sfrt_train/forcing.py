"""One pass over whole clips, with the past that a way of training gives every chunk: who attends to whom.

- teacher: the true past. A sequence holds every chunk twice, clean and noisy. Clean chunks attend to what a refresh
  pass would see, noisy ones to what a denoising pass would see, and the ring that streams decides which chunks those
  are: one pass computes exactly what inference computes chunk by chunk, with the true past in the cache.
- diffusion: the past as noisy as it happens to be, each chunk at a noise level of its own (arXiv 2407.01392).
- none: no past, all chunks see each other. Not a model that streams, but one that judges a video as a whole.

Self Forcing replaces the past by the model's own rollout: sfrt_train.rollout (arXiv 2506.08009, section 3.2).

Shapes: B clips, G chunks, N chunks in the sequence, L tokens a chunk, P features a token, H heads of d, S text slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.config import StreamConfig
from sfrt.ops.attention import attention
from sfrt.ops.rolling_kv import QKV
from sfrt.ring import ring_for
from sfrt.transformer import Modulation, Residual, TextKV, Transformer, rotary_phases
from sfrt_train.settings import Forcing, Shaped


@dataclass(frozen=True)
class ClipPass:
    """What does not change from step to step: which chunks lie in the sequence, and what each attends to.

    All queries of a chunk see the same frames, so attention is one small product per chunk over what it sees, not a
    masked one over the whole sequence (a quarter of the work).
    """

    clean: int
    """How many clean chunks lie before the noisy ones; these leave out the last, which nobody looks back at."""
    chunks: Tensor
    """int64 [N]: the chunk of the clip that each one of the sequence is."""
    seen: Tensor
    """int64 [N, K]: the frames of the sequence each chunk attends to, filled up with any where they are fewer."""
    hidden: Tensor
    """float32 [N, 1, 1, K·tokens]: -inf at what only fills up, else 0."""
    rotary: Tensor
    """complex64 [N, L, 1, d/2]"""
    fused: bool = False
    """Whether attention is one fused product: where all see all, on GPUs. The plain formula's logits would be
    51 GB at 21 frames of 1560 tokens; on CPUs it is faster for the few tokens there are."""

    @classmethod
    def of(cls, forcing: Forcing, settings: Shaped, chunks: int, device: str) -> ClipPass:
        """The sequence for clips of so many chunks."""
        stream, model = settings.stream, settings.transformer
        grid = Grid.of(model, stream)
        clean = chunks - 1 if forcing == "teacher" else 0
        order = torch.tensor([*range(clean), *range(chunks)])
        visible = visible_frames(forcing, stream, chunks)
        most = max(map(len, visible))
        seen = torch.tensor([frames + frames[:1] * (most - len(frames)) for frames in visible])
        filler = torch.arange(most) >= torch.tensor([[len(frames)] for frames in visible])
        hidden = torch.zeros(filler.shape).masked_fill(filler, float("-inf")).repeat_interleave(grid.tokens, 1)
        phases = rotary_phases(model, range(chunks * stream.chunk), grid.rows, grid.columns, torch.device("cpu"))
        rotary = phases.unflatten(0, (chunks, -1))[order]
        return cls(
            clean,
            order.to(device),
            seen.to(device),
            hidden[:, None, None].to(device),
            rotary.to(device),
            fused=forcing == "none" and torch.device(device).type != "cpu",
        )

    def flow(
        self, model: Transformer, noisy: Tensor, timesteps: Tensor, text: TextKV, clean: Tensor | None = None
    ) -> Tensor:
        """The flow at the noisy chunks [B, G, L, P], float32.

        timesteps [B, G] and text [layers, B, G, H, S, d] are those of the chunks; clean, of noisy's shape, is the past
        where the sequence has clean chunks.
        """
        tokens, when = noisy, timesteps
        if self.clean:
            assert clean is not None, "teacher forcing needs the true past"
            tokens = torch.cat((clean[:, : self.clean], noisy), dim=1)
            when = torch.cat((torch.zeros_like(timesteps[:, : self.clean]), timesteps), dim=1)
        flow: Tensor = model(tokens, _modulation(model, when), self.rotary, self._text(text), self.attend)
        return flow[:, self.clean :].float()

    def features(
        self, model: Transformer, noisy: Tensor, timesteps: Tensor, text: TextKV, layers: Sequence[int]
    ) -> list[Tensor]:
        """What some layers make of the noisy chunks, each [B, G, L, D]; as flow, for sequences without clean chunks."""
        modulation, text = _modulation(model, timesteps), self._text(text)
        residual, found = Residual(model.patch_embedding(noisy)), []
        for layer, block in enumerate(model.layers()):
            residual = block(residual, layer, modulation.blocks[layer], self.rotary, text, self.attend)
            if layer in layers:
                assert residual.branch is not None and residual.gate is not None
                found.append(residual.x + residual.branch * residual.gate)
        return found

    def _text(self, text: TextKV) -> TextKV:
        """That of the sequence's chunks."""
        return TextKV(text.k[:, :, self.chunks], text.v[:, :, self.chunks])

    def attend(self, layer: int, qkv: QKV) -> Tensor:
        """Self attention of the whole sequence, [B, N, L, H, d]."""
        q, k, v = qkv.split()
        if self.fused:
            k, v = (part.flatten(1, 2).transpose(1, 2) for part in (k, v))
            return attention(q.flatten(1, 2), k, v).view(q.shape)
        k, v = (self._gather(part) for part in (k, v))
        logits = torch.matmul(q.transpose(2, 3), k.permute(0, 1, 3, 4, 2)).float()
        weights = (logits * q.shape[-1] ** -0.5 + self.hidden).softmax(-1).to(v.dtype)
        return torch.matmul(weights, v.transpose(2, 3)).transpose(2, 3)

    def _gather(self, part: Tensor) -> Tensor:
        """Keys or values [B, N, L, H, d] -> those each chunk sees, [B, N, K·tokens, H, d]."""
        chunks, most = self.seen.shape
        tokens = self.hidden.shape[-1] // most
        frames: Tensor = part.flatten(1, 2).unflatten(1, (-1, tokens))
        seen: Tensor = frames.index_select(1, self.seen.flatten()).unflatten(1, (chunks, most))
        return seen.flatten(2, 3)


def _modulation(model: Transformer, timesteps: Tensor) -> Modulation:
    """That of timesteps [B, N], for tokens [B, N, L, …]."""
    with torch.autocast(timesteps.device.type, enabled=False):
        table = model.modulation(timesteps)
    return Modulation(table.blocks.unsqueeze(-2), table.head.unsqueeze(-2))


def visible_frames(forcing: Forcing, stream: StreamConfig, chunks: int) -> list[list[int]]:
    """The frames of the sequence that each of its chunks sees: what the streaming ring shows it, or all."""
    count = chunks * stream.chunk
    if forcing == "none":
        return [list(range(count))] * chunks
    ring, clean_count = ring_for(stream, count), count - stream.chunk if forcing == "teacher" else 0
    clean, noisy = [], []
    for start in range(0, count, stream.chunk):
        own = range(start, start + stream.chunk)
        past = ring.context(start, stream.chunk)
        clean.append([*past, *own])
        noisy.append([*past, *(clean_count + frame for frame in own)])
    return clean[:-1] + noisy if forcing == "teacher" else noisy
