"""What a `MemBlock` of TAEHV reads: every frame beside the one before it, the first beside what was carried."""

from __future__ import annotations

import torch
from torch import Tensor

from sfrt.ops.channels_last import draw_frames, require_dense, require_match
from sfrt.ops.checks import require
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op, nbytes


def memory_input(frames: Tensor, memory: Tensor | None, batch: int) -> tuple[Tensor, Tensor]:
    """(each frame in front of its predecessor [B · T, 2C, h, w], the last frame of every clip [B, C, h, w]).

    frames: [B · T, C, h, w], the clips of a batch one behind the other, channels innermost in memory. memory: the last
    frames of the chunk before, [B, C, h, w]; None for blank ones.
    """
    count, channels, height, width = frames.shape
    shape = (count, 2 * channels, height, width)
    both = torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=torch.channels_last)
    clips, pairs = frames.unflatten(0, (batch, -1)), both.unflatten(0, (batch, -1))
    pairs[:, :, :channels] = clips
    pairs[:, 1:, channels:] = clips[:, :-1]
    pairs[:, 0, channels:] = 0 if memory is None else memory
    # A copy: a view would keep the chunk's whole activation alive until the next chunk.
    return both, clips[:, -1].clone()


def check(frames: Tensor, memory: Tensor | None, batch: int) -> None:
    """What the kernel takes: dense memory, at least a frame for each clip."""
    require_dense("memory_input", "frames", frames, 4)
    count, *frame = frames.shape
    require(
        batch > 0 and count >= batch and count % batch == 0,
        "memory_input",
        f"{count} frames do not divide into {batch} clips",
    )
    if memory is not None:
        require_match("memory_input", "memory", memory, (batch, *frame), frames)
        require_dense("memory_input", "memory", memory, 4)


def cost(frames: Tensor, memory: Tensor | None, batch: int) -> Cost:
    """Frames read once and written twice, the memory read, the new one written."""
    return Cost(3 * nbytes(frames) + nbytes(memory) + nbytes(frames) * batch // frames.shape[0])


def _draw(frames: int, channels: int, height: int, width: int, *, batch: int = 1, memory: bool = True) -> Maker:
    def make(draw: Draw) -> Inputs:
        return {
            "frames": draw_frames(draw, batch * frames, channels, height, width),
            "memory": draw_frames(draw, batch, channels, height, width) if memory else None,
            "batch": batch,
        }

    return make


MEMORY_INPUT = Op(
    name="memory_input",
    reference=memory_input,
    check=check,
    kernels={"triton": "sfrt.ops.triton_kernels.memory_input:memory_input"},
    cases={
        "memory": _draw(3, 12, 3, 5, batch=2),
        "start": _draw(2, 7, 3, 5, batch=2, memory=False),
        "one frame": _draw(1, 12, 3, 5, batch=2),
        "two programs": _draw(2, 64, 7, 9),
    },
    sizes={"240×416": _draw(6, 64, 240, 416)},
    cost=cost,
    tolerance={torch.float32: 0.0, torch.bfloat16: 0.0, torch.float16: 0.0},
)
