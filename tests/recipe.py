"""The recipe of the built-in model, so small that every stage of it runs in a second or two."""

from __future__ import annotations

from pathlib import Path

from sfrt.config import ModelConfig, TaehvConfig, Umt5Config
from sfrt_train.settings import (
    AutoencoderSettings,
    ClipSettings,
    FlowSettings,
    PairsSettings,
    ReadingSettings,
    SelfForcingSettings,
    Settings,
)
from sfrt_train.stages import STAGES

MICRO = Settings(
    transformer=ModelConfig(
        dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=32, text_len=24, latent_channels=4
    ),
    taehv=TaehvConfig(latent_channels=4, encoder_width=8, decoder_widths=(12, 8, 8, 8)),
    text=Umt5Config(
        vocab_size=384, dim=32, dim_attn=32, dim_ffn=32, num_heads=2, num_layers=1, num_buckets=8, max_distance=16
    ),
    autoencoder=AutoencoderSettings(steps=40, batch_frames=4, lengths=(2,), warmup=3),
    sharpening=AutoencoderSettings(steps=40, batch_frames=4, lengths=(2,), free_share=0.5, warmup=3),
    reading=ReadingSettings(steps=40, batch=8, warmup=3),
    clips=ClipSettings(clips=8, late_clips=4, chunks=3),
    teacher_forcing=FlowSettings(steps=40, batch_chunks=20, lengths=(3, 1), warmup=3),
    diffusion_forcing=FlowSettings("diffusion", steps=40, batch_chunks=12, lengths=(3, 1), warmup=3),
    judge=FlowSettings(
        "none",
        start="teacher_forcing",
        steps=40,
        batch_chunks=12,
        lengths=(3,),
        learning_rate=5e-3,
        warmup=3,
        unprompted=0.2,
        given=0.3,
    ),
    pairs=PairsSettings(videos=6, batch=4, teacher_steps=4, steps=40, batch_chunks=20, learning_rate=5e-3, warmup=3),
    self_forcing=SelfForcingSettings(
        steps=10,
        batch=4,
        critic_updates=1,
        learning_rate=1e-3,
        critic_learning_rate=1e-2,
        warmup=1,
        long_share=0.5,
        longest=4,
        ema_from=2,
    ),
)


def train(folder: Path, *stages: str, settings: Settings = MICRO) -> None:
    """Run some stages of the recipe, one after the other."""
    for stage in stages:
        STAGES[stage](settings, folder, "cpu")
