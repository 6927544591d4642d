"""The causal DiT as ONNX graphs: `sfrt.transformer` in standard operators, the key/value ring in and out."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from sfrt import graphs
from sfrt.bundle import DTypeName
from sfrt.config import ModelConfig
from sfrt.graphs import KINDS, Kind
from sfrt_export.onnx_graph.builder import Dimension, ExternalWeights, GraphBuilder

_FLOAT, _INT64, _BOOL = ir.DataType.FLOAT, ir.DataType.INT64, ir.DataType.BOOL
_TOKENS, _RING, _STEPS = "tokens", "ring", "steps"  # sizes known when the graph runs


def refresh_graph(config: ModelConfig, weights: ExternalWeights, dtype: DTypeName, *, masked: bool) -> onnx.ModelProto:
    """`refresh`, which ends where the last layer's keys and values are; masked: see sfrt.graphs."""
    return _Pass(config, GraphBuilder(weights, dtype), masked, range(config.num_layers)).refresh()


def flow_graph(config: ModelConfig, weights: ExternalWeights, dtype: DTypeName, *, masked: bool) -> onnx.ModelProto:
    """`flow`: the last layer from its attention on, and the head."""
    return _Pass(config, GraphBuilder(weights, dtype), masked, range(config.num_layers)[-1:]).flow()


def step_graph(config: ModelConfig, weights: ExternalWeights, dtype: DTypeName) -> onnx.ModelProto:
    """`step`: both in one."""
    return _Pass(config, GraphBuilder(weights, dtype), False, range(config.num_layers)).step()


