"""The Wan 2.1 VAE against the published one, chunked decoding against whole decoding, and the published names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfrt.config import WanVaeConfig
from sfrt.decoders.wan_vae import UpsampleConv2d, WanVae, WanVaeState
from sfrt.errors import ConfigError
from sfrt_export.verify import relative_error

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def narrow_config() -> WanVaeConfig:
    case = json.loads((GOLDEN / "wan_vae/case.json").read_text())
    return WanVaeConfig(
        dim=case["dim"],
        latent_channels=case["z_dim"],
        dim_mult=tuple(case["dim_mult"]),
        num_res_blocks=case["num_res_blocks"],
        temporal_downsample=tuple(case["temporal_downsample"]),
        mean=tuple(case["mean"]),
        std=tuple(case["std"]),
    )


def narrow_vae(dtype: torch.dtype = torch.float32) -> WanVae:
    with torch.device("meta"):
        vae = WanVae(narrow_config())
    weights = load_file(GOLDEN / "wan_vae/weights.safetensors")
    vae.load_state_dict({name: weight.to(dtype) for name, weight in weights.items()}, strict=True, assign=True)
    return vae


def decode_in_chunks(vae: WanVae, latents: Tensor, sizes: tuple[int, ...]) -> Tensor:
    state: WanVaeState | None = None
    pixels = []
    for chunk in latents.split(list(sizes), dim=1):
        part, state = vae.decode(chunk, state)
        pixels.append(part)
    return torch.cat(pixels, dim=1)


@pytest.fixture(scope="module")
def vectors() -> dict[str, Tensor]:
    return load_file(GOLDEN / "wan_vae/tensors.safetensors")


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return narrow_vae()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_golden(vectors: dict[str, Tensor], dtype: torch.dtype) -> None:
    pixels, _ = narrow_vae(dtype).decode(vectors["latents"].to(dtype))
    assert pixels.shape == vectors["pixels"].shape and pixels.dtype == torch.float32
    assert relative_error(pixels * 2 - 1, vectors["pixels"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_decode_golden_chunks(vectors: dict[str, Tensor], dtype: torch.dtype) -> None:
    vae = narrow_vae(dtype)
    latents = vectors["latents"].to(dtype)
    first, state = vae.decode(latents[:, :3])
    second, _ = vae.decode(latents[:, 3:], state)
    assert relative_error(first * 2 - 1, vectors["pixels_chunk0"]) <= TOLERANCE[dtype]
    assert relative_error(second * 2 - 1, vectors["pixels_chunk1"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_encode_golden(vectors: dict[str, Tensor], dtype: torch.dtype) -> None:
    latents, _ = narrow_vae(dtype).encode((vectors["encode_pixels"].transpose(1, 2) + 1) / 2)
    assert latents.shape == vectors["encode_latents"].shape and latents.dtype == torch.float32
    assert relative_error(latents, vectors["encode_latents"]) <= TOLERANCE[dtype]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_golden_on_cuda(vectors: dict[str, Tensor], dtype: torch.dtype) -> None:
    vae = narrow_vae(dtype).to("cuda")
    on_device = {name: tensor.to("cuda") for name, tensor in vectors.items()}
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):  # TF32 keeps 10 bits: too few for 1e-4
        pixels = decode_in_chunks(vae, on_device["latents"].to(dtype), (1, 2, 3))
        latents, _ = vae.encode((on_device["encode_pixels"].transpose(1, 2) + 1) / 2)
    assert relative_error(pixels * 2 - 1, on_device["pixels"]) <= TOLERANCE[dtype]
    assert relative_error(latents, on_device["encode_latents"]) <= TOLERANCE[dtype]


@pytest.mark.parametrize("sizes", [(1, 5), (3, 3), (1, 1, 4), (2, 1, 3), (1,) * 6], ids=str)
def test_chunked_decode_equals_whole_decode(vae: WanVae, vectors: dict[str, Tensor], sizes: tuple[int, ...]) -> None:
    # Two videos at once: a state that mixed the batch would show.
    latents = torch.cat((vectors["latents"], vectors["latents"].flip(1)))
    whole, _ = vae.decode(latents)
    assert whole.shape[1] == 4 * latents.shape[1] - 3
    torch.testing.assert_close(decode_in_chunks(vae, latents, sizes), whole, rtol=0, atol=1e-5)


def test_decode_leaves_state_and_latents_alone(vae: WanVae, vectors: dict[str, Tensor]) -> None:
    latents = vectors["latents"].clone()
    _, state = vae.decode(latents[:, :2])
    once, _ = vae.decode(latents[:, 2:4], state)
    again, _ = vae.decode(latents[:, 2:4], state)
    assert torch.equal(once, again)
    assert torch.equal(latents, vectors["latents"])


def test_state_holds_no_more_than_its_frames(vae: WanVae, vectors: dict[str, Tensor]) -> None:
    _, state = vae.decode(vectors["latents"])
    for tensor in (tensor for layer in state.layers for tensor in layer):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("chunks", [(1, 4, 20), (9, 12, 4), (5, 20), (25,)], ids=str)
def test_chunked_encode_equals_whole_encode(
    vae: WanVae, chunks: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = torch.rand(2, sum(chunks), 3, 16, 24, generator=torch.Generator().manual_seed(1))
    state: WanVaeState | None = None
    parts = []
    for chunk in pixels.split(list(chunks), dim=1):
        latents, state = vae.encode(chunk, state)
        parts.append(latents)
    assert [part.shape[1] for part in parts] == [(chunks[0] + 3) // 4, *(frames // 4 for frames in chunks[1:])]
    monkeypatch.setattr("sfrt.decoders.ENCODED_TOGETHER", 7)
    whole, _ = vae.encode(pixels)
    assert whole.shape == (2, 7, 16, 2, 3)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def test_encode_leaves_state_and_pixels_alone(vae: WanVae) -> None:
    pixels = torch.rand(1, 9, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    kept = pixels.clone()
    _, state = vae.encode(pixels[:, :5])
    once, _ = vae.encode(pixels[:, 5:], state)
    again, _ = vae.encode(pixels[:, 5:], state)
    assert torch.equal(once, again)
    assert torch.equal(pixels, kept)


def test_pixels_are_laid_out_for_delivery(vae: WanVae, vectors: dict[str, Tensor]) -> None:
    pixels, _ = vae.decode(vectors["latents"])
    assert pixels.permute(0, 1, 3, 4, 2).is_contiguous()


def test_upsampling_convolution_is_upsample_then_convolution() -> None:
    torch.manual_seed(0)
    layer = UpsampleConv2d(6, 4, 3).double()
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    upsampled = torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact")
    expected = torch.nn.functional.conv2d(upsampled, layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


def test_full_size_has_the_published_names_and_shapes() -> None:
    with torch.device("meta"):
        vae = WanVae(WanVaeConfig())
    published = json.loads((GOLDEN / "checkpoint_keys/wan2.1_vae.json").read_text())["keys"]
    assert {name: list(tensor.shape) for name, tensor in vae.state_dict().items()} == published


@pytest.mark.parametrize(
    ("shape", "named"),
    [((1, 8, 3, 16, 16), r"8 frames .* 1 \+ 4k"), ((1, 5, 3, 20, 16), "20×16")],
    ids=["length", "size"],
)
def test_encode_refuses_other_clips(vae: WanVae, shape: tuple[int, ...], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        vae.encode(torch.zeros(shape))
    _, state = vae.encode(torch.zeros(1, 1, 3, 16, 16))
    for frames in (0, 5):
        with pytest.raises(ConfigError, match=f"{frames} frames .* must be 4k"):
            vae.encode(torch.zeros(1, frames, 3, 16, 16), state)
