"""What backends that run exported graphs have in common: the buffers of a stream, and a rollout over them.

Every tensor a pass reads or writes has one address for as long as the stream lasts, so that a graph is bound to them
once and a pass is nothing but running it. The key/value rings go in and come out at the same address: written in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from sfrt import graphs
from sfrt.backends import Grid
from sfrt.cache import SinkKeys
from sfrt.capture import Eager
from sfrt.config import ModelConfig
from sfrt.device import require_memory
from sfrt.errors import SnapshotError
from sfrt.graphs import GraphName
from sfrt.ring import BlockRing, ChunkPlan, ChunkSizes, Ring
from sfrt.transformer import rotary_phases, timestep_embedding


class Runner(Protocol):
    """Exported graphs on one device, in one dtype."""

    device: torch.device
    dtype: torch.dtype
    on_host: frozenset[str]
    """Inputs that lie in main memory, because what is computed is decided by their values."""

    def bind(self, graph: GraphName, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Callable[[], None]:
        """A run of the graph over these very tensors, as often as it is called; the caller keeps them alive.

        inputs may hold more than the graph asks for.
        """

    def call(self, graph: GraphName, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All outputs of a graph, in memory made for them: for graphs whose sizes differ from run to run."""


@dataclass(frozen=True)
class Buffers:
    """The tensors of one stream, at full size: the last axis but one of the rings has R tokens, a chunk at most L."""

    tokens: Tensor  # float32 [L, P]
    flow: Tensor  # float32 [L, P]
    cos: Tensor  # float32 [L, d/2]
    sin: Tensor
    step: Tensor  # int64 []
    write_at: Tensor  # int64 [1]
    valid: Tensor  # int64 [1]
    visible: Tensor  # bool [1, R]
    hidden: Tensor  # [L, D], from refresh to flow
    queries: Tensor  # [L, D]
    rings: tuple[Tensor, Tensor]  # keys and values, each [layers, 1, H, R, d]
    text: tuple[Tensor, Tensor]  # the same of the prompt, each [layers, 1, H, S, d]
    embeds: Tensor  # float32 [S, text_dim]
    blocks: Tensor  # modulation tables, [N, 6 · layers, D]
    head: Tensor  # [N, 2, D]

    @classmethod
    def of(cls, runner: Runner, config: ModelConfig, longest: int, slots: int, tokens: int, steps: int) -> Buffers:
        """For `steps` timesteps, chunks of at most `longest` frames of `tokens` tokens and a ring of `slots` of them.

        Raises DeviceError where memory is short.
        """
        device, longest, room = runner.device, longest * tokens, slots * tokens
        heads, d = config.num_heads, config.head_dim
        ring = (config.num_layers, 1, heads, room, d)
        text = (config.num_layers, 1, heads, config.text_len, d)
        require_memory(
            2 * math.prod(ring) * runner.dtype.itemsize, f"a ring of {slots} latent frames of {tokens} tokens", device
        )

        def zeros(*shape: int, dtype: torch.dtype = runner.dtype) -> Tensor:
            return torch.zeros(shape, device=device, dtype=dtype)

        return cls(
            tokens=zeros(longest, config.token_dim, dtype=torch.float32),
            flow=zeros(longest, config.token_dim, dtype=torch.float32),
            cos=zeros(longest, d // 2, dtype=torch.float32),
            sin=zeros(longest, d // 2, dtype=torch.float32),
            step=zeros(dtype=torch.int64),
            write_at=zeros(1, dtype=torch.int64),
            valid=zeros(1, dtype=torch.int64).to("cpu" if graphs.VALID in runner.on_host else device),
            visible=zeros(1, room, dtype=torch.bool),
            hidden=zeros(longest, config.dim),
            queries=zeros(longest, config.dim),
            # Zeros, not whatever is there: what a mask hides is still multiplied, and 0 · NaN is NaN.
            rings=(zeros(*ring), zeros(*ring)),
            text=(zeros(*text), zeros(*text)),
            embeds=zeros(config.text_len, config.text_dim, dtype=torch.float32),
            blocks=zeros(steps, 6 * config.num_layers, config.dim),
            head=zeros(steps, 2, config.dim),
        )

    def text_outputs(self) -> dict[str, Tensor]:
        """The prompt's keys and values under their graph names."""
        return {
            graphs.text(kind, layer): part
            for kind, parts in zip(graphs.KINDS, self.text, strict=True)
            for layer, part in enumerate(parts)
        }

    def pass_inputs(self, count: int, masked: bool) -> dict[str, Tensor]:
        """All that refresh reads for a chunk of `count` tokens; flow reads some of it, and what refresh leaves."""
        seen = {graphs.VISIBLE: self.visible} if masked else {graphs.VALID: self.valid}
        return {
            graphs.TOKENS: self.tokens[:count],
            graphs.STEP: self.step,
            graphs.MODULATION_BLOCKS: self.blocks,
            graphs.MODULATION_HEAD: self.head,
            graphs.ROTARY_COS: self.cos[None, :count],
            graphs.ROTARY_SIN: self.sin[None, :count],
            graphs.WRITE_AT: self.write_at,
            **seen,
            **self._rings(graphs.ring_in),
            **self.text_outputs(),
        }

    def left_for_flow(self, count: int) -> dict[str, Tensor]:
        """What refresh leaves for flow."""
        return {graphs.HIDDEN: self.hidden[:count], graphs.QUERIES: self.queries[:count]}

    def rings_out(self) -> dict[str, Tensor]:
        """The rings as refresh gives them back."""
        return self._rings(graphs.ring_out)

    def _rings(self, name: Callable[[graphs.Kind, int], str]) -> dict[str, Tensor]:
        return {
            name(kind, layer): part
            for kind, parts in zip(graphs.KINDS, self.rings, strict=True)
            for layer, part in enumerate(parts)
        }


class ExportedBackend:
    """The transformer's graphs under a runner."""

    def __init__(self, runner: Runner, config: ModelConfig) -> None:
        self.config = config
        self.device = runner.device
        self._runner = runner

    def rollout(self, grid: Grid, ring: Ring, sizes: ChunkSizes, timesteps: tuple[float, ...]) -> ExportedRollout:
        """A fresh stream with its modulation tables made."""
        return ExportedRollout(self._runner, self.config, grid, ring, sizes, timesteps)


class ExportedRollout(Eager):
    """One stream on exported graphs, which runners capture by themselves.

    slots is the ring's length where that must be more than the stream needs.
    """

    def __init__(
        self,
        runner: Runner,
        config: ModelConfig,
        grid: Grid,
        ring: Ring,
        sizes: ChunkSizes,
        timesteps: tuple[float, ...],
        slots: int | None = None,
    ) -> None:
        self._runner = runner
        self._config = config
        self._grid = grid
        self._blocks = BlockRing(ring, sizes)
        self._rows = {timestep: row for row, timestep in enumerate(timesteps)}
        slots = slots or self._blocks.slots
        self._buffers = Buffers.of(runner, config, sizes.later, slots, grid.tokens, len(timesteps))
        self._sinks = SinkKeys(config, ring, self._buffers.rings[0], grid.tokens)
        self._masked = self._blocks.has_holes
        self._count = 0
        self._fill_tables(timesteps)
        # Bound here, not when they are first run: a stream allocates nothing on its way.
        counts = {grid.tokens * size for size in (sizes.first, sizes.later)}
        self._refreshes = {count: self._bind_refresh(count) for count in counts}
        self._flows = {count: self._bind_flow(count) for count in counts}
        self._read_text = runner.bind("text_kv", {graphs.EMBEDS: self._buffers.embeds}, self._buffers.text_outputs())

    @torch.inference_mode()
    def set_text(self, embeds: Tensor) -> None:
        self._buffers.embeds.copy_(embeds)
        self._read_text()

    @torch.inference_mode()
    def place(self, plan: ChunkPlan) -> None:
        buffers, grid, tokens = self._buffers, self._grid, self._grid.tokens
        self._count = len(plan.frames) * tokens
        if plan.frames.start == 0:  # the ring is filled anew, perhaps by other sizes
            self._blocks = replace(self._blocks, sizes=replace(self._blocks.sizes, first=len(plan.frames)))
        place = self._blocks.plan(plan)
        self._sinks.place(plan.sink_shift, self._blocks.sinks)
        buffers.write_at.fill_(place.slot * tokens)
        buffers.valid.fill_(plan.visible * tokens)
        if self._masked:
            slots = torch.zeros(buffers.visible.shape[1] // tokens, dtype=torch.bool)
            slots[list(place.visible)] = True
            buffers.visible.copy_(slots.repeat_interleave(tokens)[None])
        phases = rotary_phases(self._config, plan.positions, grid.rows, grid.columns, buffers.cos.device)[:, 0]
        buffers.cos[: self._count] = phases.real
        buffers.sin[: self._count] = phases.imag

    @torch.inference_mode()
    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        """The flow lies in a buffer that the next pass writes to."""
        self.refresh(tokens, timestep)
        self._flows[self._count]()
        return self._buffers.flow[: self._count]

    @torch.inference_mode()
    def refresh(self, tokens: Tensor, timestep: float) -> None:
        if self._count not in self._refreshes:  # a piece that only the filling of a ring anew comes to
            self._refreshes[self._count] = self._bind_refresh(self._count)
        self._buffers.tokens[: self._count] = tokens
        self._buffers.step.fill_(self._rows[timestep])
        self._refreshes[self._count]()

    def state(self) -> dict[str, Tensor]:
        keys, values = self._buffers.rings
        return {"k": keys, "v": values, "first": torch.tensor(self._blocks.sizes.first), **self._sinks.state()}

    @torch.inference_mode()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """As Rollout.load_state. Raises SnapshotError where the ring is of another length: plans choose their own."""
        for ring, kept in zip(self._buffers.rings, (state["k"], state["v"]), strict=True):
            if ring.shape != kept.shape:
                raise SnapshotError(
                    f"the snapshot's ring has {kept.shape[-2]} tokens and this one {ring.shape[-2]}; "
                    "go on where the same plans are"
                )
            ring.copy_(kept)
        self._blocks = replace(self._blocks, sizes=replace(self._blocks.sizes, first=int(state["first"])))
        self._sinks.load_state(state)

    def _bind_refresh(self, count: int) -> Callable[[], None]:
        """For chunks of so many tokens."""
        buffers = self._buffers
        graph: GraphName = "refresh_masked" if self._masked else "refresh"
        outputs = {**buffers.left_for_flow(count), **buffers.rings_out()}
        return self._runner.bind(graph, buffers.pass_inputs(count, self._masked), outputs)

    def _bind_flow(self, count: int) -> Callable[[], None]:
        buffers = self._buffers
        graph: GraphName = "flow_masked" if self._masked else "flow"
        inputs = {**buffers.pass_inputs(count, self._masked), **buffers.left_for_flow(count)}
        return self._runner.bind(graph, inputs, {graphs.FLOW: buffers.flow[:count]})

    @torch.inference_mode()
    def _fill_tables(self, timesteps: tuple[float, ...]) -> None:
        embedding = timestep_embedding(torch.tensor(timesteps, device=self._runner.device), self._config.freq_dim)
        outputs = {graphs.MODULATION_BLOCKS: self._buffers.blocks, graphs.MODULATION_HEAD: self._buffers.head}
        self._runner.bind("modulation", {graphs.TIMESTEP_EMBEDDING: embedding}, outputs)()
