"""How near a pass comes to what the machine's matrix products allow."""

from __future__ import annotations

import time

import torch

from sfrt.config import ModelConfig

_SIZE = {"cpu": 2048, "cuda": 8192}


def operations(model: ModelConfig, tokens: int, keys: int) -> float:
    """Floating point operations of one pass over `tokens` tokens that attend to `keys` keys, two per multiply-add."""
    linear = 2 * tokens * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
    attention = 4 * tokens * keys * model.dim
    cross = 4 * tokens * model.text_len * model.dim
    return float(model.num_layers * (linear + attention + cross))


def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of a large matrix product, as torch does it: the best of repeated runs."""
    size = _SIZE[device.type]
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        best = min(best, _timed(left, right))
    return 2.0 * size**3 / best


def _timed(left: torch.Tensor, right: torch.Tensor) -> float:
    started = time.perf_counter()
    left @ right
    if left.is_cuda:
        torch.cuda.synchronize(left.device)
    return time.perf_counter() - started
