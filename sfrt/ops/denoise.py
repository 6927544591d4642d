"""The update between two passes, in token layout: Self Forcing's (arXiv 2506.08009, Algorithm 2) or Euler's.

Both are one formula with two numbers, (1 - fresh) · (x + follow · flow) + fresh · noise, so one kernel does either in
one pass over memory and makes the normals in registers. The last step mixes nothing in: it is `finish`, which leaves
the clean tokens for the refresh pass and the latents for the decoder.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sfrt.config import ModelConfig, Sampler
from sfrt.ops.checks import FLOATS, require, require_device, require_shape
from sfrt.ops.layout import latents_from_tokens
from sfrt.ops.noise import noise, require_counters
from sfrt.ops.op import Cost, Draw, Inputs, Maker, Op, nbytes
from sfrt.timesteps import Step

MAX_TOKEN_DIM = 512
"""Features of a token that a kernel can turn into latents: a tile of tokens lies in shared memory."""


@dataclass(frozen=True)
class Update:
    """What a pass makes of its tokens: (1 - fresh) · (x + follow · flow) + fresh · noise."""

    follow: float
    fresh: float

    @property
    def keep(self) -> float:
        return 1.0 - self.fresh


def update_after(step: Step, sampler: Sampler) -> Update:
    """The update behind a step; behind the last one, either sampler's ends at x0 = x - sigma · flow."""
    if sampler == "euler":
        return Update(follow=step.next_sigma - step.sigma, fresh=0.0)
    return Update(follow=-step.sigma, fresh=step.next_sigma)


def updated(x: Tensor, flow: Tensor | None, update: Update, normals: Tensor | None) -> Tensor:
    """The update with normals that are there already, in the dtype of x; it needs none where nothing fresh comes in."""
    moved = x if flow is None else x.add(flow.to(x.dtype), alpha=update.follow)
    if normals is None or not update.fresh:
        return moved
    return normals.to(x.dtype).mul(update.fresh).add_(moved, alpha=update.keep)


def predict_x0(x: Tensor, flow: Tensor, step: Step) -> Tensor:
    """The clean latents the model points to, float32: x - sigma · flow."""
    return updated(x, flow, Update(-step.sigma, 0.0), None)


def follow_flow(x: Tensor, flow: Tensor, step: Step) -> Tensor:
    """One Euler step along the flow to the next noise level, float32; the last one ends at x0."""
    return updated(x, flow, update_after(step, "euler"), None)


def renoise(x0: Tensor, noise: Tensor, step: Step) -> Tensor:
    """What the next step starts from: (1 - next_sigma) · x0 + next_sigma · noise."""
    return updated(x0, None, Update(0.0, step.next_sigma), noise)


