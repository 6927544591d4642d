"""Activations with the channels innermost in memory: a frame is rows of channels, one row per pixel."""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt.ops.checks import FLOATS, require
from sfrt.ops.op import Draw


def rows(x: Tensor) -> Tensor:
    """[N, C, …] as [N, …, C], the order in memory."""
    return x.movedim(1, -1)


def empty_video(like: Tensor, channels: int, frames: int) -> Tensor:
    """Uninitialised memory [B, channels, frames, H, W] for a video of the size of `like`, [B, C, T, H, W]."""
    batch, _, _, height, width = like.shape
    shape = (batch, channels, frames, height, width)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)


def per_channel(vector: Tensor, x: Tensor) -> Tensor:
    """A vector [C] so that it broadcasts against x, [N, C, …]."""
    return vector.view(-1, *[1] * (x.ndim - 2))


def frame_strides(video: Tensor | None) -> tuple[int, int]:
    """The distances in memory between the videos of a batch and between the frames of a video."""
    return (0, 0) if video is None else (video.stride(0), video.stride(2))


def draw_frames(draw: Draw, count: int, channels: int, height: int, width: int) -> Tensor:
    """Random frames [N, C, H, W]."""
    return draw.normal(count, height, width, channels).permute(0, 3, 1, 2)


def draw_video(
    draw: Draw, channels: int, frames: int, height: int, width: int, *, batch: int = 1, part: bool = False
) -> Tensor:
    """A random video [B, C, T, H, W]; if part, cut from a longer one."""
    drawn = draw.normal(batch, frames + part, height, width, channels)
    return drawn[:, int(part) :].permute(0, 4, 1, 2, 3)


def require_dense(op: str, name: str, x: Tensor, dimensions: int | None = None) -> None:
    """A float tensor [N, C, …] that lies channels-last in memory without gaps."""
    _require_floats(op, name, x, dimensions)
    require(rows(x).is_contiguous(), op, f"{name} {_layout(x)}; it must lie dense, channels last")


def require_video(op: str, name: str, x: Tensor) -> None:
    """A float tensor [B, C, T, H, W] whose frames lie channels-last without gaps, each wherever it likes."""
    _require_floats(op, name, x, 5)
    frame = x.permute(0, 2, 3, 4, 1)[:1, :1]
    require(frame.is_contiguous(), op, f"{name} {_layout(x)}; its frames must lie dense, channels last")


def require_match(op: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """A tensor of this shape, of the dtype and on the device of x."""
    require(
        (tuple(tensor.shape), tensor.dtype, tensor.device) == (shape, x.dtype, x.device),
        op,
        f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
        f"it must be {x.dtype} {list(shape)} on {x.device}",
    )


def _require_floats(op: str, name: str, x: Tensor, dimensions: int | None) -> None:
    require(x.dtype in FLOATS, op, f"{name} is {x.dtype}; it must be float32, bfloat16 or float16")
    require(dimensions in (None, x.ndim), op, f"{name} is {list(x.shape)}; it must have {dimensions} dimensions")


def _layout(x: Tensor) -> str:
    return f"{list(x.shape)} has strides {x.stride()}"
