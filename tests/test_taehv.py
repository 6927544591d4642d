"""The tiny autoencoder against the published one, and its state against no state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfrt.config import TaehvConfig
from sfrt.decoders.taehv import Taehv, _run
from sfrt_export.verify import relative_error, seeded_weights

GOLDEN = Path(__file__).parent / "golden"
NARROW = TaehvConfig(latent_channels=6, encoder_width=8, decoder_widths=(16, 12, 8, 8))


def golden_weights() -> dict[str, Tensor]:
    case = json.loads((GOLDEN / "taehv/case.json").read_text())
    return seeded_weights(case["keys"], case["weights_seed"], case["weights_gain"])


@pytest.fixture(scope="module")
def narrow() -> Taehv:
    torch.manual_seed(0)
    return Taehv(NARROW).requires_grad_(False)


def published(dtype: torch.dtype) -> Taehv:
    with torch.device("meta"):
        model = Taehv(TaehvConfig())
    model.load_state_dict({key: value.to(dtype) for key, value in golden_weights().items()}, strict=True, assign=True)
    return model


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 2e-2)])
def test_golden(dtype: torch.dtype, tolerance: float) -> None:
    model, tensors = published(dtype), load_file(GOLDEN / "taehv/tensors.safetensors")
    with torch.inference_mode():
        pixels, _ = model.decode(tensors["latents"].to(dtype))
        latents, _ = model.encode_groups(tensors["encode_pixels"].to(dtype))
    assert pixels.shape == tensors["pixels"].shape and latents.shape == tensors["encode_latents"].shape
    assert relative_error(pixels, tensors["pixels"]) <= tolerance
    assert relative_error(latents, tensors["encode_latents"]) <= tolerance


def test_bfloat16_agrees_before_the_pixels_are_cut() -> None:
    """The golden's random pixels spread over ±100 and nearly all are cut; 0.7 % before the cut is 5 % after it."""
    exact, rounded = published(torch.float32), published(torch.bfloat16)
    tensors = load_file(GOLDEN / "taehv/tensors.safetensors")
    with torch.inference_mode():
        reference, _ = exact.decode_unclamped(tensors["latents"])
        pixels, _ = rounded.decode_unclamped(tensors["latents"].bfloat16())
        latents, _ = rounded.encode_groups(tensors["encode_pixels"].bfloat16())
    assert relative_error(pixels, reference) <= 2e-2
    assert relative_error(latents, tensors["encode_latents"]) <= 2e-2


def test_names_and_shapes_are_the_published_ones() -> None:
    published = json.loads((GOLDEN / "checkpoint_keys/taew2_1.json").read_text())
    with torch.device("meta"):
        own = {key: list(value.shape) for key, value in Taehv(TaehvConfig()).state_dict().items()}
    assert own == published["keys"]


@pytest.mark.parametrize("chunks", [(3, 3, 1), (1, 1, 5), (2, 5), (7,)])
def test_chunks_decode_to_the_whole(narrow: Taehv, chunks: tuple[int, ...]) -> None:
    latents = torch.randn(2, sum(chunks), 6, 3, 5, generator=torch.Generator().manual_seed(1))
    whole, _ = narrow.decode(latents)
    assert whole.shape == (2, 4 * sum(chunks) - 3, 3, 24, 40)
    state, parts = None, []
    for chunk in latents.split(chunks, dim=1):
        pixels, state = narrow.decode(chunk, state)
        parts.append(pixels)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("chunks", [(9, 12, 4), (1, 4, 20), (5, 20), (25,)])
def test_chunks_encode_to_the_whole(narrow: Taehv, chunks: tuple[int, ...]) -> None:
    pixels = torch.rand(2, sum(chunks), 3, 16, 24, generator=torch.Generator().manual_seed(1))
    by_hand = torch.cat((pixels[:, :1].expand(-1, 3, -1, -1, -1), pixels), dim=1)
    whole, _ = _run(narrow.encoder, by_hand, None)
    state, parts = None, []
    for chunk in pixels.split(chunks, dim=1):
        latents, state = narrow.encode(chunk, state)
        parts.append(latents)
    assert [part.shape[1] for part in parts] == [(chunks[0] + 3) // 4, *(frames // 4 for frames in chunks[1:])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=0, atol=1e-5)


def test_no_frame_depends_on_a_later_one(narrow: Taehv) -> None:
    latents = torch.randn(1, 4, 6, 2, 2, generator=torch.Generator().manual_seed(2))
    later = latents.clone()
    later[:, 3] += 1
    before, after = narrow.decode(latents)[0], narrow.decode(later)[0]
    torch.testing.assert_close(before[:, :9], after[:, :9])
    assert not torch.allclose(before[:, 9:], after[:, 9:])


def test_encode_lets_the_first_frame_fill_its_latent_frame(narrow: Taehv) -> None:
    pixels = torch.rand(1, 9, 3, 16, 24, generator=torch.Generator().manual_seed(3))
    latents, _ = narrow.encode(pixels)
    assert latents.shape == (1, 3, 6, 2, 3)
    by_hand, _ = narrow.encode_groups(torch.cat((pixels[:, :1], pixels[:, :1], pixels[:, :1], pixels), dim=1))
    torch.testing.assert_close(latents, by_hand)


def test_decoding_stays_within_the_picture_and_passes_gradients() -> None:
    torch.manual_seed(4)
    model = Taehv(NARROW)
    latents = (100 * torch.randn(1, 2, 6, 2, 2)).requires_grad_()
    pixels, _ = model.decode(latents)
    assert pixels.min() >= 0 and pixels.max() <= 1
    model.decode_unclamped(latents / 100)[0].sum().backward()
    assert latents.grad is not None and latents.grad.isfinite().all() and latents.grad.abs().sum() > 0
    assert all(value.grad is not None for value in model.decoder.parameters())
