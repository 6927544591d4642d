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

TextMethod = Literal["int8", "float8"]
"""Of a text encoder, weights only in either: it runs once a prompt, and is to take half the memory."""

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


@dataclass(frozen=True)
class TextQuantization:
    """How the text encoder is quantised: every matrix of its blocks, and its table of tokens.

    embeds_error: relative error of the embeddings of the gate's prompts, beside those of the unquantised encoder.
    """

    method: TextMethod
    embeds_error: float


def final_dtype(name: str, stored: torch.dtype, dtype: torch.dtype | None) -> torch.dtype:
    """What a tensor is to be where its model runs in `dtype` (None: as it is); quantised weights and scales stay so."""
    if dtype is None or stored.itemsize == 1 or name.endswith((f".{WEIGHT_SCALE}", f".{INPUT_SCALE}")):
        return stored
    return dtype


def in_dtype(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The tensor as `final_dtype` says."""
    return tensor.to(final_dtype(name, tensor.dtype, dtype))
