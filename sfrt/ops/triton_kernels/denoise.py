"""The update between two passes, with its noise, and the last one, with its turn into the decoder's layout."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sfrt.config import ModelConfig
from sfrt.ops.denoise import Update
from sfrt.ops.triton_kernels.launch import Launch, Launches, power_of_two
from sfrt.ops.triton_kernels.noise import BLOCK
from sfrt.ops.triton_kernels.philox import normals

TILE = 16
"""Tokens of a row that one program turns into latents: with patches two wide, 32 neighbouring latents."""


@triton.jit(do_not_specialize=["step"])
def _denoise(
    x, flow, seed, first_frame, out, copy, step, elements, follow, keep, fresh,
    BLOCK: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(1)
    element = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = element < elements
    at = frame.to(tl.int64) * elements + element
    values = tl.load(x + at, mask=inside, other=0.0)
    if flow is not None:
        values += follow * tl.load(flow + at, mask=inside, other=0.0).to(tl.float32)
    if seed is not None:
        group = tl.program_id(0) * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
        values = keep * values + fresh * normals(seed, first_frame, frame, step, group)
    tl.store(out + at, values, mask=inside)
    if copy is not None:
        tl.store(copy + at, values.to(copy.dtype.element_ty), mask=inside)


@triton.jit
def _finish(
    x, flow, clean, latents, sigma, columns,
    PATCH_ROWS: tl.constexpr, PATCH_COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    TILE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PLANES: tl.constexpr,
):  # fmt: skip
    # A tile is [token, patch row, patch column, channel], each side filled up to a power of two.
    first, row, frame = tl.program_id(0) * TILE, tl.program_id(1), tl.program_id(2)
    rows = tl.num_programs(1)
    token, i, j, channel = tl.arange(0, TILE), tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, PLANES)
    lines = (frame.to(tl.int64) * rows + row) * columns + first + token
    feature = (i[:, None, None] * PATCH_COLUMNS + j[None, :, None]) * CHANNELS + channel[None, None, :]
    whole = (i < PATCH_ROWS)[:, None, None] & (j < PATCH_COLUMNS)[None, :, None] & (channel < CHANNELS)[None, None, :]
    inside = (first + token < columns)[:, None, None, None] & whole[None, :, :, :]
    at = lines[:, None, None, None] * (PATCH_ROWS * PATCH_COLUMNS * CHANNELS) + feature[None, :, :, :]
    values = tl.load(x + at, mask=inside, other=0.0)
    values -= sigma * tl.load(flow + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(clean + at, values.to(clean.dtype.element_ty), mask=inside)

    # [channel, patch row, token, patch column]: neighbours in memory are neighbours in the last two.
    values = tl.permute(values, (3, 1, 0, 2))
    plane = (frame.to(tl.int64) * CHANNELS + channel) * rows + row
    line = plane[:, None] * PATCH_ROWS + i[None, :]
    x_in_line = (first + token)[:, None] * PATCH_COLUMNS + j[None, :]
    here = (channel < CHANNELS)[:, None] & (i < PATCH_ROWS)[None, :]
    there = (first + token < columns)[:, None] & (j < PATCH_COLUMNS)[None, :]
    to = line[:, :, None, None] * (columns * PATCH_COLUMNS) + x_in_line[None, None, :, :]
    tl.store(latents + to, values, mask=here[:, :, None, None] & there[None, None, :, :])


@Launches
def denoise(
    x: Tensor, flow: Tensor | None, update: Update, seed: Tensor, frame: Tensor, step: int, tokens: int
) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """See sfrt.ops.denoise.denoise."""
    out = torch.empty_like(x)
    copy = torch.empty_like(flow) if flow is not None and flow.dtype != x.dtype else None
    elements = tokens * x.shape[1]
    arguments = {
        "x": x,
        "flow": flow,
        "seed": seed if update.fresh else None,
        "first_frame": frame if update.fresh else None,
        "out": out,
        "copy": copy,
        "step": step,
        "elements": elements,
        "follow": update.follow,
        "keep": update.keep,
        "fresh": update.fresh,
    }
    grid = (triton.cdiv(elements, BLOCK), x.numel() // elements)
    return (Launch(_denoise, grid, arguments, {"BLOCK": BLOCK}),), (out, out if copy is None else copy)


@Launches
def finish(
    x: Tensor, flow: Tensor, sigma: float, model: ModelConfig, rows: int, columns: int
) -> tuple[tuple[Launch, ...], tuple[Tensor, Tensor]]:
    """See sfrt.ops.denoise.finish."""
    _, patch_rows, patch_columns = model.patch_size
    frames = x.shape[0] // (rows * columns)
    clean = torch.empty_like(flow)
    shape = (frames, model.latent_channels, rows * patch_rows, columns * patch_columns)
    latents = torch.empty(shape, dtype=x.dtype, device=x.device)
    arguments = {"x": x, "flow": flow, "clean": clean, "latents": latents, "sigma": sigma, "columns": columns}
    constants = {
        "PATCH_ROWS": patch_rows,
        "PATCH_COLUMNS": patch_columns,
        "CHANNELS": model.latent_channels,
        "TILE": TILE,
        "ROWS": power_of_two(patch_rows),
        "COLUMNS": power_of_two(patch_columns),
        "PLANES": power_of_two(model.latent_channels),
    }
    grid = (triton.cdiv(columns, TILE), rows, frames)
    return (Launch(_finish, grid, arguments, constants),), (clean, latents)
