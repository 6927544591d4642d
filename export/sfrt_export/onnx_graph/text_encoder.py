"""The UMT5 encoder as an ONNX graph: `sfrt.text.Umt5Encoder` in standard operators, for one prompt without padding.

As there, norms, attention and the residual stream are float32 in every graph; only what projects out of attention and
the feed-forward layers run in the graph's own dtype.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
import torch

from sfrt import graphs
from sfrt.bundle import DTypeName
from sfrt.config import Umt5Config
from sfrt.text import relative_buckets
from sfrt_export.onnx_graph.builder import ExternalWeights, GraphBuilder

_FLOAT, _INT64 = ir.DataType.FLOAT, ir.DataType.INT64


def text_encoder_graph(
    config: Umt5Config, text_len: int, weights: ExternalWeights, dtype: DTypeName
) -> onnx.ModelProto:
    """`text_encoder`: up to text_len token ids to as many embeddings, zeros behind those of real tokens."""
    return _Encoder(config, GraphBuilder(weights, dtype)).build(text_len)


class _Encoder:
    """One prompt's way through the layers. x is float32 [S', D]; queries, keys and values are [1, H, S', d]."""

    def __init__(self, config: Umt5Config, builder: GraphBuilder) -> None:
        self._config = config
        self._builder = builder
        self._ids = builder.input(graphs.TOKEN_IDS, [1, "length"], _INT64)
        self._length = builder.op("Shape", self._ids, start=1)
        self._offsets = self._relative_offsets()
        self._buckets = builder.constant(_buckets_by_offset(config).numpy())

    def build(self, text_len: int) -> onnx.ModelProto:
        builder, name = self._builder, "token_embedding.weight"
        # Looked up as stored: to cast the whole table would make a copy of it.
        table = builder.weight(name, builder.weights.reference(name).dtype)
        ids = builder.op("Squeeze", self._ids, builder.constant([0]))
        x = builder.cast(builder.op("Gather", table, ids, axis=0), _FLOAT)
        for layer in range(self._config.num_layers):
            x = self._block(x, f"blocks.{layer}")
        missing = builder.op("Sub", builder.constant([text_len]), self._length)
        pads = builder.op("Concat", builder.constant([0, 0]), missing, builder.constant([0]), axis=0)
        embeds = builder.op("Pad", self._norm(x, "norm"), pads)
        builder.output(graphs.EMBEDS, embeds, [text_len, self._config.dim], _FLOAT)
        return builder.model("text_encoder")

    def _block(self, x: ir.Value, name: str) -> ir.Value:
        builder = self._builder
        attended = self._attention(self._norm(x, f"{name}.norm1"), name)
        x = builder.op("Add", x, builder.cast(attended, _FLOAT))
        hidden = self._feed_forward(self._norm(x, f"{name}.norm2"), f"{name}.ffn")
        return builder.op("Add", x, builder.cast(hidden, _FLOAT))

    def _attention(self, x: ir.Value, name: str) -> ir.Value:
        """Unscaled, with a learned bias for every offset between two tokens."""
        builder = self._builder
        q, k, v = (self._heads(builder.linear(x, f"{name}.attn.{part}", _FLOAT, bias=False)) for part in "qkv")
        seen = builder.op(
            "Attention", q, k, v, self._position_bias(f"{name}.pos_embedding.embedding.weight"), scale=1.0
        )
        merged = builder.reshape(builder.op("Transpose", seen, perm=[0, 2, 1, 3]), [-1, self._config.dim_attn])
        return builder.linear(builder.cast(merged, builder.dtype), f"{name}.attn.o", bias=False)

    def _feed_forward(self, x: ir.Value, name: str) -> ir.Value:
        builder = self._builder
        x = builder.cast(x, builder.dtype)
        gate = builder.op("Gelu", builder.linear(x, f"{name}.gate.0", bias=False), approximate="tanh")
        return builder.linear(
            builder.op("Mul", builder.linear(x, f"{name}.fc1", bias=False), gate), f"{name}.fc2", bias=False
        )

    def _position_bias(self, name: str) -> ir.Value:
        """[1, H, S', S']; all but the last lookup is of constants."""
        builder = self._builder
        by_offset = builder.op("Gather", builder.weight(name, _FLOAT), self._buckets, axis=0)
        bias = builder.op("Gather", builder.op("Transpose", by_offset, perm=[1, 0]), self._offsets, axis=1)
        return builder.op("Unsqueeze", bias, builder.constant([0]))

    def _relative_offsets(self) -> ir.Value:
        """int64 [S', S']: how far the key lies behind the query, as a place in the table of offsets."""
        builder, farthest = self._builder, self._config.max_distance
        length = builder.op("Squeeze", self._length, builder.constant([0]))
        positions = builder.op("Range", builder.constant(0), length, builder.constant(1))
        keys, queries = (builder.op("Unsqueeze", positions, builder.constant([axis])) for axis in (0, 1))
        offsets = builder.op("Sub", keys, queries)
        near = builder.op("Min", builder.op("Max", offsets, builder.constant(-farthest)), builder.constant(farthest))
        return builder.op("Add", near, builder.constant(farthest))

    def _heads(self, x: ir.Value) -> ir.Value:
        """[S', D] → [1, H, S', d]"""
        config = self._config
        parts = self._builder.reshape(x, [1, -1, config.num_heads, config.dim_attn // config.num_heads])
        return self._builder.op("Transpose", parts, perm=[0, 2, 1, 3])

    def _norm(self, x: ir.Value, name: str) -> ir.Value:
        return self._builder.op(
            "RMSNormalization", x, self._builder.weight(f"{name}.weight", _FLOAT), axis=-1, epsilon=1e-6
        )


def _buckets_by_offset(config: Umt5Config) -> torch.Tensor:
    """Bucket of every offset from -max_distance to max_distance: int64. Beyond, nothing changes any more."""
    buckets = relative_buckets(config.max_distance + 1, config.num_buckets, config.max_distance)
    return torch.cat((buckets[:, 0].flip(0), buckets[0, 1:]))
