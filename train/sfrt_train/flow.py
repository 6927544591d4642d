"""Flow matching with teacher forcing on the chunk-causal mask: every chunk is denoised beside its clean past.

A training sequence holds every chunk twice, clean and noisy. Clean chunks attend to what a refresh pass would see,
noisy ones to what a denoising pass would see, and the ring that streams decides which chunks those are: so one pass
over the sequence computes exactly what inference computes chunk by chunk, with the true past in the cache. (Self
Forcing replaces that past by the model's own rollout: arXiv 2506.08009, section 3.2.)

Shapes: B clips, G chunks, L tokens a chunk, P features a token, S text slots.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfrt.backends import Grid
from sfrt.config import StreamConfig
from sfrt.ring import ring_for
from sfrt.text import Umt5Encoder
from sfrt.transformer import Modulation, TextKV, Transformer, rotary_phases
from sfrt_train import reading
from sfrt_train.clips import Clips, make_clips
from sfrt_train.loop import Loop, LoopSettings, Losses
from sfrt_train.settings import FlowSettings, Settings

NAME = "flow"


class FlowModel(nn.Module):
    """The transformer, and the text encoder it hears, which can read already (sfrt_train.reading) and stays so."""

    def __init__(self, settings: Settings) -> None:
        super().__init__()
        self.transformer = Transformer(settings.transformer)
        self.text_encoder = Umt5Encoder(settings.text)
        for module in self.transformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.zeros_(self.transformer.head.linear.weight)  # starts as "no flow"

    def text_kv(self, ids: Tensor, prompt: Tensor) -> TextKV:
        """Text keys and values [layers, B, G, S, H, d] from ids [B, 2, S] and which of them chunks follow [B, G]."""
        flat = ids.flatten(0, 1)
        embeds = self.text_encoder(flat, flat != 0).unflatten(0, ids.shape[:2])
        pair = self.transformer.text_kv(embeds)
        clip = torch.arange(len(ids), device=ids.device)[:, None]
        return TextKV(pair.k[:, clip, prompt], pair.v[:, clip, prompt])


@dataclass(frozen=True)
class TeacherForcing:
    """What does not change from step to step: who attends to whom, and where each token is.

    The sequence is the clean chunks but the last, which nobody looks back at, then all noisy ones. All queries of a
    chunk see the same frames, so attention is one small product per chunk over what it sees, not a masked one over the
    whole sequence (a quarter of the work).
    """

    seen: Tensor
    """int64 [2·G - 1, K]: the frames of the sequence each chunk attends to, filled up with any where they are fewer."""
    hidden: Tensor
    """float32 [2·G - 1, 1, 1, K·tokens]: -inf at what only fills up, else 0."""
    rotary: Tensor
    """complex64 [2·G - 1, L, 1, d/2]"""

    @classmethod
    def of(cls, settings: Settings, chunks: int, device: str) -> TeacherForcing:
        stream, model = settings.stream, settings.transformer
        grid = Grid.of(model, stream)
        visible = visible_frames(stream, chunks)
        most = max(map(len, visible))
        seen = torch.tensor([frames + frames[:1] * (most - len(frames)) for frames in visible])
        filler = torch.arange(most) >= torch.tensor([[len(frames)] for frames in visible])
        hidden = torch.zeros(filler.shape).masked_fill(filler, float("-inf")).repeat_interleave(grid.tokens, 1)
        phases = rotary_phases(model, range(chunks * stream.chunk), grid.rows, grid.columns, torch.device(device))
        rotary = phases.unflatten(0, (chunks, -1))
        return cls(seen.to(device), hidden[:, None, None].to(device), torch.cat((rotary[:-1], rotary)))

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Self attention of the whole sequence, [B, 2·G - 1, L, H, d] each."""
        k, v = (self._gather(part) for part in (k, v))
        logits = torch.matmul(q.transpose(2, 3), k.permute(0, 1, 3, 4, 2)).float()
        weights = (logits * q.shape[-1] ** -0.5 + self.hidden).softmax(-1).to(v.dtype)
        return torch.matmul(weights, v.transpose(2, 3)).transpose(2, 3)

    def _gather(self, part: Tensor) -> Tensor:
        """Keys or values [B, 2·G - 1, L, H, d] -> those each chunk sees, [B, 2·G - 1, K·tokens, H, d]."""
        chunks, most = self.seen.shape
        tokens = self.hidden.shape[-1] // most
        frames = part.flatten(1, 2).unflatten(1, (-1, tokens))
        return frames.index_select(1, self.seen.flatten()).unflatten(1, (chunks, most)).flatten(2, 3)

    def flow(self, model: FlowModel, clean: Tensor, noisy: Tensor, timesteps: Tensor, clips: Clips) -> Tensor:
        """The flow at the noisy chunks [B, G, L, P], their timesteps [B, G], with the clean chunks as their past."""
        both = torch.cat((clean[:, :-1], noisy), dim=1)
        when = torch.cat((torch.zeros_like(timesteps[:, :-1]), timesteps), dim=1)
        with torch.autocast(both.device.type, enabled=False):
            table = model.transformer.modulation(when)
        modulation = Modulation(table.blocks.unsqueeze(-2), table.head.unsqueeze(-2))
        text = model.text_kv(clips.ids, torch.cat((clips.prompt[:, :-1], clips.prompt), dim=1))
        flow: Tensor = model.transformer(both, modulation, self.rotary, text, self.attend)
        return flow[:, -clean.shape[1] :]


