"""A golden rollout, run through the runtime's own session with the golden noise and compared call by call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfrt.backends import Backend, Grid, Rollout
from sfrt.capture import Eager
from sfrt.config import ModelConfig, StreamConfig
from sfrt.errors import CheckpointError
from sfrt.ops.layout import latents_from_tokens, tokens_from_latents
from sfrt.ring import ChunkPlan, chunk_sizes, ring_for
from sfrt.session import Session
from sfrt.stage import NoiseSource, Stage
from sfrt.timesteps import sigma_at, timesteps_of
from sfrt_export.checkpoint import load_transformer
from sfrt_export.layout import module_tensors
from sfrt_export.parts_on import transformer_on


class RecordingRollout(Eager):
    """A rollout that keeps what goes in and out of every pass; a refresh pass is run in full as well, for its flow."""

    def __init__(self, rollout: Rollout) -> None:
        self._rollout = rollout
        self.calls: list[tuple[float, Tensor, Tensor]] = []

    def set_text(self, embeds: Tensor) -> None:
        self._rollout.set_text(embeds)

    def place(self, plan: ChunkPlan) -> None:
        self._rollout.place(plan)

    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        flow = self._rollout.flow(tokens, timestep)
        self.calls.append((timestep, tokens.clone(), flow.float().clone()))
        return flow

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        self.flow(tokens, timestep)
        self._rollout.flow(torch.zeros_like(tokens), timestep)  # so that it is refresh whose keys and values are judged
        self._rollout.refresh(tokens, timestep)

    def state(self) -> dict[str, Tensor]:
        return self._rollout.state()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._rollout.load_state(state)


def replay_rollout(
    case: Path,
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, here, golden) of x, flow and x0 of every model call and of the final latents, in the rollout's order.

    The rollout is this machine's own from the first noise on: errors add up as they would in a stream.
    """
    model = _model(settings["model"])
    stream = _stream(settings)
    checkpoint = load_transformer(case.parent / settings["weights"], heads=model.num_heads, text_len=model.text_len)
    if checkpoint.config != model:
        raise CheckpointError(f"{case}: the weights are of {checkpoint.config}, the case is of {model}")
    weights = {
        name: tensor.make().to(device, dtype) for name, tensor in module_tensors(model, checkpoint.tensors).items()
    }
    embeds, wanted = tensors["prompt_embeds"], [tensors["noise"].shape[0], model.text_len, model.text_dim]
    if list(embeds.shape) != wanted:
        raise CheckpointError(f"{case}: prompt_embeds is {list(embeds.shape)}, not {wanted}; the case is inconsistent")
    initial = tensors.get("initial_latent")
    frames = settings["num_output_frames"] + (0 if initial is None else initial.shape[1])
    with transformer_on(
        backend, model, weights, device, dtype, stream, frames, any_start=initial is not None
    ) as running:
        for row in range(len(embeds)):
            yield from _replay_row(settings, tensors, running, model, stream, row)


def _replay_row(
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    running: Backend,
    model: ModelConfig,
    stream: StreamConfig,
    row: int,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """One row of the case's batch, as a stream of its own."""
    initial, device = tensors.get("initial_latent"), running.device
    first = 0 if initial is None else initial.shape[1]
    ring = ring_for(stream, first + settings["num_output_frames"])
    grid = Grid.of(model, stream)
    rollout = RecordingRollout(running.rollout(grid, ring, chunk_sizes(stream, first), timesteps_of(stream)))
    noise = _golden_noise(settings, tensors, model, row, first, device)
    stage = Stage(model, stream, grid, device, rollout, ring, noise, decoder=None)
    start = None if initial is None else initial[row].to(device)
    limit = len({call["start_frame"] for call in settings["calls"] if call["start_frame"] >= first})
    with Session(stage, tensors["prompt_embeds"][row], initial=start, limit=limit) as session:
        chunks = [chunk.latents for chunk in session]
        session.refresh()
    latents = torch.cat(chunks if start is None else [start, *chunks])
    yield from _calls(settings, tensors, rollout, row, model, grid)
    yield "latents", latents, tensors["latents"][row]


def _calls(
    settings: dict[str, Any],
    tensors: dict[str, Tensor],
    rollout: RecordingRollout,
    row: int,
    model: ModelConfig,
    grid: Grid,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    if len(rollout.calls) != len(settings["calls"]):
        raise CheckpointError(
            f"the case has {len(settings['calls'])} model calls, the rollout made {len(rollout.calls)}"
        )
    for number, (timestep, x, flow) in enumerate(rollout.calls):
        x0 = x - sigma_at(timestep, settings["timestep_shift"]) * flow
        for name, tokens in (("x", x), ("flow", flow), ("x0", x0)):
            key = f"call.{number:03d}.{name}"
            yield key, latents_from_tokens(tokens, model, grid.rows, grid.columns), tensors[key][row]


def _golden_noise(
    settings: dict[str, Any], tensors: dict[str, Tensor], model: ModelConfig, row: int, first: int, device: torch.device
) -> NoiseSource:
    """The noise each chunk starts from by frame, and what is mixed in between its steps in the order it was drawn."""
    names = sorted(name for name in tensors if name.startswith("renoise."))
    drawn = iter(names)
    batch = tensors["noise"].shape[0]

    def draw() -> Tensor:
        name = next(drawn, None)
        if name is None:
            raise CheckpointError(f"the case has {len(names)} tensors renoise.… and needs more; copy the folder again")
        return tensors[name]

    def normals(frames: range, steps: int) -> Tensor:
        start = tensors["noise"][row, frames.start - first : frames.stop - first]
        mixed = [draw().unflatten(0, (batch, -1))[row] for _ in range(steps - 1)]
        return torch.stack([tokens_from_latents(noise, model) for noise in (start, *mixed)]).to(device)

    return normals


def _model(settings: dict[str, Any]) -> ModelConfig:
    names = ("dim", "ffn_dim", "num_heads", "num_layers", "freq_dim", "text_dim", "text_len", "eps")
    patch_size = tuple(settings["patch_size"])
    return ModelConfig(
        **{name: settings[name] for name in names}, latent_channels=settings["in_dim"], patch_size=patch_size
    )


def _stream(settings: dict[str, Any]) -> StreamConfig:
    window = settings["window_frames"]
    rows, columns = settings["latent_hw"]
    return StreamConfig(
        chunk=settings["frames_per_chunk"],
        first_chunk=1 if settings["independent_first_frame"] else None,
        window=None if window < 0 else window,
        sink=settings["sink_frames"],
        steps=tuple(settings["denoising_step_list"]),
        warp=settings["warp_denoising_step"],
        shift=settings["timestep_shift"],
        context_noise=settings["context_noise"],
        height=8 * rows,
        width=8 * columns,
    )
