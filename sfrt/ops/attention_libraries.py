"""Attention by libraries: cuDNN and FlashAttention as torch brings them, and the packages flash-attn of today.

All of them read rows wherever those lie, as long as a row is dense, and write the result tokens first where the queries
came so: between [L, H, d] and what a library wants there are only views, and nothing is copied.

torch's two are called by their operators. The context manager torch.nn.attention.sdpa_kernel would choose them too, by
switching the others off for the whole process, other threads included.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sfrt.errors import DeviceError
from sfrt.ops.checks import require

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

_PACKAGES = {"flash2": "flash_attn", "flash3": "flash_attn_interface"}
_VECTOR = 16  # bytes that these libraries read at once


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See sfrt.ops.attention.attention. Call it once for a shape before it is captured: it plans then.

    Raises KernelInputError for heads of odd sizes or places, or a single key.
    """
    require(k.shape[1] > 1, "attention", "there is one key; cuDNN takes two or more")
    return _by_torch(torch.ops.aten._scaled_dot_product_cudnn_attention, q, k, v, None, False)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """See sfrt.ops.attention.attention. Raises KernelInputError for heads of odd sizes or places."""
    return _by_torch(torch.ops.aten._scaled_dot_product_flash_attention, q, k, v)


def __getattr__(name: str) -> Attention:
    """flash2 and flash3, made when asked for: their packages take seconds to import, and few machines have them."""
    if name not in _PACKAGES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    package = _PACKAGES[name]
    try:
        return _by_package(importlib.import_module(package).flash_attn_func)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # one that was built for another torch raises what it likes
        raise DeviceError(f"{package} cannot be used: {error}; install it again, for this torch") from error


def _by_torch(operator: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    """By an operator over [1, H, L, d] that lays its result out as the queries are."""
    _require_vectors(q, k, v)
    out: Tensor = operator(q.transpose(0, 1)[None], k[None], v[None], *rest)[0]
    return out[0].transpose(0, 1)


def _by_package(function: Callable[..., Any]) -> Attention:
    """By a function over [1, L, H, d]."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        _require_vectors(q, k, v)
        result = function(q[None], k.transpose(0, 1)[None], v.transpose(0, 1)[None])
        # The first releases of FlashAttention-3 returned the logarithm of the sums besides.
        out: Tensor = result[0] if isinstance(result, tuple) else result
        return out[0]

    return attention


def _require_vectors(*tensors: Tensor) -> None:
    """Heads whose rows start and end where a vector does; elsewhere these libraries would read wrongly, or copy."""
    for tensor in tensors:
        steps = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
        require(
            all(step * tensor.element_size() % _VECTOR == 0 for step in steps),
            "attention",
            f"heads of {tensor.shape[-1]} with strides {tensor.stride()} do not start and end on {_VECTOR} bytes",
        )
