"""The update between two passes, in token layout: Self Forcing's (arXiv 2506.08009, Algorithm 2) or Euler's."""

from __future__ import annotations

from torch import Tensor

from sfrt.timesteps import Step


def predict_x0(x: Tensor, flow: Tensor, step: Step) -> Tensor:
    """The clean latents the model points to, float32: x - sigma · flow."""
    return x.add(flow.to(x.dtype), alpha=-step.sigma)


def follow_flow(x: Tensor, flow: Tensor, step: Step) -> Tensor:
    """One Euler step along the flow to the next noise level, float32; the last one ends at x0."""
    return x.add(flow.to(x.dtype), alpha=step.next_sigma - step.sigma)


def renoise(x0: Tensor, noise: Tensor, step: Step) -> Tensor:
    """What the next step starts from: (1 - next_sigma) · x0 + next_sigma · noise."""
    return noise.mul(step.next_sigma).add_(x0, alpha=1.0 - step.next_sigma)
