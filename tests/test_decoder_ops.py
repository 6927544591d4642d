"""Both autoencoders running on each implementation of their ops, against plain torch, chunk by chunk.

The ops one by one are in test_kernels; without a GPU Triton's kernels run in its interpreter (see conftest).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfrt.config import DecoderConfig, TaehvConfig, WanVaeConfig
from sfrt.decoders import LoadedDecoder, load_decoder
from sfrt.decoders.taehv import Taehv
from sfrt.decoders.wan_vae import WanVae
from sfrt.errors import KernelInputError
from sfrt.ops.causal_input import CAUSAL_INPUT
from sfrt.ops.choice import Ops, torch_ops
from sfrt.ops.epilogue import EPILOGUE
from sfrt.ops.interleave import INTERLEAVE
from sfrt.ops.memory_input import MEMORY_INPUT
from sfrt.ops.op import Draw, ImplementationName, Op
from sfrt.ops.proof import poisoned_memory
from sfrt.ops.upsample import UPSAMPLE
from sfrt_export.verify import relative_error, seeded_weights

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TAEHV = TaehvConfig(latent_channels=4, encoder_width=8, decoder_widths=(12, 8, 6, 5))
WAN = WanVaeConfig(
    dim=6,
    latent_channels=4,
    dim_mult=(1, 2, 2),
    num_res_blocks=0,
    temporal_downsample=(False, True),
    mean=(0.0,) * 4,
    std=(1.0,) * 4,
)
DECODER_OPS: tuple[Op[..., Any], ...] = (CAUSAL_INPUT, EPILOGUE, INTERLEAVE, MEMORY_INPUT, UPSAMPLE)


def on(ops: Ops, config: DecoderConfig) -> LoadedDecoder:
    torch.manual_seed(0)
    module = Taehv(config) if isinstance(config, TaehvConfig) else WanVae(config)
    return load_decoder(config, module.state_dict(), DEVICE, torch.float32, ops)


def pinned(name: ImplementationName, *ops: Op[..., Any]) -> Ops:
    """Plain torch but for these ops."""
    pins: dict[str, ImplementationName] = {choice.op: "torch" for choice in torch_ops().choices}
    return Ops(DEVICE, pins | {op.name: name for op in ops})


def in_chunks(run: Any, video: Tensor, sizes: tuple[int, ...]) -> Iterator[Tensor]:
    state = None
    for chunk in video.split(sizes, dim=1):
        part, state = run(chunk, state)
        yield part


def same(found: Iterator[Tensor], expected: Iterator[Tensor]) -> None:
    for part, wanted in zip(found, expected, strict=True):
        assert part.shape == wanted.shape and wanted.std() > 0.01
        assert (part - wanted).norm() <= 1e-5 * wanted.norm()


@pytest.mark.parametrize(("batch", "sizes"), [(2, (1, 2)), (1, (2, 1))], ids=str)
@pytest.mark.parametrize("config", [WAN, TAEHV], ids=["wan_vae", "taehv"])
def test_triton_decodes_as_torch_does(config: DecoderConfig, batch: int, sizes: tuple[int, ...]) -> None:
    plain, kernels = on(torch_ops(), config), on(pinned("triton", *DECODER_OPS), config)
    latents = torch.randn(batch, sum(sizes), 4, 2, 2, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode(), poisoned_memory():
        same(in_chunks(kernels.decode, latents, sizes), in_chunks(plain.decode, latents, sizes))


@pytest.mark.parametrize("config", [WAN, TAEHV], ids=["wan_vae", "taehv"])
def test_triton_encodes_as_torch_does(config: DecoderConfig) -> None:
    plain, kernels = on(torch_ops(), config), on(pinned("triton", *DECODER_OPS), config)
    in_time = 2 if config is WAN else 4
    pixels = torch.rand(1, 2 * in_time + 1, 3, 8, 16, generator=torch.Generator().manual_seed(1))
    sizes = (in_time + 1, in_time)
    with torch.inference_mode(), poisoned_memory():
        same(in_chunks(kernels.encode, pixels, sizes), in_chunks(plain.encode, pixels, sizes))


def golden_part(folder: Path) -> tuple[DecoderConfig, dict[str, Tensor]]:
    case = json.loads((folder / "case.json").read_text())
    if folder.name == "taehv":
        return TaehvConfig(), seeded_weights(case["keys"], case["weights_seed"], case["weights_gain"])
    named = {name: case[name] for name in ("dim", "num_res_blocks")}
    lists = {name: tuple(case[name]) for name in ("dim_mult", "temporal_downsample", "mean", "std")}
    return WanVaeConfig(latent_channels=case["z_dim"], **named, **lists), load_file(folder / "weights.safetensors")


@pytest.mark.parametrize(
    ("kind", "dtype", "tolerance"),
    [
        ("wan_vae", torch.float32, 1e-4),
        pytest.param("wan_vae", torch.bfloat16, 2e-2, marks=pytest.mark.gpu),
        pytest.param("taehv", torch.float32, 1e-4, marks=pytest.mark.gpu),  # of full width: slow where interpreted
        pytest.param("taehv", torch.float16, 2e-2, marks=pytest.mark.gpu),
    ],
    ids=str,
)
def test_kernels_decode_the_golden(golden: Path, kind: str, dtype: torch.dtype, tolerance: float) -> None:
    config, weights = golden_part(golden / kind)
    decoder = load_decoder(config, weights, DEVICE, dtype, pinned("triton", *DECODER_OPS))
    tensors = load_file(golden / kind / "tensors.safetensors")
    with torch.inference_mode():
        pixels = torch.cat(tuple(in_chunks(decoder.decode, tensors["latents"].to(dtype), (3, 3))), dim=1).cpu()
    expected = tensors["pixels"] if kind == "taehv" else tensors["pixels"] / 2 + 0.5
    assert relative_error(pixels, expected) <= tolerance


@pytest.mark.parametrize("op", DECODER_OPS, ids=lambda op: op.name)
def test_each_op_is_used_and_may_be_a_kernel_by_itself(op: Op[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's convolutions leave their bias to kernels alone, whichever ops are kernels."""
    config = TAEHV if op in (MEMORY_INPUT, UPSAMPLE) else WAN
    called = []
    load = Op.load

    def counted(self: Op[..., Any], name: ImplementationName) -> Any:
        function = load(self, name)
        return lambda *args, **kwargs: (called.append((self.name, name)), function(*args, **kwargs))[1]

    monkeypatch.setattr(Op, "load", counted)
    kernel = on(pinned("triton", op), config)
    monkeypatch.undo()
    plain = on(torch_ops(), config)
    latents = torch.randn(1, 3, 4, 2, 2, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        same(in_chunks(kernel.decode, latents, (2, 1)), in_chunks(plain.decode, latents, (2, 1)))
    assert (op.name, "triton") in called


@pytest.mark.parametrize("config", [WAN, TAEHV], ids=["wan_vae", "taehv"])
def test_kernels_leave_state_and_latents_alone(config: DecoderConfig) -> None:
    decoder = on(pinned("triton", *DECODER_OPS), config)
    latents = torch.randn(1, 2, 4, 2, 2, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    given = latents.clone()
    with torch.inference_mode():
        _, state = decoder.decode(latents[:, :1], None)
        once, _ = decoder.decode(latents[:, 1:], state)
        again, _ = decoder.decode(latents[:, 1:], state)
    assert torch.equal(once, again) and torch.equal(latents, given)


@pytest.mark.parametrize(
    ("op", "case", "changes"),
    [
        (CAUSAL_INPUT, "norm", {"x": torch.zeros(1, 24, 3, 2, 5)}),
        (CAUSAL_INPUT, "norm", {"past": torch.zeros(1, 24, 3, 2, 5).to(memory_format=torch.channels_last_3d)}),
        (CAUSAL_INPUT, "norm", {"gamma": torch.zeros(48)[::2]}),
        (CAUSAL_INPUT, "norm", {"x": torch.zeros(1, 24, 3, 2, 5, dtype=torch.float64)}),
        (CAUSAL_INPUT, "sum", {"shortcut": torch.zeros(1, 20, 3, 2, 3)}),
        (CAUSAL_INPUT, "bias", {"bias": torch.zeros(12, dtype=torch.float16)}),
        (EPILOGUE, "all", {"x": torch.zeros(2, 12, 3, 5)}),
        (EPILOGUE, "all", {"shortcut": torch.zeros(2, 12, 3, 5)}),
        (EPILOGUE, "all", {"bias": torch.zeros(13)}),
        (INTERLEAVE, "bias", {"x": torch.zeros(1, 7, 1, 2, 2).to(memory_format=torch.channels_last_3d)}),
        (INTERLEAVE, "first frame", {"first": torch.zeros(2, 6, 1, 2, 3)}),
        (UPSAMPLE, "two frames", {"frames": 5}),
        (UPSAMPLE, "two frames", {"x": torch.zeros(2, 24, 3, 5)}),
        (MEMORY_INPUT, "memory", {"batch": 4}),
        (MEMORY_INPUT, "memory", {"memory": torch.zeros(1, 12, 3, 5)}),
        (MEMORY_INPUT, "memory", {"frames": torch.zeros(6, 12, 3, 5)}),
    ],
    ids=lambda value: value.name if isinstance(value, Op) else "-".join(value) if isinstance(value, dict) else value,
)
def test_what_kernels_refuse(op: Op[..., Any], case: str, changes: dict[str, Any]) -> None:
    inputs = op.cases[case](Draw(torch.float32, torch.device("cpu"))) | changes
    with pytest.raises(KernelInputError, match=f"^{op.name}: .*[a-z]"):
        op.check(**inputs)