def denoise(
    x: Tensor, flow: Tensor | None, update: Update, seed: Tensor, frame: Tensor, step: int, tokens: int
) -> tuple[Tensor, Tensor]:
    """The tokens the next step starts from, and the same in flow's dtype, which the model reads; both of x's shape.

    x is float32 [frames · tokens, token_dim], tokens being those of a latent frame; flow is of the same shape in the
    model's dtype, or None where a stream opens on given latents. seed and frame are as sfrt.ops.noise takes them, step
    is the number that the fresh noise has. Where both dtypes are one, both results are one tensor.
    """
    fresh = noise(seed, frame, step, x.shape[0] // tokens, tokens, x.shape[1]) if update.fresh else None
    after = updated(x, flow, update, fresh)
    return after, after if flow is None else after.to(flow.dtype)


def finish(x: Tensor, flow: Tensor, sigma: float, model: ModelConfig, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """x0 = x - sigma · flow as tokens in the dtype of flow, for the refresh pass, and as latents [T, C, h, w] like x.

    x is float32 [T · rows · columns, token_dim]; flow is of the same shape in the model's dtype.
    """
    clean = x.add(flow.to(x.dtype), alpha=-sigma)
    return clean.to(flow.dtype), latents_from_tokens(clean, model, rows, columns)


def check_denoise(
    x: Tensor, flow: Tensor | None, update: Update, seed: Tensor, frame: Tensor, step: int, tokens: int
) -> None:
    """What the kernels take: dense tokens of whole frames, numbers that fit their counters."""
    _check_tokens("denoise", x, flow, tokens)
    require_device("denoise", "seed", seed, x.device)
    require_counters("denoise", seed, frame, step, x.shape[0] // tokens, tokens * x.shape[1])


def check_finish(x: Tensor, flow: Tensor, sigma: float, model: ModelConfig, rows: int, columns: int) -> None:
    """What the kernels take: dense tokens of whole frames, as wide as the model's, of at most 512 features."""
    require(rows > 0 and columns > 0, "finish", f"a frame of {rows}×{columns} patches is none")
    _check_tokens("finish", x, flow, rows * columns)
    require(
        x.shape[1] == model.token_dim <= MAX_TOKEN_DIM,
        "finish",
        f"tokens have {x.shape[1]} features; they must have the model's {model.token_dim}, at most {MAX_TOKEN_DIM}",
    )
    require(rows <= 65535 and x.shape[0] // (rows * columns) <= 65535, "finish", "kernels take 65535 rows and frames")


def _check_tokens(op: str, x: Tensor, flow: Tensor | None, tokens: int) -> None:
    require(x.ndim == 2 and x.numel() > 0, op, f"x is {list(x.shape)}; it must be tokens [L, features]")
    require_shape(op, "x", x, x.shape, torch.float32)
    require(tokens > 0 and x.shape[0] % tokens == 0, op, f"{x.shape[0]} tokens are no whole frames of {tokens}")
    if flow is not None:
        require(flow.dtype in FLOATS, op, f"flow is {flow.dtype}; it must be float32, bfloat16 or float16")
        require_shape(op, "flow", flow, x.shape, flow.dtype)
        require_device(op, "flow", flow, x.device)


def _draw(
    frames: int, tokens: int, token_dim: int, update: Update, *, flow: bool = True, frame: int = 21, seed: int = -3
) -> Maker:
    def make(draw: Draw) -> Inputs:
        return {
            "x": draw.normal(frames * tokens, token_dim, dtype=torch.float32),
            "flow": draw.normal(frames * tokens, token_dim) if flow else None,
            "update": update,
            "seed": draw.integers(seed),
            "frame": draw.integers(frame),
            "step": 2,
            "tokens": tokens,
        }

    return make


def _draw_last(frames: int, rows: int, columns: int, channels: int, patch: tuple[int, int] = (2, 2)) -> Maker:
    model = ModelConfig(latent_channels=channels, patch_size=(1, *patch))

    def make(draw: Draw) -> Inputs:
        shape = (frames * rows * columns, model.token_dim)
        return {
            "x": draw.normal(*shape, dtype=torch.float32),
            "flow": draw.normal(*shape),
            "sigma": 0.625,
            "model": model,
            "rows": rows,
            "columns": columns,
        }

    return make


def _cost_denoise(x: Tensor, flow: Tensor | None, update: Update, *_: object, **__: object) -> Cost:
    """x and flow read, the next x written, and its copy where the model's dtype is another."""
    copied = flow is not None and flow.dtype != x.dtype
    moved = 2 * nbytes(x) + nbytes(flow) * (2 if copied else 1)
    return Cost(moved, x.numel() * (44 if update.fresh else 2))


def _cost_finish(x: Tensor, flow: Tensor, *_: object, **__: object) -> Cost:
    """x and flow read, tokens and latents written."""
    return Cost(2 * nbytes(x) + 2 * nbytes(flow), 2 * x.numel())


_RENOISE = Update(follow=-0.9375, fresh=0.625)
_EULER = Update(follow=-0.125, fresh=0.0)
_FLOW_DTYPES = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

DENOISE = Op(
    name="denoise",
    reference=denoise,
    check=check_denoise,
    kernels={"triton": "sfrt.ops.triton_kernels.denoise:denoise", "cuda": "sfrt.ops.cuda_kernels.denoise:denoise"},
    cases={
        "one token": _draw(1, 1, 4, _RENOISE),
        "odd frames": _draw(3, 7, 9, _RENOISE, frame=2**32 - 3),
        "built-in": _draw(3, 16, 48, _RENOISE, seed=2**62),
        "1.3B rows": _draw(2, 11, 64, _RENOISE),
        "euler": _draw(2, 11, 12, _EULER),
        "opening": _draw(2, 5, 16, Update(follow=0.0, fresh=0.75), flow=False),
    },
    sizes={"chunk of 3": _draw(3, 1560, 64, _RENOISE), "frame": _draw(1, 1560, 64, _RENOISE)},
    cost=_cost_denoise,
    tolerance=_FLOW_DTYPES,
)

FINISH = Op(
    name="finish",
    reference=finish,
    check=check_finish,
    kernels={"triton": "sfrt.ops.triton_kernels.denoise:finish", "cuda": "sfrt.ops.cuda_kernels.denoise:finish"},
    cases={
        "one token": _draw_last(1, 1, 1, 4),
        "built-in": _draw_last(3, 4, 4, 12),
        "wide rows": _draw_last(2, 3, 21, 16),
        "odd patches": _draw_last(2, 3, 5, 3, patch=(1, 3)),
        "one to a patch": _draw_last(1, 2, 18, 5, patch=(1, 1)),
    },
    sizes={"chunk of 3": _draw_last(3, 30, 52, 16), "frame": _draw_last(1, 30, 52, 16)},
    cost=_cost_finish,
    tolerance=_FLOW_DTYPES,
)
