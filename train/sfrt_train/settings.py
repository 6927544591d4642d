"""Every setting of the recipe, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, Umt5Config
from sfrt.errors import ConfigError

Forcing = Literal["teacher", "diffusion", "none"]
"""The past that a chunk is trained with: see sfrt_train.forcing."""
Loss = Literal["dmd", "sid", "gan"]
"""What a rolled-out video is judged by: see sfrt_train.judging."""
Precision = Literal["bfloat16", "float32"]
"""What passes compute in; the weights that are trained are float32 in any case."""


@dataclass(frozen=True)
class AutoencoderSettings:
    """One training of the autoencoder (the defaults: the whole of it, from nothing)."""

    steps: int = 1300
    batch_frames: int = 26
    """Latent frames in a step, however long its clips are."""
    lengths: tuple[int, ...] = (2, 2, 5, 2)
    """Latent frames of a clip, in turn from step to step: short for variety, longer for what the memory carries."""
    free_share: float = 1.0
    """Share of the clips whose objects have any size, place and speed (sfrt_train.data.make_clip)."""
    learning_rate: float = 2e-3
    warmup: int = 100
    latent_noise: float = 0.15
    """Standard deviation of the noise the decoder must shrug off, as the flow model's latents are not exact."""
    edge_weight: float = 4.0
    """How much more a pixel on an edge counts than one in a flat patch."""
    gradient_weight: float = 1.0
    scale_weight: float = 0.05


@dataclass(frozen=True)
class ReadingSettings:
    """What the text encoder learns before the flow model."""

    steps: int = 1600
    batch: int = 64
    learning_rate: float = 1e-3
    warmup: int = 50


@dataclass(frozen=True)
class ClipSettings:
    """The pools of clips that stages learn from."""

    chunks: int = 5
    """Of a clip: the length that every stage is trained at."""
    clips: int = 3072
    late_clips: int = 1024
    """Clips from the middle of longer ones, for the judge of long rollouts."""
    switch_share: float = 0.5


@dataclass(frozen=True)
class FlowSettings:
    """One training of the transformer by flow matching (the defaults: teacher forcing, from nothing)."""

    forcing: Forcing = "teacher"
    start: str | None = None
    """The stage whose weights it starts from."""
    steps: int = 16500
    batch_chunks: int = 72
    """Chunks in a step, clean ones included, however long its clips are."""
    lengths: tuple[int, ...] = (5, 1)
    """Chunks of a clip, in turn from step to step. Only a first chunk and one after a prompt switch need the text,
    so every other step is made of first chunks alone."""
    learning_rate: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.35
    weight_decay: float = 0.02
    context_noise: float = 0.05
    """Most noise that is mixed into the clean context, still labelled t = 0, so that small errors do not pile up."""
    unprompted: float = 0.0
    """Share of the clips that are shown without their prompts, for classifier-free guidance."""
    given: float = 0.0
    """Share of the clips that begin in the middle of a longer one, their first chunk given as it is."""
    ema: float = 0.997


@dataclass(frozen=True)
class PairsSettings:
    """The trajectories of the many-step model, and the regression on them."""

    videos: int = 1024
    batch: int = 64
    teacher_steps: int = 20
    """Euler steps of a trajectory; a multiple of the few steps, so that those are among them."""
    steps: int = 1500
    batch_chunks: int = 72
    learning_rate: float = 5e-4
    warmup: int = 100
    decay: float = 0.5
    weight_decay: float = 0.02
    context_noise: float = 0.05
    ema: float = 0.995


