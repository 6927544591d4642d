"""How near a pass comes to what the machine's matrix products allow."""

from __future__ import annotations

import time

import torch

from sfrt.config import ModelConfig
from sfrt.ops.linear import Linear, pack_for_cpu

_SIZE = {"cpu": 2048, "cuda": 8192}


def operations(model: ModelConfig, tokens: int, keys: int) -> float:
    """Floating point operations of one pass over `tokens` tokens that attend to `keys` keys, two per multiply-add."""
    linear = 2 * tokens * (6 * model.dim**2 + 2 * model.dim * model.ffn_dim)
    attention = 4 * tokens * keys * model.dim
    cross = 4 * tokens * model.text_len * model.dim
    return float(model.num_layers * (linear + attention + cross))


@torch.inference_mode()
def matrix_rate(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations per second of a large matrix product: the best of repeated runs.

    On a CPU over weights laid out by oneDNN too, which can be more than twice as fast as torch's own product.
    """
    size = _SIZE[device.type]
    rows = torch.randn(size, size, device=device).to(dtype)
    layers = [Linear(size, size).to(device, dtype) for _ in range(2)]
    if device.type == "cpu":
        pack_for_cpu(torch.nn.Sequential(layers[1]), size)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        best = min(best, *(_timed(layer, rows) for layer in layers))
    return 2.0 * size**3 / best


def _timed(layer: Linear, rows: torch.Tensor) -> float:
    started = time.perf_counter()
    layer(rows)
    if rows.is_cuda:
        torch.cuda.synchronize(rows.device)
    return time.perf_counter() - started
