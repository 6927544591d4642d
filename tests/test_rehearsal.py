"""What a stream asks of Triton's kernels, found out without running it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from sfrt.bundle import Bundle, Manifest, Quantization
from sfrt.bundle.quantization import Quality
from sfrt.ops.triton_kernels.launch import Launch
from sfrt_export.rehearsal import launches_of

TOKENS = 2 * 3  # of a latent frame of the tiny bundle


@pytest.fixture(scope="module")
def manifest(tiny_bundle: Path) -> Manifest:
    return Bundle.open(tiny_bundle).manifest


@pytest.fixture(scope="module")
def launches(manifest: Manifest) -> list[Launch]:
    return launches_of(manifest)


def of(launches: list[Launch], name: str) -> list[Launch]:
    return [launch for launch in launches if launch.kernel.__name__ == name]


def test_every_fill_of_every_ring(launches: list[Launch], manifest: Manifest) -> None:
    """Chunks of 3 in a window of 9: streams of 3 and 6 frames have rings of their own."""
    keys = {launch.arguments["keys"] for launch in of(launches, "_attention")}
    fills = {count // TOKENS for count in keys - {manifest.model.text_len}}
    rings = {launch.arguments["places"] // TOKENS for launch in of(launches, "_rolling_kv")}
    assert fills == rings == {3, 6, 9}


def test_nothing_is_computed_and_all_is_there(launches: list[Launch]) -> None:
    tensors = [v for launch in launches for v in launch.arguments.values() if isinstance(v, torch.Tensor)]
    assert {tensor.device.type for tensor in tensors} == {"meta"}
    names = Counter(launch.kernel.__name__ for launch in launches)
    passes, chunks = 5, 1 + 1 + 2 + 3 + 5  # the first frame by itself, limits of 1, 2, 3 chunks, and none
    assert names["_frames"] == chunks + 1  # that first frame comes apart from the rest of its chunk
    assert names["_noise"] == names["_finish"] == chunks
    assert names["_denoise"] == (passes - 2) * chunks
    assert {launch.arguments["qkv"].dtype for launch in of(launches, "_rolling_kv")} == {torch.bfloat16}


def test_quantised_blocks_are_played_as_they_are(manifest: Manifest) -> None:
    """A model of five blocks of two kinds gives what all five would: the kernels of both."""
    quality = Quality(0.01, 0.01, None)
    layers = {f"blocks.{number}.ffn.0": 0.01 for number in (1, 3, 4)}
    deep = replace(
        manifest, model=replace(manifest.model, num_layers=5), quantization=Quantization("float8", quality, layers)
    )
    float8 = [
        launch
        for launch in launches_of(replace(deep, decoder=None))
        if any(v.dtype == torch.float8_e4m3fn for v in launch.arguments.values() if isinstance(v, torch.Tensor))
    ]
    assert float8 and all(launch.needs == 89 for launch in float8)
