"""What a quantised bundle says of itself: which weights, how, and how near it stays to the model it was made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from sfrt.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Method = Literal["int8", "float8", "float8-static"]
"""int8: weights only. float8: weights, and activations by a scale of each token's own, found as it passes.
float8-static: weights, and activations by one scale for each layer, found when the model is exported."""

WEIGHT_SCALE: Final = "weight_scale"  # float32 [out], beside the weight
INPUT_SCALE: Final = "input_scale"  # float32 [], where activations have a static scale


@dataclass(frozen=True)
class Quality:
    """The quantised model beside the one it was made from, over the gate's prompts and seeds.

    flow_error: relative error of the flow, where every pass is given what the unquantised model's was.
    latent_error: relative error of the latents, where each model goes its own way from the same noise.
    frame_psnr: of the frames of these latents, in dB, 100 where they are the same; None without a decoder.
    """

    flow_error: float
    latent_error: float
    frame_psnr: float | None


@dataclass(frozen=True)
class Quantization:
    """How the transformer is quantised.

    layers are the linear maps that are, by module name, each with the relative error of the flow in one pass where no
    other is. Raises ConfigError where there are none.
    """

    method: Method
    quality: Quality
    layers: dict[str, float]

    def __post_init__(self) -> None:
        if not self.layers:
            raise ConfigError("a quantised model has at least one quantised layer")


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor in the dtype that its model runs in (None: as it is); quantised weights and scales stay as they are."""
    if dtype is None or tensor.dtype.itemsize == 1 or name.endswith((f".{WEIGHT_SCALE}", f".{INPUT_SCALE}")):
        return tensor
    return tensor.to(dtype)
