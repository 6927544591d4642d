"""The preallocated key/value ring of one stream."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sfrt.config import ModelConfig
from sfrt.device import require_memory
from sfrt.ops.attention import attention
from sfrt.ring import ChunkPlan, Ring


class KVCache:
    """Keys and values of every layer in ring slots, each [layers, H, slots · tokens, d]; written in place, never moved.

    tokens is the number of tokens per latent frame. Between `place` and the next one, every pass writes the same slots.
    Raises DeviceError where the memory is not there.
    """

    def __init__(self, config: ModelConfig, ring: Ring, tokens: int, device: torch.device, dtype: torch.dtype) -> None:
        shape = (config.num_layers, config.num_heads, ring.slots * tokens, config.head_dim)
        needed = 2 * math.prod(shape) * dtype.itemsize
        require_memory(needed, f"a ring of {ring.slots} latent frames of {tokens} tokens", device)
        # Left as it comes: a slot is seen only once a frame was written to it.
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.tokens = tokens
        self._visible = 0
        self._runs: tuple[tuple[slice, slice], ...] = ()

    def place(self, plan: ChunkPlan) -> None:
        """Choose where the coming passes write and what they see."""
        tokens = self.tokens
        self._visible = plan.visible * tokens
        self._runs = tuple(
            (
                slice(run.slot * tokens, (run.slot + run.count) * tokens),
                slice(run.first * tokens, (run.first + run.count) * tokens),
            )
            for run in plan.runs
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Write the chunk's k and v to their slots and attend to all that is visible; all and the result [L, H, d]."""
        self.write(layer, k, v)
        return attention(q, self.k[layer, :, : self._visible], self.v[layer, :, : self._visible])

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Write the chunk's k and v ([L, H, d]) to their slots."""
        for slots, rows in self._runs:
            self.k[layer, :, slots] = k[rows].transpose(0, 1)
            self.v[layer, :, slots] = v[rows].transpose(0, 1)
