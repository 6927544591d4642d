"""Every setting of the recipe, in one place."""

from __future__ import annotations

from dataclasses import dataclass, field

from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, Umt5Config


@dataclass(frozen=True)
class AutoencoderSettings:
    """The training of the autoencoder."""

    steps: int = 1300
    batch_frames: int = 26
    """Latent frames in a step, however long its clips are."""
    lengths: tuple[int, ...] = (2, 2, 5, 2)
    """Latent frames of a clip, in turn from step to step: short for variety, longer for what the memory carries."""
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
class FlowSettings:
    """The training of the transformer and the text encoder."""

    steps: int = 16500
    batch_chunks: int = 72
    """Chunks in a step, clean ones included, however long its clips are."""
    lengths: tuple[int, ...] = (5, 1)
    """Chunks of a clip, in turn from step to step. Only a first chunk and one after a prompt switch need the text,
    so every other step is made of first chunks alone."""
    clips: int = 3072
    chunks: int = 5
    switch_share: float = 0.5
    learning_rate: float = 1.5e-3
    warmup: int = 200
    decay: float = 0.35
    weight_decay: float = 0.02
    shift: float = 3.0
    context_noise: float = 0.05
    """Most noise that is mixed into the clean context, still labelled t = 0, so that small errors do not pile up."""
    ema: float = 0.997


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
        window=9,
        steps=(1000.0, 875.0, 750.0, 625.0, 500.0, 375.0, 250.0, 125.0),
        sampler="euler",
        shift=3.0,
        height=64,
        width=64,
    )
    autoencoder: AutoencoderSettings = field(default_factory=AutoencoderSettings)
    reading: ReadingSettings = field(default_factory=ReadingSettings)
    flow: FlowSettings = field(default_factory=FlowSettings)
