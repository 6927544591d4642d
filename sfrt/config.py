"""Every setting of a model and of a stream, as frozen dataclasses checked where they are made.

No torch here: a configuration can be read, checked and printed on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from math import inf
from typing import Literal, get_args

from sfrt.errors import ConfigError

Sampler = Literal["renoise", "euler"]
Positions = Literal["absolute", "window"]
Refresh = Literal["rolling", "rebuild", "reencode"]
RingDType = Literal["model", "float8"]
Placement = Literal["auto", "resident", "on-demand", "cpu"]
"""Where a text encoder stays: see sfrt.prompts."""

TRAIN_TIMESTEPS = 1000
"""Length of the flow-matching table that all models of this family were trained with."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the causal DiT (the defaults are Wan 2.1 T2V 1.3B)."""

    dim: int = 1536
    ffn_dim: int = 8960
    num_heads: int = 12
    num_layers: int = 30
    freq_dim: int = 256
    text_dim: int = 4096
    text_len: int = 512
    latent_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)
    rotary_base: float = 10000.0
    eps: float = 1e-6

    def __post_init__(self) -> None:
        for name in ("dim", "ffn_dim", "num_heads", "num_layers", "text_dim", "text_len"):
            value = getattr(self, name)
            _require(value > 0, f"model {name} is {value}; it must be positive")
        _require(
            self.dim % self.num_heads == 0 and self.head_dim % 2 == 0,
            f"model dim {self.dim} does not split into {self.num_heads} heads of an even size",
        )
        _require(
            self.head_dim >= 6,
            f"heads of {self.head_dim} are too small for rotary phases on three axes (6 or more)",
        )
        _require(
            self.rotary_base > 1 and self.eps > 0 and self.latent_channels > 0,
            "model rotary_base must be above 1, eps and latent_channels above 0",
        )
        _require(
            self.freq_dim > 0 and self.freq_dim % 2 == 0,
            f"model freq_dim is {self.freq_dim}; it must be even and positive",
        )
        _require(
            len(self.patch_size) == 3 and self.patch_size[0] == 1 and min(self.patch_size) > 0,
            f"patch size {self.patch_size} is not (1, height, width)",
        )

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def rotary_pairs(self) -> tuple[int, int, int]:
        """How many of a head's pairs of features turn with the frame, the row and the column of a token, in order.

        Rows and columns take a third each, rounded down, and frames the rest.
        """
        third = self.head_dim // 2 // 3
        return (self.head_dim // 2 - 2 * third, third, third)

    @property
    def token_dim(self) -> int:
        """Latent values in one token: patch height × patch width × channels."""
        return self.patch_size[1] * self.patch_size[2] * self.latent_channels


@dataclass(frozen=True)
class StreamConfig:
    """How a model is rolled out. Frames are latent frames unless a name says pixel.

    window counts the sink frames and the chunk itself; None keeps every frame in view, which only a stream of
    limited length can do. steps are timesteps of the training table; warp moves them with the shift, as the
    published configurations mean it. first_steps, where given, replaces steps for the first chunk. sampler is how a
    step goes on to the next: "renoise" mixes the predicted picture with fresh noise, as distilled few-step models are
    trained to be used; "euler" follows the predicted flow, as a model trained by flow matching alone must be.

    positions is where on the frame axis the model sees a frame: "absolute" is its number in the video; "window" its
    place among the visible frames, sinks first, so that no distance ever grows beyond the window (Infinite Forcing).

    refresh is how clean keys and values come into the cache: "rolling" runs each chunk once more when it is done, over
    all that it saw; "rebuild" fills the cache anew before every chunk, from no more than the clean frames in view;
    "reencode" does so too, with the first of them, where it does not begin the video, encoded anew as a picture of its
    last pixel frame, since a model knows only pictures to begin with (Krea realtime).

    ring_dtype is what the cache keeps keys and values in: "model", as the model runs, or "float8" (e4m3), half of 16
    bits, on the torch backend alone. A CPU cannot multiply it: there it is slower, for a quarter of the memory.
    """

    chunk: int = 3
    first_chunk: int | None = None
    window: int | None = 21
    sink: int = 0
    steps: tuple[float, ...] = (1000.0, 750.0, 500.0, 250.0)
    first_steps: tuple[float, ...] | None = None
    sampler: Sampler = "renoise"
    positions: Positions = "absolute"
    refresh: Refresh = "rolling"
    ring_dtype: RingDType = "model"
    warp: bool = True
    shift: float = 5.0
    context_noise: float = 0.0
    height: int = 480
    width: int = 832
    fps: int = 16

    def __post_init__(self) -> None:
        _require(self.chunk >= 1, f"chunk is {self.chunk}; it must be at least 1 latent frame")
        _require(
            self.first_chunk is None or 1 <= self.first_chunk <= self.chunk,
            f"first chunk is {self.first_chunk}; it must lie between 1 and the chunk, {self.chunk}",
        )
        _require(self.sink >= 0, f"sink is {self.sink}; it must not be negative")
        if self.window is not None:
            _require(
                self.window >= self.chunk + self.sink,
                f"window {self.window} is smaller than chunk {self.chunk} + sink {self.sink}; "
                f"make it at least {self.chunk + self.sink}",
            )
        for setting, names in (
            ("sampler", Sampler),
            ("positions", Positions),
            ("refresh", Refresh),
            ("ring_dtype", RingDType),
        ):
            value, known = getattr(self, setting), get_args(names)
            _require(value in known, f"{setting} cannot be {value!r}; choose one of: {', '.join(known)}")
        for steps in (self.steps, self.first_steps or self.steps):
            _check_steps(steps)
            _require(
                not self.warp or all(step == int(step) for step in steps),
                f"steps {list(steps)} are warped, so they must be whole numbers: entries of the training table",
            )
        _require(0 < self.shift < inf, f"shift is {self.shift}; it must be positive and finite")
        _require(
            0 <= self.context_noise < TRAIN_TIMESTEPS,
            f"context noise is {self.context_noise}; it must lie in [0, {TRAIN_TIMESTEPS})",
        )
        _require(self.fps > 0, f"fps is {self.fps}; it must be positive")
        for name, value in (("height", self.height), ("width", self.width)):
            _require(
                value > 0 and value % 16 == 0,
                f"{name} {value} is not a positive multiple of 16; the nearest is {max(16, round(value / 16) * 16)}",
            )


def _check_steps(steps: tuple[float, ...]) -> None:
    _require(len(steps) > 0, "steps is empty; name at least one, such as 1000")
    _require(
        all(0 < step <= TRAIN_TIMESTEPS for step in steps),
        f"steps {list(steps)} leave (0, {TRAIN_TIMESTEPS}]",
    )
    _require(
        all(later < earlier for earlier, later in pairwise(steps)),
        f"steps {list(steps)} do not descend; write them from noise to picture, such as 1000,750,500,250",
    )


@dataclass(frozen=True)
class Umt5Config:
    """Shape of the UMT5 text encoder (the defaults are UMT5-XXL)."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128

    def __post_init__(self) -> None:
        _require(min(vars(self).values()) > 0, "every size of the text encoder must be positive")
        _require(
            self.dim_attn % self.num_heads == 0,
            f"text encoder width {self.dim_attn} does not split into {self.num_heads} heads",
        )


@dataclass(frozen=True)
class TaehvConfig:
    """Widths of the tiny autoencoder (the defaults are TAEW 2.1). Always 8 × in space, 4 × in time."""

    latent_channels: int = 16
    encoder_width: int = 64
    decoder_widths: tuple[int, int, int, int] = (256, 128, 64, 64)


@dataclass(frozen=True)
class WanVaeConfig:
    """Shape of the Wan 2.1 VAE and the statistics that normalise its latents."""

    dim: int = 96
    latent_channels: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    mean: tuple[float, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    std: tuple[float, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip

    def __post_init__(self) -> None:
        _require(
            len(self.mean) == len(self.std) == self.latent_channels,
            f"the VAE has {self.latent_channels} latent channels "
            f"but statistics for {len(self.mean)} and {len(self.std)}",
        )
        _require(
            len(self.temporal_downsample) == len(self.dim_mult) - 1,
            "the VAE needs one temporal_downsample entry between each pair of levels",
        )


DecoderConfig = TaehvConfig | WanVaeConfig