class _Pass:
    """All or part of a pass over a chunk, with the rings of `layers`.

    x is [L, D]; queries, keys and values are [1, H, L, d].
    """

    def __init__(self, config: ModelConfig, builder: GraphBuilder, masked: bool, layers: range) -> None:
        self._config = config
        self._builder = builder
        heads, d = config.num_heads, config.head_dim
        self._step = builder.input(graphs.STEP, [], _INT64)
        self._modulation = self._table(graphs.MODULATION_BLOCKS, 6 * config.num_layers)
        self._cos = builder.input(graphs.ROTARY_COS, [1, _TOKENS, d // 2], _FLOAT)
        self._sin = builder.input(graphs.ROTARY_SIN, [1, _TOKENS, d // 2], _FLOAT)
        self._mask: ir.Value | None = None
        self._valid: ir.Value | None = None
        if masked:
            self._mask = self._expand_over_queries(builder.input(graphs.VISIBLE, [1, _RING], _BOOL))
        else:
            self._valid = builder.input(graphs.VALID, [1], _INT64)
        self._ring_shape: list[Dimension] = [1, heads, _RING, d]
        self._rings = {
            (kind, layer): builder.input(graphs.ring_in(kind, layer), self._ring_shape)
            for layer in layers
            for kind in KINDS
        }

    def refresh(self) -> onnx.ModelProto:
        for name, value in zip((graphs.HIDDEN, graphs.QUERIES), self._until_last_attention(), strict=True):
            self._builder.output(name, value, [_TOKENS, self._config.dim])
        self._give_rings_back()
        return self._model("refresh")

    def flow(self) -> onnx.ModelProto:
        shape: list[Dimension] = [_TOKENS, self._config.dim]
        x, queries = (self._builder.input(name, shape) for name in (graphs.HIDDEN, graphs.QUERIES))
        self._from_last_attention(x, queries)
        return self._model("flow")

    def step(self) -> onnx.ModelProto:
        self._from_last_attention(*self._until_last_attention())
        self._give_rings_back()
        return self._model("step")

    def _until_last_attention(self) -> tuple[ir.Value, ir.Value]:
        """The last layer's input and queries; its keys and values are in the rings."""
        builder, config = self._builder, self._config
        tokens = builder.input(graphs.TOKENS, [_TOKENS, config.token_dim], _FLOAT)
        write_at = builder.input(graphs.WRITE_AT, [1], _INT64)
        x = builder.linear(builder.cast(tokens, builder.dtype), "patch_embedding")
        last = config.num_layers - 1
        for layer in range(last):
            x = self._attend(x, self._store(x, layer, write_at), layer)
        return x, self._store(x, last, write_at)

    def _from_last_attention(self, x: ir.Value, queries: ir.Value) -> None:
        builder, config = self._builder, self._config
        shift, scale = self._rows(self._table(graphs.MODULATION_HEAD, 2), range(2))
        x = self._attend(x, queries, config.num_layers - 1)
        flow = builder.linear(self._norm(x, shift, scale), "head.linear")
        builder.output(graphs.FLOW, builder.cast(flow, _FLOAT), [_TOKENS, config.token_dim], _FLOAT)

    def _give_rings_back(self) -> None:
        for (kind, layer), ring in self._rings.items():
            self._builder.output(graphs.ring_out(kind, layer), ring, self._ring_shape)

    def _model(self, name: str) -> onnx.ModelProto:
        return self._builder.model(name if self._mask is None else f"{name}_masked")

    def _store(self, x: ir.Value, layer: int, write_at: ir.Value) -> ir.Value:
        """Write the chunk's keys and values to the rings of this layer; its queries [L, D] are left to be normed."""
        builder, name = self._builder, f"blocks.{layer}.self_attn"
        shift, scale = self._rows(self._modulation, range(6 * layer, 6 * layer + 2))
        q, k, v = builder.split(builder.linear(self._norm(x, shift, scale), f"{name}.qkv"), 3, axis=1)
        keys = self._rotate(self._rms_norm(k, f"{name}.norm_k"))
        for kind, new in _kinds(keys, self._split_heads(v)):
            self._rings[kind, layer] = builder.op(
                "TensorScatter", self._rings[kind, layer], new, write_at, axis=-2, mode="linear"
            )
        return q

    def _attend(self, x: ir.Value, queries: ir.Value, layer: int) -> ir.Value:
        """The rest of this layer: attention over its rings and the prompt, feed-forward."""
        builder, name = self._builder, f"blocks.{layer}"
        gate, ffn_shift, ffn_scale, ffn_gate = self._rows(self._modulation, range(6 * layer + 2, 6 * layer + 6))
        q = self._rotate(self._rms_norm(queries, f"{name}.self_attn.norm_q"))
        k, v = (self._rings[kind, layer] for kind in KINDS)
        attended = builder.linear(self._attention(q, k, v, self._mask, None, None, self._valid), f"{name}.self_attn.o")
        x = builder.op("Add", x, builder.op("Mul", attended, gate))
        x = builder.op("Add", x, self._cross_attention(x, layer))
        hidden = builder.linear(self._norm(x, ffn_shift, ffn_scale), f"{name}.ffn.0")
        hidden = builder.linear(builder.op("Gelu", hidden, approximate="tanh"), f"{name}.ffn.1")
        return builder.op("Add", x, builder.op("Mul", hidden, ffn_gate))

    def _cross_attention(self, x: ir.Value, layer: int) -> ir.Value:
        builder, name = self._builder, f"blocks.{layer}"
        normed = builder.op(
            "LayerNormalization",
            x,
            builder.weight(f"{name}.cross_attn_norm.weight"),
            builder.weight(f"{name}.cross_attn_norm.bias"),
            epsilon=self._config.eps,
        )
        q = self._rms_norm(builder.linear(normed, f"{name}.cross_attn.q"), f"{name}.cross_attn.norm_q")
        k, v = (builder.input(graphs.text(kind, layer), text_shape(self._config)) for kind in KINDS)
        return builder.linear(self._attention(self._split_heads(q), k, v), f"{name}.cross_attn.o")

    def _attention(self, *inputs: ir.Value | None) -> ir.Value:
        """[L, D] from queries, keys, values and what Attention takes to say which keys count."""
        builder = self._builder
        heads = builder.op("Attention", *inputs, softmax_precision=int(_FLOAT))
        merged = builder.op("Transpose", heads, perm=[0, 2, 1, 3])
        return builder.reshape(merged, [-1, self._config.dim])

    def _table(self, name: str, rows: int) -> ir.Value:
        """The modulation table of this name at the step that the graph is given, [rows, D]."""
        table = self._builder.input(name, [_STEPS, rows, self._config.dim])
        return self._builder.op("Gather", table, self._step, axis=0)

    def _rows(self, table: ir.Value, rows: range) -> list[ir.Value]:
        """Rows of a table, [D] each."""
        return [self._builder.op("Gather", table, self._builder.constant(row), axis=0) for row in rows]

    def _norm(self, x: ir.Value, shift: ir.Value, scale: ir.Value) -> ir.Value:
        return self._builder.op("LayerNormalization", x, scale, shift, epsilon=self._config.eps)

    def _rms_norm(self, x: ir.Value, name: str) -> ir.Value:
        return rms_norm(self._builder, x, name, self._config.eps)

    def _rotate(self, x: ir.Value) -> ir.Value:
        """Queries or keys [L, D] by heads and rotated, in float32 whatever the graph's dtype."""
        builder = self._builder
        parts = self._split_heads(x)
        if builder.dtype == _FLOAT:
            return builder.op("RotaryEmbedding", parts, self._cos, self._sin, interleaved=1)
        rotated = builder.op("RotaryEmbedding", builder.cast(parts, _FLOAT), self._cos, self._sin, interleaved=1)
        return builder.cast(rotated, builder.dtype)

    def _split_heads(self, x: ir.Value) -> ir.Value:
        return split_heads(self._builder, x, self._config)

    def _expand_over_queries(self, visible: ir.Value) -> ir.Value:
        """[1, R] → [1, 1, L, R]: attention takes a mask with a row per query."""
        builder = self._builder
        rows = builder.op("Shape", self._cos, start=1, end=2)
        shape = builder.op("Concat", builder.constant([1, 1]), rows, builder.constant([1]), axis=0)
        return builder.op("Expand", visible, shape)


def modulation_graph(config: ModelConfig, weights: ExternalWeights, dtype: DTypeName) -> onnx.ModelProto:
    """Timestep embeddings to the rows that a pass reads, computed in float32; scales have their 1 added."""
    builder = GraphBuilder(weights, dtype)
    embedding = builder.input(graphs.TIMESTEP_EMBEDDING, [_STEPS, config.freq_dim], _FLOAT)
    hidden = _silu(builder, builder.linear(embedding, "time_embedding.0", _FLOAT))
    embedded = builder.linear(hidden, "time_embedding.1", _FLOAT)
    projected = builder.linear(_silu(builder, embedded), "time_projection", _FLOAT)
    learned = [builder.weight(f"blocks.{layer}.modulation", _FLOAT) for layer in range(config.num_layers)]
    blocks = builder.op("Tile", builder.reshape(projected, [-1, 6, config.dim]), builder.constant([1, len(learned), 1]))
    rows = _adaptive(builder, builder.op("Concat", *learned, axis=0), blocks, [0, 1, 0, 0, 1, 0] * len(learned))
    builder.output(graphs.MODULATION_BLOCKS, rows, [_STEPS, 6 * len(learned), config.dim])
    head = builder.reshape(embedded, [-1, 1, config.dim])
    rows = _adaptive(builder, builder.weight("head.modulation", _FLOAT), head, [0, 1])
    builder.output(graphs.MODULATION_HEAD, rows, [_STEPS, 2, config.dim])
    return builder.model("modulation")


def text_kv_graph(config: ModelConfig, weights: ExternalWeights, dtype: DTypeName) -> onnx.ModelProto:
    """Prompt embeddings to every layer's text keys and values."""
    builder = GraphBuilder(weights, dtype)
    embeds = builder.input(graphs.EMBEDS, [config.text_len, config.text_dim], _FLOAT)
    hidden = builder.linear(builder.cast(embeds, builder.dtype), "text_embedding.0")
    context = builder.linear(builder.op("Gelu", hidden, approximate="tanh"), "text_embedding.1")
    for layer in range(config.num_layers):
        name = f"blocks.{layer}.cross_attn"
        k, v = builder.split(builder.linear(context, f"{name}.kv"), 2, axis=1)
        k = rms_norm(builder, k, f"{name}.norm_k", config.eps)
        for kind, part in _kinds(k, v):
            builder.output(graphs.text(kind, layer), split_heads(builder, part, config), text_shape(config))
    return builder.model("text_kv")


def text_shape(config: ModelConfig) -> list[int]:
    """A layer's text keys or values, [1, H, S, d]."""
    return [1, config.num_heads, config.text_len, config.head_dim]


def split_heads(builder: GraphBuilder, x: ir.Value, config: ModelConfig) -> ir.Value:
    """[L, D] → [1, H, L, d]"""
    parts = builder.reshape(x, [1, -1, config.num_heads, config.head_dim])
    return builder.op("Transpose", parts, perm=[0, 2, 1, 3])


def rms_norm(builder: GraphBuilder, x: ir.Value, name: str, eps: float) -> ir.Value:
    """Over the last axis, by the weight of this name."""
    return builder.op("RMSNormalization", x, builder.weight(f"{name}.weight"), axis=-1, epsilon=eps)


def _silu(builder: GraphBuilder, x: ir.Value) -> ir.Value:
    return builder.op("Mul", x, builder.op("Sigmoid", x))


def _adaptive(builder: GraphBuilder, learned: ir.Value, conditioned: ir.Value, scales: list[int]) -> ir.Value:
    """Learned rows [n, D] + conditioned ones [N, n or 1, D], 1 added to the rows that are scales."""
    units = builder.constant(np.array(scales, np.float32)[:, None], _FLOAT)
    rows = builder.op("Add", conditioned, builder.op("Add", learned, units))
    return rows if builder.dtype == _FLOAT else builder.cast(rows, builder.dtype)


def _kinds(k: ir.Value, v: ir.Value) -> tuple[tuple[Kind, ir.Value], tuple[Kind, ir.Value]]:
    return ("k", k), ("v", v)
