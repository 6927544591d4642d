"""Quantised bundles: what they hold, the backends that run them, the gate before them."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt import Runtime
from sfrt.backends import Grid
from sfrt.backends.loading import transformer_of
from sfrt.backends.torch import TorchBackend
from sfrt.bundle import Bundle, Quantization
from sfrt.bundle.quantization import Method, Quality
from sfrt.bundle.writer import BundleWriter
from sfrt.errors import BundleError, ConfigError
from sfrt.ops.choice import Ops
from sfrt.ops.eight_bits import FLOAT8
from sfrt.ops.op import Op
from sfrt.ring import ChunkSizes, Ring, chunk_sizes, ring_for
from sfrt.transformer import Transformer
from sfrt_export import gate as gate_module
from sfrt_export.export import export_checkpoint
from sfrt_export.quantize import quantizable
from sfrt_export.quantized_bundle import quantize_bundle
from sfrt_export.verify import relative_error

GOLDEN = Path(__file__).parent / "golden" / "dit"
WEIGHTS = GOLDEN / "weights_d128h2l2.safetensors"
CPU = torch.device("cpu")
METHODS = get_args(Method)
STREAM = {"height": 32, "width": 48, "steps": (1000.0, 500.0), "window": 9}
Edit = Callable[[dict[str, Tensor]], object]


def export(output: Path, method: Method | None, checkpoint: Path = WEIGHTS, **options: Any) -> Bundle:
    known = {"family": "self-forcing", "heads": 2, "text_len": 24, "stream": STREAM}
    return export_checkpoint(checkpoint, output, quantize=method, **{**known, **options})


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[Method, Bundle]:
    """The golden DiT by every method, with float32 graphs."""
    pytest.importorskip("onnx_ir")
    folder = tmp_path_factory.mktemp("quantised")
    return {method: export(folder / method, method, onnx=("float32",)) for method in METHODS}


def passes(bundle: Bundle, backend: str, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The flows of two chunks, the second over what the first left in the ring."""
    model, stream = bundle.manifest.model, bundle.manifest.stream
    grid, ring, sizes = Grid.of(model, stream), ring_for(stream), chunk_sizes(stream)
    generator = torch.Generator().manual_seed(3)
    rollout = transformer_of(bundle, backend, CPU, dtype).rollout(grid, ring, sizes, (700.0, 0.0))
    rollout.set_text(torch.randn(model.text_len, model.text_dim, generator=generator))
    for start in (0, sizes.later):
        plan = ring.plan(start, sizes.later)
        rollout.place(plan)
        tokens = torch.randn(len(plan.frames) * grid.tokens, model.token_dim, generator=generator)
        yield rollout.flow(tokens, 700.0).float().clone()
        rollout.refresh(tokens, 0.0)


