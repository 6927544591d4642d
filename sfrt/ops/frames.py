"""What a decoder puts out, as frames to be shown: clamped, rounded to uint8, channels last, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt.ops.checks import FLOATS, require
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op


def frames(pixels: Tensor, black: float = 0.0, white: float = 1.0) -> Tensor:
    """uint8 [F, H, W, 3] from float [F, 3, H, W] of any strides: black becomes 0, white 255, beyond is cut off.

    Halves are rounded to even.
    """
    scale, shift = scaling(black, white)
    levels = pixels.to(torch.promote_types(pixels.dtype, torch.float32)).mul(scale)
    if shift:
        levels.add_(shift)
    return levels.clamp_(0.0, 255.0).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def scaling(black: float, white: float) -> tuple[float, float]:
    """(scale, shift): a level is value · scale + shift."""
    scale = 255.0 / (white - black)
    return scale, 0.0 - black * scale


def check(pixels: Tensor, black: float = 0.0, white: float = 1.0) -> None:
    """What the kernels take: three channels, at most 65535 rows of frames, white other than black."""
    require(
        pixels.ndim == 4 and pixels.shape[1] == 3 and pixels.numel() > 0,
        "frames",
        f"pixels are {list(pixels.shape)}; they must be [F, 3, H, W]",
    )
    require(pixels.dtype in FLOATS, "frames", f"pixels are {pixels.dtype}; they must be float32, bfloat16 or float16")
    require(white != black, "frames", f"white and black are both {white}; they must differ")
    frame = 3 * pixels.shape[2] * pixels.shape[3]
    require(frame < 2**30, "frames", f"a frame has {frame} values; kernels take fewer than {2**30}")


def planes_of(pixels: Tensor) -> Tensor:
    """Pixels as kernels walk over them, a view [F, planes, rows, width] of as few and long rows as strides allow.

    Channels that lie side by side are one plane three times as wide; rows that follow each other are one row. Levels of
    all planes in turn, value by value along a row, are the frames.
    """
    beside = pixels.stride(1) == 1 and pixels.stride(3) == 3
    planes = pixels.permute(0, 2, 3, 1).flatten(2).unsqueeze(1) if beside else pixels
    if planes.stride(2) == planes.shape[3] * planes.stride(3):
        planes = planes.flatten(2).unsqueeze(2)
    return planes


def _draw(frames: int, height: int, width: int, kind: str = "planar", **arguments: float) -> Maker:
    """Pixels around [0, 1], a few beyond: planar, with the channels last, or a part of a larger tensor of either."""

    def make(draw: Draw) -> Inputs:
        if kind == "channels last":
            pixels = draw.normal(frames, height, width, 3, std=0.4, mean=0.5).permute(0, 3, 1, 2)
        elif kind == "cropped":
            pixels = draw.normal(frames, 3, height + 2, width + 5, std=0.4, mean=0.5)[:, :, 1:-1, 2:-3]
        elif kind == "cropped channels last":
            pixels = draw.normal(frames, height, width + 5, 3, std=0.4, mean=0.5)[:, :, 2:-3].permute(0, 3, 1, 2)
        else:
            pixels = draw.normal(frames, 3, height, width, std=0.4, mean=0.5)
        return {"pixels": pixels, **arguments}

    return make


def _cost(pixels: Tensor, black: float = 0.0, white: float = 1.0) -> Cost:
    """Every value read, and a byte for it written."""
    return Cost(pixels.numel() * (pixels.element_size() + 1), 4 * pixels.numel())


FRAMES = Op(
    name="frames",
    reference=frames,
    check=check,
    kernels={"triton": "sfrt.ops.triton_kernels.frames:frames", "cuda": "sfrt.ops.cuda_kernels.frames:frames"},
    cases={
        "planar": _draw(2, 8, 36),
        "planar, odd": _draw(3, 5, 7),
        "channels last": _draw(2, 6, 16, "channels last"),
        "cropped": _draw(2, 4, 8, "cropped"),
        "cropped channels last": _draw(2, 3, 8, "cropped channels last"),
        "one pixel": _draw(1, 1, 1),
        "from -1 to 1": _draw(2, 4, 16, black=-1.0, white=1.0),
    },
    sizes={
        "channels last": _draw(12, 480, 832, "channels last"),
        "planar": _draw(12, 480, 832),
    },
    cost=_cost,
    tolerance={torch.float32: 2e-3, torch.bfloat16: 2e-3, torch.float16: 2e-3},
)
