"""Between the layouts of latents: [T, C, h, w] outside, one row of features per patch ("tokens") between the passes."""

from __future__ import annotations

from torch import Tensor

from sfrt.config import ModelConfig


def tokens_from_latents(latents: Tensor, config: ModelConfig) -> Tensor:
    """[T·rows·columns, token_dim] from [T, C, h, w]; features in the order (patch row, patch column, channel)."""
    _, rows, columns = config.patch_size
    patches: Tensor = latents.unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # T C R r Q q
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(0, 2)


def latents_from_tokens(tokens: Tensor, config: ModelConfig, rows: int, columns: int) -> Tensor:
    """[T, C, h, w] from tokens of a grid of rows × columns patches; the inverse of tokens_from_latents."""
    _, patch_rows, patch_columns = config.patch_size
    patches = tokens.view(-1, rows, columns, patch_rows, patch_columns, config.latent_channels)
    return patches.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)