class CountingOps:
    """Plain torch, and how often each op ran."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def __call__(self, op: Op[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any) -> Any:
            self.counts[op.name] += 1
            return op.reference(*args)

        return counted


def one_pass(bundle: Bundle, ops: CountingOps, dtype: torch.dtype) -> tuple[Tensor, Counter[str]]:
    """The flow of a pass over a bundle's model, without what is made once a prompt, and the ops that it ran."""
    model = bundle.manifest.model
    backend = TorchBackend(
        model, bundle.load("transformer", CPU, dtype), CPU, dtype, bundle.manifest.quantization, cast(Ops, ops)
    )
    ring, generator = Ring(1), torch.Generator().manual_seed(3)
    rollout = backend.rollout(Grid(2, 3), ring, ChunkSizes(1, 1), (700.0,))
    rollout.set_text(torch.randn(model.text_len, model.text_dim, generator=generator))
    rollout.place(ring.plan(0, 1))
    ops.counts.clear()
    return rollout.flow(torch.randn(6, model.token_dim, generator=generator), 700.0), ops.counts


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_stands_before_a_float8_product_writes_its_rows(
    bundles: dict[Method, Bundle], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """To the last bit what the products would have made of plain rows."""
    flow, counts = one_pass(bundles["float8"], CountingOps(), dtype)
    blocks = bundles["float8"].manifest.model.num_layers
    assert counts["modulate_float8"] == 3 * blocks and counts["modulate"] == 1, "the head's is plain"
    assert (counts["gelu_float8"], counts["gelu"]) == (blocks, 0)
    assert counts["quantize_rows"] == 2 * blocks, "those of attention"
    monkeypatch.setattr("sfrt.transformer.takes_float8", lambda layer: False)
    by_themselves, counts = one_pass(bundles["float8"], CountingOps(), dtype)
    assert torch.equal(by_themselves, flow)
    assert (counts["modulate_float8"], counts["gelu_float8"], counts["quantize_rows"]) == (0, 0, 6 * blocks)


@pytest.mark.parametrize("method", ["int8", "float8-static"])
def test_other_methods_read_plain_rows(bundles: dict[Method, Bundle], method: Method) -> None:
    counts = one_pass(bundles[method], CountingOps(), torch.float32)[1]
    assert {"modulate_float8", "gelu_float8", "quantize_rows"}.isdisjoint(counts) and counts["gelu"] == 2


def test_which_layers(bundles: dict[Method, Bundle]) -> None:
    bundle = bundles["int8"]
    stored = bundle.load("transformer")
    eight_bits = {name.removesuffix(".weight") for name, tensor in stored.items() if tensor.dtype == torch.int8}
    in_block = {"self_attn.qkv", "self_attn.o", "cross_attn.q", "cross_attn.kv", "cross_attn.o", "ffn.0", "ffn.1"}
    assert eight_bits == {f"blocks.{block}.{name}" for block in (0, 1) for name in in_block}
    assert eight_bits == set(quantizable(bundle.manifest.model))
    assert bundle.manifest.dtype == "bfloat16", "that of what is not quantised"


@pytest.mark.parametrize("method", METHODS)
def test_the_manifest_says_it_all(bundles: dict[Method, Bundle], method: Method) -> None:
    bundle = Bundle.open(bundles[method].path)
    found = bundle.manifest.quantization
    assert found == bundles[method].manifest.quantization and found is not None
    assert found.method == method and set(found.layers) == set(quantizable(bundle.manifest.model))
    allowed = 0.01 if method == "int8" else 0.06
    assert 0 < found.quality.flow_error < allowed and 0 < found.quality.latent_error < allowed
    assert found.quality.frame_psnr is None
    # Errors of single layers are no larger than that of all, and add up to about that, being independent.
    together = math.hypot(*found.layers.values())
    assert max(found.layers.values()) < 2 * found.quality.flow_error and 0.3 < together / found.quality.flow_error < 3


@pytest.mark.parametrize("method", METHODS)
def test_the_tensors_are_those_of_the_plain_bundle(
    bundles: dict[Method, Bundle], method: Method, tmp_path: Path
) -> None:
    plain = export(tmp_path / "plain", None).load("transformer")
    stored = bundles[method].load("transformer")
    size, dtype = bundles[method].manifest.files["transformer.safetensors"].bytes, torch.int8
    assert size < 0.7 * sum(tensor.nbytes for tensor in plain.values())
    if method != "int8":
        dtype = FLOAT8
    for name, tensor in plain.items():
        if stored[name].dtype == dtype:
            scale = stored[f"{name}_scale"]
            assert scale.dtype == torch.float32 and scale.shape == tensor.shape[:1]
            assert relative_error(stored[name].float() * scale[:, None], tensor) < (0.01 if method == "int8" else 0.04)
        else:
            assert torch.equal(stored[name], tensor)
    converted = bundles[method].load("transformer", dtype=torch.float16)
    assert (converted[SCALE].dtype, converted["head.linear.weight"].dtype) == (torch.float32, torch.float16)


@pytest.mark.parametrize("method", METHODS)
def test_golden_latents(golden_rollout: Callable[..., float], tmp_path: Path, method: Method) -> None:
    """The runtime streams a quantised bundle, and stays near the latents of the published code."""
    error = golden_rollout(WEIGHTS, tmp_path / "quantised", quantize=method)
    assert 1e-3 < error < (0.015 if method == "int8" else 0.06)


@pytest.mark.parametrize("method", METHODS)
def test_onnx_gives_what_torch_gives(bundles: dict[Method, Bundle], method: Method, tmp_path: Path) -> None:
    """Where activations have a scale per token, the graphs leave them alone, and are nearer to the plain model."""
    pytest.importorskip("onnxruntime")
    ours, theirs = (torch.cat(list(passes(bundles[method], backend))) for backend in ("onnx", "torch"))
    if method == "float8":
        plain = torch.cat(list(passes(export(tmp_path / "plain", None), "torch")))
        assert 1e-3 < relative_error(ours, plain) < relative_error(theirs, plain)
    else:
        # A value that lies between two of float8's may go either way by the last bit of what it was computed from.
        assert relative_error(ours, theirs) <= (1e-4 if method == "int8" else 5e-3)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("method", METHODS)
def test_graphs_are_valid_and_tensorrt_takes_their_operators(
    bundles: dict[Method, Bundle], method: Method, dtype: Any
) -> None:
    onnx = pytest.importorskip("onnx")
    from sfrt_export import onnx_graph
    from sfrt_export.tensorrt_operators import refusals

    bundle = bundles[method]
    for name, graph in onnx_graph.transformer_graphs(bundle.manifest.model, bundle.path, dtype):
        onnx.shape_inference.infer_shapes(graph, check_type=True, strict_mode=True, data_prop=True)
        assert [reason for reason in refusals(graph) if "Linear" in reason or "Gemm" in reason] == []
        kinds = [node.op_type for node in graph.graph.node]
        pairs = kinds.count("QuantizeLinear")
        weights = kinds.count("DequantizeLinear") - pairs
        layers = {
            "refresh": 7,
            "refresh_masked": 7,
            "flow": 5,
            "flow_masked": 5,
            "step": 12,
            "text_kv": 2,
            "modulation": 0,
        }[name]
        assert (weights, pairs) == (layers, layers if method == "float8-static" else 0), name


def test_a_bundle_becomes_a_quantised_one(tiny_bundle: Path, tmp_path: Path) -> None:
    """With decoder and text: frames are compared, prompts are read."""
    plain = Bundle.open(tiny_bundle)
    seen: list[tuple[str, int, int]] = []
    made = quantize_bundle(plain, tmp_path / "small", "int8", force=True, progress=lambda *told: seen.append(told))
    assert made == Bundle.open(tmp_path / "small")
    assert made.manifest.quantization is not None
    assert replace(made.manifest, name="tiny", quantization=None, files=plain.manifest.files) == plain.manifest
    assert (made.manifest.quantization.quality.frame_psnr or 0) > 20
    counts = [done for stage, done, _ in seen if stage == "gate"]
    assert counts == list(range(1, 21)), "14 layers, and three runs of each of two streams"
    with Runtime(made.path, device="cpu").session("a red circle", limit=1) as session:
        assert next(session).frames.shape == (9, 32, 48, 3)
    with pytest.raises(ConfigError, match=r"small is quantised already \(int8\)"):
        quantize_bundle(made, tmp_path / "again", "float8")


def harmed(folder: Path) -> Path:
    """The golden DiT with huge weights for a feature that is always zero: of no effect, but for the rows' scales."""
    weights = load_file(WEIGHTS)
    for block in (0, 1):
        for attention in ("self_attn", "cross_attn"):
            weights[f"blocks.{block}.{attention}.v.weight"][0] = 0.0
            weights[f"blocks.{block}.{attention}.v.bias"][0] = 0.0
            weights[f"blocks.{block}.{attention}.o.weight"][:, 0] = 1e5
    save_file(weights, folder / "harmed.safetensors")
    return folder / "harmed.safetensors"


def test_the_gate_refuses_what_is_harmed_and_leaves_nothing(tmp_path: Path) -> None:
    checkpoint, output = harmed(tmp_path), tmp_path / "bundles"
    output.mkdir()
    with pytest.raises(ConfigError, match=r"to int8 the model strays too far: its flow by .* --force") as caught:
        export(output / "model", "int8", checkpoint)
    assert "\n" not in str(caught.value)
    assert list(output.iterdir()) == []
    forced = export(output / "model", "int8", checkpoint, force=True).manifest.quantization
    assert forced is not None and forced.quality.flow_error > gate_module.MOST_FLOW_ERROR


def test_each_bound_is_kept() -> None:
    bounds = gate_module.MOST_FLOW_ERROR, gate_module.MOST_LATENT_ERROR, gate_module.LEAST_FRAME_PSNR
    assert list(gate_module._excesses(Quality(*bounds))) == []
    assert list(gate_module._excesses(Quality(0.0, 0.0, None))) == []
    for quality, word in (
        (Quality(0.11, 0.0, None), "flow"),
        (Quality(0.0, 0.21, None), "latents"),
        (Quality(0.0, 0.0, 24.9), "frames"),
    ):
        (told,) = gate_module._excesses(quality)
        assert word in told


def run(*arguments: object) -> tuple[int, str]:
    from click.testing import CliRunner  # not at the top: the GPU tests run where there is no command line

    from sfrt.cli import cli

    outcome = CliRunner().invoke(cli, list(map(str, arguments)))
    return outcome.exit_code, outcome.output


def test_the_command_line(tmp_path: Path, tiny_bundle: Path) -> None:
    known = ("--family", "self-forcing", "--heads", 2, "--text-len", 24, "--height", 32, "--width", 48)
    status, output = run("export", WEIGHTS, "-o", tmp_path / "model", *known, "--quantize", "int8")
    assert status == 0 and "int8, 14 layers; off by 0." in output and "most by blocks." in output
    assert "quantised" in run("info", tmp_path / "model")[1] and "quantised" not in run("info", tiny_bundle)[1]
    for arguments, told in (
        ((), "is a bundle: give --quantize or --quantize-text with -o DIR"),
        (("--quantize", "int8", "--heads", 2), "is a bundle: give --quantize or --quantize-text with -o DIR"),
        (("--quantize", "int8", "--shift", 3), "--shift says nothing without --tensorrt"),
        (("--quantize", "int8", "--dtype", "float16"), "--dtype says nothing without --tensorrt"),
    ):
        status, output = run("export", tiny_bundle, "-o", tmp_path / "no", *arguments)
        assert status == 2 and told in output
    for source in (tiny_bundle, WEIGHTS):
        status, output = run(
            "export", source, "--tensorrt", "--force", *(() if source == tiny_bundle else ("-o", "no"))
        )
        assert status == 2 and "--force says nothing without --quantize" in output
    with pytest.raises(ConfigError, match="no quantisation is called 'int4'; choose one of: int8, float8, float8-st"):
        export(tmp_path / "no", "int4")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="say how to quantise it"):
        export(tmp_path / "no", None, force=True)
    assert not (tmp_path / "no").exists()


