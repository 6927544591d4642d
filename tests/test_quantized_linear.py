"""Numbers in eight bits and the layers that multiply them: their error, and where float8 products run."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sfrt.bundle.quantization import Method
from sfrt.ops.eight_bits import FLOAT8, LARGEST, Float8Rows, quantize, row_scales
from sfrt.ops.linear import Linear, pack_for_cpu
from sfrt.ops.quantized_linear import QuantizedEmbedding, QuantizedLinear, place_quantized, takes_float8
from sfrt_export.verify import relative_error
from tests.dispatch import Called

METHODS = get_args(Method)


matrices = st.builds(
    lambda seed, rows, columns, exponents: (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
        * torch.tensor([10.0 ** exponents[row % len(exponents)] for row in range(rows)])[:, None]
    ),
    st.integers(0, 2**31),
    st.integers(1, 6),
    st.integers(1, 33),
    st.lists(st.integers(-42, 30), min_size=1, max_size=6),
)


@given(matrices)
def test_int8_is_off_by_half_a_step_of_its_row_at_most(rows: Tensor) -> None:
    scale = row_scales(rows, torch.int8)
    values = quantize(rows, scale, torch.int8)
    assert values.dtype == torch.int8 and values.min() >= -127, "symmetric: -128 is not used"
    assert ((values.double() * scale - rows.double()).abs() <= 0.5001 * scale.double()).all()
    normal = rows.abs().amax(-1) > 1e-30
    assert (values[normal].int().abs().amax(-1) == 127).all(), "all of the range is used"


@given(matrices)
def test_float8_is_off_by_a_sixteenth_of_each_value_at_most(rows: Tensor) -> None:
    scale = row_scales(rows, FLOAT8)
    found = quantize(rows, scale, FLOAT8).double() * scale
    bound = torch.maximum(rows.double().abs() / 16, scale.double() / 1024)  # half a step, of subnormals below 2^-6
    assert ((found - rows.double()).abs() <= 1.001 * bound).all()


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_rows_of_zeros_stay_zeros(dtype: torch.dtype, stored: torch.dtype) -> None:
    rows = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=stored)
    scale = row_scales(rows, dtype)
    assert scale.dtype == torch.float32 and (scale > 0).all() and torch.isfinite(scale).all()
    assert (quantize(rows, scale, dtype).float() * scale).tolist()[0] == [0.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.int8, FLOAT8])
def test_what_was_quantised_is_quantised_to_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 40)
    scale = row_scales(rows, dtype)
    values = quantize(rows, scale, dtype)
    assert torch.equal(quantize(values.float() * scale, scale, dtype).float(), values.float())


def test_beyond_a_static_scale_values_stop_at_the_largest() -> None:
    for dtype in (torch.int8, FLOAT8):
        largest = LARGEST[dtype]
        assert quantize(torch.tensor([1e6, -1e6]), torch.tensor(0.5), dtype).tolist() == [largest, -largest]


def filled(method: Method, reference: Linear) -> QuantizedLinear:
    layer = QuantizedLinear(reference.in_features, reference.out_features, reference.activation, method)
    dtype = layer.weight.dtype
    scale = row_scales(reference.weight.detach(), dtype)
    state = {
        "weight": quantize(reference.weight.detach(), scale, dtype),
        "weight_scale": scale[:, 0],
        "bias": reference.bias.detach(),
        "input_scale": torch.tensor(5 / 448),
    }
    layer.load_state_dict({name: state[name] for name in layer.state_dict()}, assign=True)
    return layer.requires_grad_(False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer(method: Method, dtype: torch.dtype) -> None:
    """Near the plain product; leading dimensions and the activation as in Linear; packing leaves it alone."""
    torch.manual_seed(0)
    plain = Linear(64, 48, activation="gelu_tanh").requires_grad_(False)
    layer = filled(method, plain)
    layer.bias.data = layer.bias.data.to(dtype)
    x = torch.randn(2, 7, 64)
    y = layer(x.to(dtype))
    assert y.dtype == dtype and y.shape == (2, 7, 48)
    allowed = (0.01 if method == "int8" else 0.05) + (0.005 if dtype == torch.bfloat16 else 0)
    assert relative_error(y, plain(x)) < allowed
    assert relative_error(layer.in_float32(x), plain.in_float32(x)) < allowed
    before = layer.state_dict()
    pack_for_cpu(layer, 16)
    assert all(torch.equal(value.float(), before[name].float()) for name, value in layer.state_dict().items())
    assert torch.equal(layer(x.to(dtype)), y)


def test_a_token_has_a_scale_of_its_own() -> None:
    """A huge token does not harm its neighbours, as it does where one scale serves all."""
    torch.manual_seed(0)
    plain = Linear(64, 48).requires_grad_(False)
    x = torch.randn(3, 64)
    x[0] *= 1e6
    dynamic = filled("float8", plain)(x)
    assert relative_error(dynamic[1:], plain(x)[1:]) < 0.05
    static = filled("float8-static", plain)
    static.input_scale = torch.nn.Parameter(x.abs().max() / 448, requires_grad=False)
    assert relative_error(static(x)[1:], plain(x)[1:]) > 0.9


def on_a_gpu(layer: QuantizedLinear, monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]) -> None:
    """Fake weights in bfloat16 on a GPU of this compute capability, which need not be there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    dtypes = {"weight": FLOAT8, "weight_scale": torch.float32, "bias": torch.bfloat16}
    fakes = {name: torch.empty(layer.get_parameter(name).shape, dtype=dtype) for name, dtype in dtypes.items()}
    layer.load_state_dict(fakes, assign=True)


