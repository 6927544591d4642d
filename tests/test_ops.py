"""Each operation against its definition in double precision, at sizes that fit nothing evenly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sfrt.config import ModelConfig, StreamConfig
from sfrt.ops import linear
from sfrt.ops.denoise import follow_flow, predict_x0, renoise
from sfrt.ops.frames import frames
from sfrt.ops.layout import latents_from_tokens, tokens_from_latents
from sfrt.ops.linear import Activation, Linear, pack_for_cpu
from sfrt.timesteps import Step, steps_of
from sfrt_export.verify import relative_error
from tests.dispatch import Called

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
DTYPES = list(TOLERANCE)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert relative_error(out, expected) <= TOLERANCE[out.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("shape", [(1, 24), (65, 24), (2, 7, 24)], ids=str)
def test_a_packed_linear_is_a_plain_one(shape: tuple[int, ...], activation: Activation, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer = Linear(24, 37, activation).requires_grad_(False).to(dtype)
    x = normal(*shape, dtype=dtype)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    if activation == "gelu_tanh":
        expected = F.gelu(expected, approximate="tanh")
    assert_near(layer(x), expected)
    pack_for_cpu(layer, rows=64)
    if dtype == torch.float32 and torch.backends.mkldnn.is_available():
        assert layer.weight.is_mkldnn
    assert_near(layer(x), expected)


def test_a_linear_in_float32_rounds_only_its_weights() -> None:
    torch.manual_seed(0)
    layer = Linear(24, 37).requires_grad_(False).bfloat16()
    x = normal(5, 24)
    assert_near(layer.in_float32(x), F.linear(x.double(), layer.weight.double(), layer.bias.double()))


@pytest.mark.parametrize("shape", [(7, 24), (2, 7, 24)], ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_on_a_gpu_the_gelu_is_in_the_products_epilogue(
    device: str, activation: Activation, shape: tuple[int, ...]
) -> None:
    """Where torch has the tanh-GELU there, and nobody asks for gradients. Fake tensors: no GPU is needed."""
    with torch.device("meta"):
        layer = Linear(24, 37, activation)
    with FakeTensorMode(), torch.device(device):
        layer.load_state_dict({"weight": torch.empty(37, 24), "bias": torch.empty(37)}, assign=True)
        x = torch.empty(shape)
        with Called() as called, torch.no_grad():
            y = layer(x)
        assert not linear._has_gelu_epilogue(x), "gradients are on"
    fused = device == "cuda" and activation == "gelu_tanh"
    assert y.shape == (*shape[:-1], 37) and y.device.type == device
    assert ("aten._addmm_activation.default" in called.names) == fused
    assert ("aten.gelu.default" in called.names) == (activation == "gelu_tanh" and not fused)


def test_the_epilogues_gelu_is_the_one_with_tanh_on_a_gpu_alone() -> None:
    """As torch itself takes the operation apart for a compiler; a CPU's, which can be run here, is that of erf."""
    layer, x = Linear(24, 37).requires_grad_(False), normal(7, 24)
    fused = torch._addmm_activation(layer.bias, x, layer.weight.t(), use_gelu=True)
    torch.testing.assert_close(fused, F.gelu(layer(x)))
    taken_apart = torch._decomp.decomposition_table[torch.ops.aten._addmm_activation.default]
    for device, expected in (("cuda", {"approximate": "tanh"}), ("cpu", {})):
        with FakeTensorMode(), torch.device(device), Called() as called:
            taken_apart(torch.empty(37), torch.empty(7, 24), torch.empty(24, 37), use_gelu=True)
        assert called.names["aten.gelu.default"] == expected


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_fused_gelu_is_that_of_the_definition(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, x = Linear(24, 40, "gelu_tanh").requires_grad_(False).to("cuda", dtype), normal(2, 7, 24, dtype=dtype).cuda()
    with torch.no_grad():
        found = layer(x)
    expected = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert_near(found, F.gelu(expected, approximate="tanh"))


STEPS = st.sampled_from(steps_of(StreamConfig()))


@given(STEPS, st.integers(0, 2**32))
def test_what_was_noised_along_the_flow_is_found_again(step: Step, seed: int) -> None:
    """x = (1 - sigma) · clean + sigma · noise has the flow noise - clean."""
    clean, noise = normal(6, 4, seed=seed), normal(6, 4, seed=seed + 1)
    x = (1 - step.sigma) * clean + step.sigma * noise
    torch.testing.assert_close(predict_x0(x, noise - clean, step), clean, rtol=0, atol=1e-5)
    torch.testing.assert_close(
        follow_flow(x, noise - clean, step),
        (1 - step.next_sigma) * clean + step.next_sigma * noise,
        rtol=0,
        atol=1e-5,
    )


@given(STEPS)
def test_a_step_starts_from_the_mix_its_sigma_says(step: Step) -> None:
    x0, noise = normal(6, 4), normal(6, 4, seed=1)
    kept = noise.clone()
    mixed = renoise(x0, noise, step)
    torch.testing.assert_close(mixed, (1 - step.next_sigma) * x0 + step.next_sigma * noise, rtol=0, atol=1e-6)
    assert torch.equal(noise, kept), "noise is the caller's"


def test_steps_hand_on_their_noise_level() -> None:
    assert all(earlier.next_sigma == later.sigma for earlier, later in pairwise(steps_of(StreamConfig())))


@given(
    frames=st.integers(1, 4),
    rows=st.integers(1, 4),
    columns=st.integers(1, 4),
    patch=st.tuples(st.just(1), st.integers(1, 3), st.integers(1, 3)),
    channels=st.integers(1, 5),
)
def test_tokens_and_back(frames: int, rows: int, columns: int, patch: tuple[int, int, int], channels: int) -> None:
    config = ModelConfig(dim=48, num_heads=2, num_layers=1, patch_size=patch, latent_channels=channels)
    height, width = rows * patch[1], columns * patch[2]
    latents = torch.arange(float(frames * channels * height * width)).view(frames, channels, height, width)
    tokens = tokens_from_latents(latents, config)
    assert tokens.shape == (frames * rows * columns, config.token_dim)
    assert torch.equal(latents_from_tokens(tokens, config, rows, columns), latents)
    # The last token is the last frame's last patch, (patch row, patch column, channel) in it.
    corner = latents[-1, :, -patch[1] :, -patch[2] :].permute(1, 2, 0).flatten()
    assert torch.equal(tokens[-1], corner)


def test_pixels_become_bytes() -> None:
    pixels = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 0.5, 1.0]).view(1, 1, 1, 5).expand(2, 3, 4, 5)
    shown = frames(pixels)
    assert shown.dtype == torch.uint8 and shown.shape == (2, 4, 5, 3) and shown.is_contiguous()
    assert shown[1, 3, :, 2].tolist() == [0, 0, 1, 128, 255]