def rewritten(bundle: Bundle, folder: Path, edit: Edit, quantization: Quantization | None) -> Bundle:
    """The bundle with some tensors changed, hashed anew."""
    tensors = bundle.load("transformer")
    edit(tensors)
    with BundleWriter(folder) as writer:
        writer.add_tensors("transformer", tensors)
        return writer.finish(replace(bundle.manifest, graphs=(), quantization=quantization))


SCALE = "blocks.1.ffn.0.weight_scale"


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda tensors: tensors.pop(SCALE), rf"1 missing \({SCALE}\)"),
        (lambda tensors: tensors.update({SCALE: tensors[SCALE][:-1]}), rf"1 misshapen \({SCALE}\)"),
        (lambda tensors: tensors.update({"blocks.0.self_attn.o.input_scale": torch.ones(())}), "1 unexpected"),
        (
            lambda tensors: tensors.update({"blocks.0.ffn.1.weight": tensors["blocks.0.ffn.1.weight"].float()}),
            r"1 of another type \(blocks\.0\.ffn\.1\.weight\)",
        ),
        (
            lambda tensors: tensors.update({"head.linear.weight": tensors["head.linear.weight"].to(torch.int8)}),
            r"1 of another type \(head\.linear\.weight\)",
        ),
    ],
    ids=["missing", "misshapen", "unexpected", "plain weight", "eight bits where none belong"],
)
def test_damaged_tensors_are_refused(bundles: dict[Method, Bundle], tmp_path: Path, edit: Edit, told: str) -> None:
    quantization = bundles["int8"].manifest.quantization
    broken = rewritten(bundles["int8"], tmp_path / "broken", edit, quantization)
    with pytest.raises(BundleError, match=told):
        transformer_of(broken, "torch", CPU, torch.float32)