@dataclass(frozen=True)
class SelfForcingSettings:
    """Self Forcing. One step is one update of the generator and the critic's before it."""

    loss: Loss = "dmd"
    steps: int = 300
    batch: int = 16
    critic_updates: int = 5
    learning_rate: float = 1e-4
    critic_learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.99)
    warmup: int = 10
    decay: float = 0.3
    weight_decay: float = 0.01
    guidance: float = 0.0
    """real = conditional + guidance · (conditional - unconditional)."""
    levels: tuple[float, float] = (0.02, 0.98)
    """The noise levels a video is judged at, before the shift."""
    long_share: float = 0.2
    """Share of the updates on rollouts that go on beyond the judged length, of which the last part is judged."""
    longest: int = 10
    """Chunks of such a rollout at most."""
    switch_share: float = 0.5
    """Share of the rollouts whose prompt changes where a chunk begins."""
    sid_alpha: float = 1.0
    penalty: float = 10.0
    """Weight of R1 and R2 (GAN)."""
    penalty_noise: float = 0.05
    ema: float = 0.98
    ema_from: int = 40
    """The step from which on weights are averaged."""
    precision: Precision = "bfloat16"
    log_every: int = 5
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch",
            "critic_updates",
            "learning_rate",
            "critic_learning_rate",
            "log_every",
            "checkpoint_seconds",
        ):
            value = getattr(self, name)
            _require(value > 0, f"{name} is {value}; it must be positive")
        for name in ("warmup", "weight_decay", "guidance", "penalty", "ema_from"):
            value = getattr(self, name)
            _require(value >= 0, f"{name} is {value}; it must not be negative")
        for name in ("long_share", "switch_share", "decay"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"{name} is {value}; it is a share, between 0 and 1")
        for beta in (*self.betas, self.ema):
            _require(0 <= beta < 1, f"betas {list(self.betas)} and ema {self.ema} must lie in [0, 1)")
        low, high = self.levels
        _require(0 < low < high < 1, f"levels {list(self.levels)} must ascend between 0 and 1")
        _require(self.penalty_noise > 0, f"penalty_noise is {self.penalty_noise}; it must be positive")


class Shaped(Protocol):
    """The shape of a model and of the stream it is for."""

    @property
    def transformer(self) -> ModelConfig: ...

    @property
    def stream(self) -> StreamConfig: ...


class SelfForcingRun(Shaped, Protocol):
    """What Self Forcing is told, by this recipe's Settings or by those of a fine-tuning (sfrt_train.finetune)."""

    @property
    def seed(self) -> int: ...

    @property
    def chunks(self) -> int:
        """Of a video as it is judged."""

    @property
    def self_forcing(self) -> SelfForcingSettings: ...


@dataclass(frozen=True)
class Settings:
    """The whole recipe: shapes of the three networks, the stream they are made for, and their trainings."""

    seed: int = 7
    held_out: int = 100
    """Scenes (of 1008) that are never trained on."""
    transformer: ModelConfig = ModelConfig(
        dim=128,
        ffn_dim=512,
        num_heads=4,
        num_layers=6,
        freq_dim=128,
        text_dim=128,
        text_len=32,
        latent_channels=12,
        rotary_base=10.0,  # four rows and columns: with the usual 10000 all but one phase would hardly turn
    )
    taehv: TaehvConfig = TaehvConfig(latent_channels=12, encoder_width=32, decoder_widths=(64, 48, 32, 24))
    text: Umt5Config = Umt5Config(
        vocab_size=384, dim=128, dim_attn=128, dim_ffn=256, num_heads=4, num_layers=3, num_buckets=16, max_distance=32
    )
    stream: StreamConfig = StreamConfig(
        window=9, steps=(1000.0, 750.0, 500.0, 250.0), sampler="renoise", shift=3.0, height=64, width=64
    )
    many_steps: int = 8
    """Euler steps that a model trained by flow matching alone is used with."""
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    sharpening: AutoencoderSettings = AutoencoderSettings(
        steps=3000, free_share=0.5, learning_rate=1e-3, latent_noise=0.1, edge_weight=8.0
    )
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    clips: ClipSettings = field(default_factory=ClipSettings)
    teacher_forcing: FlowSettings = field(default_factory=FlowSettings)
    diffusion_forcing: FlowSettings = field(default_factory=lambda: FlowSettings("diffusion"))
    judge: FlowSettings = field(
        default_factory=lambda: FlowSettings(
            "none",
            start="teacher_forcing",
            steps=4000,
            lengths=(5,),
            learning_rate=5e-4,
            context_noise=0.0,
            unprompted=0.1,
            given=0.25,
            ema=0.995,
        )
    )
    pairs: PairsSettings = field(default_factory=PairsSettings)
    self_forcing: SelfForcingSettings = field(default_factory=SelfForcingSettings)

    @property
    def chunks(self) -> int:
        """Of a clip."""
        return self.clips.chunks

    def euler(self, steps: int) -> StreamConfig:
        """The stream of a model trained by flow matching alone, with so many steps."""
        listed = tuple(1000.0 * (steps - i) / steps for i in range(steps))
        return replace(self.stream, steps=listed, sampler="euler")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
