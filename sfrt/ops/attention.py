"""Softmax attention without a mask: what a pass may see is decided by which keys it is given."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[..., L, H, d] from queries [..., L, H, d] and keys and values [..., S, H, d]."""
    batched = (part.reshape(-1, *part.shape[-3:]).transpose(1, 2) for part in (q, k, v))
    return F.scaled_dot_product_attention(*batched).transpose(1, 2).reshape(q.shape)
