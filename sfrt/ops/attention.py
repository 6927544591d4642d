"""Softmax attention without a mask: what a pass may see is decided by which keys it is given.

Keys and values come heads first, as caches keep them: a head's keys are then a dense matrix, whatever slots they fill.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_QUERY_BLOCK = 512  # rows of scores made at once: bounds the work space at long rings


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., L, H, d] from queries [..., L, H, d] and keys and values [..., H, S, d]."""
    on_cpu = q.device.type == "cpu" and torch.backends.mkldnn.is_available()
    if on_cpu and q.ndim == 3 and q.dtype == torch.float32 and not q.requires_grad:
        return _onednn_attention(q, k, v)
    queries = q.transpose(-2, -3).reshape(-1, *k.shape[-3:-2], q.shape[-3], q.shape[-1])
    out = F.scaled_dot_product_attention(queries, k.reshape(-1, *k.shape[-3:]), v.reshape(-1, *v.shape[-3:]))
    return out.transpose(1, 2).reshape(q.shape)


def _onednn_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same on a CPU in float32, by oneDNN's products, which are faster there than torch's own attention.

    Its product wants dense weights, which a head's keys [S, d] are; a strided one would fall back to a reference loop.
    """
    product = torch.ops.mkldnn._linear_pointwise
    out = torch.empty_like(q)
    scaled = q * q.shape[-1] ** -0.5
    for head in range(q.shape[1]):
        keys, values = k[head], v[head].t()
        for start in range(0, q.shape[0], _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            scores = product(scaled[rows, head], keys, None, "none", [], "")
            out[rows, head] = product(scores.softmax(-1), values, None, "none", [], "")
    return out
