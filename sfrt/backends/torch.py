"""Plain eager torch, on a CPU or a GPU: the backend that the others are measured against."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from sfrt.backends import Grid
from sfrt.bundle.quantization import Quantization, in_dtype
from sfrt.cache import KVCache
from sfrt.config import ModelConfig
from sfrt.ops.choice import Ops
from sfrt.ops.linear import pack_for_cpu
from sfrt.ops.quantized_linear import place_quantized
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
        with torch.device("meta"):
            self.model = Transformer(config, self.ops)
        if quantization is not None:
            place_quantized(self.model, quantization.method, quantization.layers)
        # The module alone is to hold the weights, so that converting and packing let them go layer by layer.
        ready = {name: in_dtype(name, weights.pop(name).to(device), dtype) for name in list(weights)}
        assign(self.model, ready, "the transformer")
        del ready
        self.model.requires_grad_(False)
        if device.type == "cpu":
            for part in (self.model.patch_embedding, self.model.text_embedding, self.model.blocks, self.model.head):
                pack_for_cpu(part, _PACKED_FOR_ROWS)

    @torch.inference_mode()
    def rollout(self, grid: Grid, ring: Ring, sizes: ChunkSizes, timesteps: tuple[float, ...]) -> TorchRollout:
        """A fresh stream with its modulation tables made."""
        cache = KVCache(self.config, ring, grid.tokens, self.device, self.dtype, self.ops)
        return TorchRollout(self, grid, cache, {timestep: self._modulation(timestep) for timestep in timesteps})

    def _modulation(self, timestep: float) -> Modulation:
        """The tables of a timestep, made once for all streams of this backend."""
        if timestep not in self._modulations:
            table = self.model.modulation(torch.tensor(timestep, device=self.device))
            self._modulations[timestep] = Modulation(table.blocks.to(self.dtype), table.head.to(self.dtype))
        return self._modulations[timestep]


class TorchRollout:
    """One stream's ring and prompt on a TorchBackend."""

    def __init__(self, backend: TorchBackend, grid: Grid, cache: KVCache, modulations: dict[float, Modulation]) -> None:
        self._backend = backend
        self._grid = grid
        self._cache = cache
        self._modulations = modulations
        self._text: TextKV
        self._rotary: Tensor

    @torch.inference_mode()
    def set_text(self, embeds: Tensor) -> None:
        self._text = self._backend.model.text_kv(embeds.to(self._backend.device, self._backend.dtype))

    @torch.inference_mode()
    def place(self, plan: ChunkPlan) -> None:
        self._cache.place(plan)
        config, grid = self._backend.config, self._grid
        self._rotary = rotary_phases(config, plan.positions, grid.rows, grid.columns, self._backend.device)

    @torch.inference_mode()
    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        modulation = self._modulations[timestep]
        x = tokens.to(self._backend.dtype)
        flow: Tensor = self._backend.model(x, modulation, self._rotary, self._text, self._cache.attend)
        return flow

    @torch.inference_mode()
    def refresh(self, tokens: Tensor, timestep: float) -> None:
        modulation = self._modulations[timestep]
        x = tokens.to(self._backend.dtype)
        self._backend.model.refresh(x, modulation, self._rotary, self._text, self._cache.attend, self._cache.write)

    def state(self) -> dict[str, Tensor]:
        return self._cache.state()

    @torch.inference_mode()
    def load_state(self, state: Mapping[str, Tensor]) -> None:
        self._cache.load_state(state)