@pytest.mark.parametrize(("capability", "sizes"), [((8, 0), (64, 48)), ((8, 9), (64, 48)), ((9, 0), (64, 40))])
def test_which_gpus_multiply_float8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], sizes: tuple[int, int]
) -> None:
    """From 8.9 on, for sizes of whole 16s; there, rows that come as float8 pass through nothing but the product."""
    able = capability >= (8, 9) and sizes[1] % 16 == 0
    layer = QuantizedLinear(*sizes, "none", "float8")
    with FakeTensorMode(), torch.device("cuda"):
        on_a_gpu(layer, monkeypatch, capability)
        assert takes_float8(layer) == able
        rows = Float8Rows(torch.empty(2, 7, 64, dtype=FLOAT8), torch.empty(2, 7, 1))
        with Called() as called, torch.no_grad():
            y = layer(rows)
    assert y.shape == (2, 7, sizes[1]) and y.dtype == torch.bfloat16
    if able:
        views = {"aten.view.default", "aten.t.default", "aten.unsqueeze.default"}
        assert "aten._scaled_mm.default" in called.names
        assert {name for name in called.names if name.startswith("aten.")} - views == {"aten._scaled_mm.default"}
    else:
        assert "aten._scaled_mm.default" not in called.names


@pytest.mark.parametrize("method", ["float8", "float8-static"])
def test_torchs_float8_product_is_ours(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    """The very call that a GPU gets; torch's own on a CPU."""
    torch.manual_seed(0)
    layer = filled(method, Linear(64, 48, activation="gelu_tanh").requires_grad_(False))
    layer.bias.data = layer.bias.data.bfloat16()
    x = torch.randn(2, 16, 64).bfloat16()
    expected = layer(x)
    monkeypatch.setattr(QuantizedLinear, "multiplies_float8", lambda self: True)
    assert relative_error(layer(x), expected) < 4e-3


def test_a_table_in_eight_bits() -> None:
    torch.manual_seed(0)
    rows = torch.randn(9, 24)
    for method in METHODS:
        table = QuantizedEmbedding(9, 24, method)
        scale = row_scales(rows, table.weight.dtype)
        table.load_state_dict({"weight": quantize(rows, scale, table.weight.dtype), "weight_scale": scale[:, 0]})
        ids = torch.tensor([[3, 0], [8, 3]])
        assert table(ids).dtype == torch.float32 and relative_error(table(ids), rows[ids]) < 0.04


@pytest.mark.parametrize("method", ["int8", "float8"])
def test_weights_only(method: Method) -> None:
    """Without a bias; a token's own range is of no matter."""
    torch.manual_seed(0)
    plain = Linear(64, 48, bias=False).requires_grad_(False)
    model = torch.nn.ModuleDict({"blocks": torch.nn.Sequential(plain)})
    place_quantized(model, method, ["blocks.0"], weights_only=True)
    layer = model.get_submodule("blocks.0")
    assert isinstance(layer, QuantizedLinear) and layer.bias is None and not takes_float8(layer)
    scale = row_scales(plain.weight, layer.weight.dtype)
    values = quantize(plain.weight, scale, layer.weight.dtype)
    layer.load_state_dict({"weight": values, "weight_scale": scale[:, 0]}, assign=True)
    x = torch.randn(3, 64)
    assert torch.equal(layer(x), torch.nn.functional.linear(x, values.float() * scale))


def needs_float8_gpu() -> None:
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("float8 products need compute capability 8.9")


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["float8", "float8-static"])
def test_the_gpus_float8_product_is_that_of_the_cpu(method: Method) -> None:
    needs_float8_gpu()
    torch.manual_seed(0)
    layer = filled(method, Linear(64, 48).requires_grad_(False))
    layer.bias.data = layer.bias.data.bfloat16()
    x = torch.randn(2, 7, 64).bfloat16()
    expected = layer(x)
    assert relative_error(layer.cuda()(x.cuda()), expected) < 4e-3