def test_manifest_and_tensors_must_agree(bundles: dict[Method, Bundle], tmp_path: Path) -> None:
    bundle = bundles["int8"]
    given = bundle.manifest.quantization
    assert given is not None
    for number, (quantization, told) in enumerate(
        (
            (None, "14 unexpected"),
            (replace(given, method="float8"), "14 of another type"),
            (replace(given, layers={**given.layers, "time_projection": 0.1}), "'time_projection' is no layer"),
            (replace(given, layers={"blocks.7.ffn.0": 0.1}), r"'blocks\.7\.ffn\.0' is no layer"),
        )
    ):
        wrong = rewritten(bundle, tmp_path / str(number), lambda _: None, quantization)
        with pytest.raises(BundleError, match=told):
            transformer_of(wrong, "torch", CPU, torch.float32)
    with pytest.raises(ConfigError, match="at least one"):
        replace(given, layers={})


def test_a_flipped_bit_of_a_scale_is_found(bundles: dict[Method, Bundle], tmp_path: Path) -> None:
    copy = rewritten(bundles["int8"], tmp_path / "copy", lambda _: None, bundles["int8"].manifest.quantization)
    file = copy.path / "transformer.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[SCALE]["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"transformer\.safetensors is damaged"):
        Bundle.open(copy.path)


def test_memory_is_that_of_eight_bits(bundles: dict[Method, Bundle]) -> None:
    bundle = bundles["float8"]
    backend = transformer_of(bundle, "torch", CPU, torch.bfloat16)
    assert isinstance(backend, TorchBackend)
    with torch.device("meta"):
        plain = Transformer(bundle.manifest.model)
    blocks = sum(weight.nbytes for weight in backend.model.blocks.parameters())
    assert blocks < 0.6 * sum(2 * weight.numel() for weight in plain.blocks.parameters())
