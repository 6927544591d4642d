"""The autoencoders alone, at random weights: one chunk of latents to uint8 frames on the host, state carried."""

from __future__ import annotations

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.conftest import Record, milliseconds
from sfrt.benchmark.protocol import case_of, peak
from sfrt.benchmark.shapes import Shape, random_decoder
from sfrt.device import dtype_name
from sfrt.ops.frames import frames


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["wan_vae", "taehv"])
def test_decode(benchmark: BenchmarkFixture, shape: Shape, device: str, kind: str, dtype: str, record: Record) -> None:
    config, stream = shape.decoders[kind], shape.stream
    decoder = random_decoder(config, dtype, device)
    size = (1, stream.chunk, config.latent_channels, stream.height // 8, stream.width // 8)
    latents = torch.randn(size, device=device)
    with torch.no_grad():
        _, state = decoder.decode(latents, None)

        def decode() -> None:
            frames(decoder.decode(latents, state)[0].squeeze(0)).cpu()

        benchmark.pedantic(decode, rounds=20, warmup_rounds=3)
    ran_in = dtype_name(decoder.dtype)  # an autoencoder may run in another than the model's
    case = case_of(shape.name, f"random {config}", stream, "torch", ran_in, device, decoder=kind)
    record(case, [milliseconds("decode_ms", benchmark), peak(device)])
