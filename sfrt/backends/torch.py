"""Plain torch, eager on a CPU, captured on a GPU: the backend that the others are measured against."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.bundle.quantization import Quantization, in_dtype
from sfrt.cache import KVCache
from sfrt.capture import Launcher, Work, launcher_by, recorder_for
from sfrt.config import ModelConfig
from sfrt.errors import DeviceError
from sfrt.ops.choice import Ops
from sfrt.ops.eight_bits import has_float8
from sfrt.ops.linear import pack_for_cpu
from sfrt.ops.quantized_linear import place_quantized
from sfrt.ops.rolling_kv import RingScales
from sfrt.ring import ChunkPlan, ChunkSizes, Ring
from sfrt.transformer import Modulation, TextKV, Transformer, rotary_phases
from sfrt.weights import assign

_PACKED_FOR_ROWS = 192  # oneDNN's layout hardly depends on it; about a small chunk's tokens


class TorchBackend:
    """The transformer's weights on one device in one dtype."""

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, Tensor],
        device: torch.device,
        dtype: torch.dtype,
        quantization: Quantization | None = None,
        ops: Ops | None = None,
    ) -> None:
        """Take over a bundle's transformer tensors, as they are where device and dtype fit; the mapping is emptied.

        quantization is what the bundle's manifest says of them; ops, what to run with, None being the device's choice.
        """
        self.ops = ops or Ops(device)
        self.config = config
        self.device = device
        self.dtype = dtype
        self._modulations: dict[float, Modulation] = {}
        self._recorder = recorder_for(device)
        with torch.device("meta"):
            self.model = Transformer(config, self.ops)
        if quantization is not None:
            place_quantized(self.model, quantization.method, quantization.layers, self.ops)
        # The module alone is to hold the weights, so that converting and packing let them go layer by layer.
        ready = {name: in_dtype(name, weights.pop(name).to(device), dtype) for name in list(weights)}
        assign(self.model, ready, "the transformer")
        del ready
        self.model.requires_grad_(False)
        if device.type == "cpu":
            for part in (self.model.patch_embedding, self.model.text_embedding, self.model.blocks, self.model.head):
                pack_for_cpu(part, _PACKED_FOR_ROWS)

    def _ring_scales(self, modulations: Sequence[Modulation]) -> RingScales:
        """Raises DeviceError for a GPU without float8."""
        if self.device.type == "cuda" and not has_float8(self.device):
            raise DeviceError(
                f"a ring in float8 needs a GPU of compute capability 8.9 or later, and {self.device} is none; "
                "leave the stream's ring_dtype at 'model'"
            )
        return self.model.ring_scales(modulations)

    @torch.inference_mode()
    def rollout(self, grid: Grid, ring: Ring, sizes: ChunkSizes, timesteps: tuple[float, ...]) -> TorchRollout:
        """A fresh stream with its modulation tables made."""
        modulations = {timestep: self._modulation(timestep) for timestep in timesteps}
        scales = self._ring_scales(tuple(modulations.values())) if ring.dtype == "float8" else None
        cache = KVCache(self.config, ring, grid.tokens, self.device, self.dtype, self.ops, scales)
        return TorchRollout(self, grid, cache, modulations, launcher_by(self._recorder))

    def _modulation(self, timestep: float) -> Modulation:
        """The tables of a timestep, made once for all streams of this backend."""
        if timestep not in self._modulations:
            table = self.model.modulation(torch.tensor(timestep, device=self.device))
            self._modulations[timestep] = Modulation(table.blocks.to(self.dtype), table.head.to(self.dtype))
        return self._modulations[timestep]


class TorchRollout:
    """One stream's ring and prompt on a TorchBackend."""

    def __init__(
        self,
        backend: TorchBackend,
        grid: Grid,
        cache: KVCache,
        modulations: dict[float, Modulation],
        launcher: Launcher,
    ) -> None:
        self._backend = backend
        self._grid = grid
        self._cache = cache
        self._modulations = modulations
        self._launcher = launcher
        self._text: TextKV | None = None
        self._phases: dict[int, Tensor] = {}  # by the frames of a chunk
        self._rotary: Tensor

    @torch.inference_mode()
    def set_text(self, embeds: Tensor) -> None:
        text = self._backend.model.text_kv(embeds.to(self._backend.device, self._backend.dtype))
        if self._text is None:
            self._text = text
        else:
            self._text.k.copy_(text.k)
            self._text.v.copy_(text.v)

    @torch.inference_mode()
    def place(self, plan: ChunkPlan) -> None:
        self._cache.place(plan)
        config, grid = self._backend.config, self._grid
        phases = rotary_phases(config, plan.positions, grid.rows, grid.columns, self._backend.device)
        self._rotary = self._phases.setdefault(len(plan.frames), phases)
        self._rotary.copy_(phases)

    def launch(self, key: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        return self._launcher.launch((key, self._cache.place_key), work, *inputs)

    @torch.inference_mode()
    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        assert self._text is not None, "a prompt comes first"
        modulation = self._modulations[timestep]
        x = tokens.to(self._backend.dtype)
        flow: Tensor = self._backend.model(x, modulation, self._rotary, self._text, self._cache.attend)
        return flow

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        self.launch(("refresh", timestep), partial(self._refresh, timestep), tokens)

    @torch.inference_mode()
    def _refresh(self, timestep: float, tokens: Tensor) -> tuple[Tensor, ...]:
        """All it makes lies in the ring."""
        assert self._text is not None, "a prompt comes first"
        x = tokens.to(self._backend.dtype)
        cache, modulation = self._cache, self._modulations[timestep]
        self._backend.model.refresh(x, modulation, self._rotary, self._text, cache.attend, cache.write)
        return ()

    def state(self) -> dict[str, Tensor]:
        return self._cache.state()

    @torch.inference_mode()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._cache.load_state(state)