def visible_frames(stream: StreamConfig, chunks: int) -> list[list[int]]:
    """The frames of the sequence that each of its chunks sees, as the streaming ring has it."""
    ring, count = ring_for(stream), chunks * stream.chunk
    clean_count = count - stream.chunk
    clean, noisy = [], []
    for start in range(0, count, stream.chunk):
        plan = ring.plan(start, stream.chunk)
        own = list(plan.frames)
        past = [frame for frame in ring.visible_frames(plan) if frame not in plan.frames]
        clean.append(past + own)
        noisy.append(past + [clean_count + frame for frame in own])
    return clean[:-1] + noisy


def train(settings: Settings, folder: Path, device: str, until: int | None = None) -> None:
    """Train to the end, or to step `until`, going on from the checkpoint in `folder`."""
    own = settings.flow
    clips = make_clips(settings, folder, device)
    torch.manual_seed(settings.seed)
    model = FlowModel(settings).to(device)
    model.text_encoder.load_state_dict(reading.weights(folder))
    model.text_encoder.requires_grad_(False)
    forcings = {length: TeacherForcing.of(settings, length, device) for length in own.lengths}

    def losses_of(step: int) -> Losses:
        rng = np.random.default_rng((settings.seed, 5, step))
        length = own.lengths[step % len(own.lengths)]
        picked = torch.from_numpy(rng.integers(len(clips), size=own.batch_chunks // (2 * length - 1)))
        batch = clips.pick(picked, length, device)
        # The plain formula: on CPUs the fused attention's backward pass is several times slower for so few keys.
        with torch.autocast(batch.tokens.device.type, torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            return losses(model, forcings[length], batch, rng, own)

    loop = LoopSettings(own.steps, own.learning_rate, own.warmup, own.decay, own.weight_decay, own.ema)
    Loop(model, loop, folder, NAME).run(losses_of, until)


def losses(
    model: FlowModel, forcing: TeacherForcing, clips: Clips, rng: np.random.Generator, settings: FlowSettings
) -> Losses:
    """The squared error of the flow, every chunk at a noise level of its own."""
    clean = clips.tokens
    sigma = noise_levels(clean.shape[:2], rng, settings.shift, clean.device)
    noise = _normals(clean.shape, rng, clean.device)
    noisy = torch.lerp(clean, noise, sigma[..., None, None])
    amount = settings.context_noise * torch.from_numpy(rng.random(clean.shape[:2], np.float32)).to(clean.device)
    context = torch.lerp(clean, _normals(clean.shape, rng, clean.device), amount[..., None, None])
    flow = forcing.flow(model, context, noisy, 1000 * sigma, clips).float()
    error = (flow - (noise - clean)).square().mean(dim=(2, 3))
    return {"loss": error.mean(), "high": _mean_where(error, sigma > 0.8), "low": _mean_where(error, sigma <= 0.5)}


def noise_levels(shape: tuple[int, ...], rng: np.random.Generator, shift: float, device: torch.device) -> Tensor:
    """Sigmas in (0, 1), warped by the shift; spread evenly over the batch, which steadies the loss."""
    count = int(np.prod(shape))
    even = (rng.permutation(count) + rng.random(count)) / count
    return torch.from_numpy(shift * even / (1 + (shift - 1) * even)).float().view(shape).to(device)


def _normals(shape: tuple[int, ...], rng: np.random.Generator, device: torch.device) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape, np.float32)).to(device)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    return (values.detach() * where).sum() / where.sum().clamp(min=1)
