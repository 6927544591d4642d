"""The preallocated key/value ring of one stream, and its sinks on their way along the frame axis."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sfrt.config import ModelConfig
from sfrt.device import on_device, require_memory
from sfrt.ops.attention import ATTENTION, ATTENTION_FLOAT8
from sfrt.ops.choice import Ops
from sfrt.ops.eight_bits import FLOAT8
from sfrt.ops.rolling_kv import QKV, ROLLING_KV, ROLLING_KV_FLOAT8, RingScales
from sfrt.ops.shift_keys import shift_keys
from sfrt.ring import ChunkPlan, Ring


class SinkKeys:
    """The sinks' keys in a ring whose positions are those in the window: kept as written, and moved on from there.

    Nothing is kept or done where no shift is ever asked for.
    """

    def __init__(self, config: ModelConfig, ring: Ring, keys: Tensor, tokens: int) -> None:
        """keys is the ring that they lie in, [..., slots · tokens, d]."""
        self._features = 2 * config.rotary_pairs[0]  # of the frame axis: only these depend on the position
        self._base = config.rotary_base
        self._keys = keys
        self._tokens = tokens
        count = ring.sink if ring.positions == "window" else 0
        shape = (count, *keys.shape[:-2], tokens, self._features)
        self._written = torch.empty(shape, device=keys.device, dtype=keys.dtype)
        self._kept = False

    def place(self, shift: int, slots: Sequence[int]) -> None:
        """Have the sinks, which lie in these slots, seen so many positions beyond those that they were written at."""
        if shift:
            places = [self._place(slot) for slot in slots]
            if not self._kept:
                for written, place in zip(self._written, places, strict=True):
                    written.copy_(place)
                self._kept = True  # before they move: whatever interrupts that, these are as they were written
            for written, place in zip(self._written, places, strict=True):
                place.copy_(shift_keys(written, shift, self._base))
        else:
            self._kept = False

    def state(self) -> dict[str, Tensor]:
        """The keys as written, where they have moved on from there: memory of this ring."""
        return {"sinks": self._written} if self._kept else {}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of another one gave."""
        self._kept = "sinks" in state
        if self._kept:
            self._written.copy_(state["sinks"])

    def _place(self, slot: int) -> Tensor:
        return self._keys[..., slot * self._tokens : (slot + 1) * self._tokens, : self._features]


class KVCache:
    """Keys and values of every layer in ring slots, each [layers, H, slots · tokens, d]; written in place, never moved.

    tokens is the number of tokens per latent frame. With scales, the ring holds e4m3 values. Between `place` and the
    next one, every pass writes the same slots. Raises DeviceError where the memory is not there.
    """

    def __init__(
        self,
        config: ModelConfig,
        ring: Ring,
        tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        ops: Ops,
        scales: RingScales | None = None,
    ) -> None:
        shape = (config.num_layers, config.num_heads, ring.slots * tokens, config.head_dim)
        dtype = dtype if scales is None else FLOAT8
        needed = 2 * math.prod(shape) * dtype.itemsize
        require_memory(needed, f"a ring of {ring.slots} latent frames of {tokens} tokens", device)
        # Left as it comes: a slot is seen only once a frame was written to it.
        self.k = torch.empty(shape, device=device, dtype=dtype)
        self.v = torch.empty(shape, device=device, dtype=dtype)
        self.tokens = tokens
        self._scales = scales
        self._rolling_kv = ops(ROLLING_KV if scales is None else ROLLING_KV_FLOAT8)
        self._attention: Callable[..., Tensor] = ops(ATTENTION) if scales is None else ops(ATTENTION_FLOAT8)
        self._sinks = SinkKeys(config, ring, self.k, tokens)
        self._sink_slots = range(ring.sink)
        self._visible = 0
        self._slots: dict[int, Tensor] = {}  # by the frames of a chunk; each stays where it is, for captured passes
        self._placed = 0

    def place(self, plan: ChunkPlan) -> None:
        """Choose where the coming passes write and what they see."""
        self._sinks.place(plan.sink_shift, self._sink_slots)
        self._visible = plan.visible * self.tokens
        self._placed = len(plan.slots)
        slots = on_device(plan.slots, self.k.device)
        self._slots.setdefault(self._placed, slots).copy_(slots)

    @property
    def place_key(self) -> tuple[int, int]:
        """What of the place is built into work that is captured there: frames placed, keys in view."""
        return self._placed, self._visible

    def state(self) -> dict[str, Tensor]:
        """The slots that hold anything, and the sinks: the ring's own memory."""
        return {"k": self.k[:, :, : self._visible], "v": self.v[:, :, : self._visible], **self._sinks.state()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state` of a ring of the same shape gave."""
        self._visible = state["k"].shape[2]
        self.k[:, :, : self._visible] = state["k"]
        self.v[:, :, : self._visible] = state["v"]
        self._sinks.load_state(state)

    def attend(self, layer: int, qkv: QKV) -> Tensor:
        """Write the chunk's keys and values to their slots and attend to all that is visible; [L, H, d]."""
        q = self._write(layer, qkv)
        seen = self.k[layer, :, : self._visible], self.v[layer, :, : self._visible]
        return self._attention(q, *seen, *self._scales_of(layer))

    def write(self, layer: int, qkv: QKV) -> None:
        """Write the chunk's keys and values to their slots."""
        self._write(layer, qkv)

    def _write(self, layer: int, qkv: QKV) -> Tensor:
        """The queries, [L, H, d]."""
        ring = self.k[layer], self.v[layer]
        slots = self._slots[self._placed]
        product = qkv.product, qkv.norm_q, qkv.norm_k, qkv.rotary
        q, _, _ = self._rolling_kv(*product, slots, *ring, qkv.eps, *self._scales_of(layer))
        return q

    def _scales_of(self, layer: int) -> tuple[Tensor, ...]:
        return () if self._scales is None else (self._scales.k[layer], self._scales.v[layer])
