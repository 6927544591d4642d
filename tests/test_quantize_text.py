"""Text encoders in eight bits: what they say, what they take, the bundles that hold them, the gate before them."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sfrt import Runtime
from sfrt.backends.loading import text_encoder_of
from sfrt.backends.memory import text_encoder_need
from sfrt.bundle import Bundle, resolve_model
from sfrt.bundle.quantization import TextMethod, TextQuantization
from sfrt.bundle.writer import BundleWriter, LazyTensor
from sfrt.config import Umt5Config
from sfrt.errors import BundleError, ConfigError
from sfrt.ops.quantized_linear import QuantizedEmbedding, QuantizedLinear, weight_dtype
from sfrt.text import Umt5Encoder, empty_encoder, load_text_encoder, load_tokenizer
from sfrt_export import quantize
from sfrt_export.export import export_checkpoint
from sfrt_export.quantize import quantized_tensors
from sfrt_export.quantize_text import MOST_EMBEDS_ERROR, quantized_text
from sfrt_export.quantized_bundle import quantize_bundle
from sfrt_export.verify import relative_error
from tests.command_line import Run
from tests.test_memory import peak_of

GOLDEN = Path(__file__).parent / "golden" / "umt5"
WEIGHTS = GOLDEN.parent / "dit" / "weights_d128h2l2.safetensors"
CPU = torch.device("cpu")
METHODS: tuple[TextMethod, ...] = get_args(TextMethod)
PROMPT = "a red circle moving left on a white background"
SCALE = "blocks.1.ffn.fc1.weight_scale"
Edit = Callable[[dict[str, Tensor]], object]


def lazy(tensors: dict[str, Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor(tuple(value.shape), value.dtype, value.clone) for name, value in tensors.items()}


def quantised(config: Umt5Config, weights: dict[str, Tensor], method: TextMethod) -> tuple[Umt5Encoder, Umt5Encoder]:
    """The encoder with these weights in eight bits, and one with what they stand for."""
    encoder, unfolded = empty_encoder(config, TextQuantization(method, 0.0)), empty_encoder(config)
    layers = [n for n, m in encoder.named_modules() if isinstance(m, QuantizedLinear | QuantizedEmbedding)]
    tensors = {name: lazy.make() for name, lazy in quantized_tensors(lazy(weights), method, layers, {}).items()}
    encoder.load_state_dict(tensors, assign=True)
    plain = {
        name: tensors[name].float() * tensors[f"{name}_scale"][:, None] if f"{name}_scale" in tensors else value
        for name, value in weights.items()
    }
    unfolded.load_state_dict(plain, assign=True)
    return encoder, unfolded


def golden(dtype: torch.dtype) -> tuple[Umt5Config, dict[str, Tensor]]:
    case = json.loads((GOLDEN / "case.json").read_text())
    weights = load_file(GOLDEN / "weights.safetensors")
    return Umt5Config(vocab_size=case.pop("vocab"), **case), {name: value.to(dtype) for name, value in weights.items()}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[TextMethod, Bundle]:
    """The built-in model with its text encoder by every method, with its graphs."""
    pytest.importorskip("onnx_ir")
    folder, built_in = tmp_path_factory.mktemp("text"), Bundle.open(resolve_model())
    return {method: quantize_bundle(built_in, folder / method, None, text=method) for method in METHODS}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("method", "allowed"), [("float8", 0.32), ("int8", 0.1)])
def test_near_the_published_embeddings(method: TextMethod, allowed: float, dtype: torch.dtype, device: str) -> None:
    """As near as random weights allow: their attention turns a small error of a logit into a large one.

    They are computed in the dtype that the weights had.
    """
    expected = load_file(GOLDEN / "tensors.safetensors")
    encoder, _ = quantised(*golden(dtype), method)
    out = encoder.to(device)(expected["ids"].to(device), expected["mask"].to(device)).cpu()
    assert out.dtype == dtype
    assert allowed / 5 < relative_error(out, expected["prompt_embeds"]) < allowed
    assert not out[expected["mask"] == 0].any()


@pytest.mark.parametrize("method", METHODS)
def test_it_says_what_its_weights_stand_for(method: TextMethod) -> None:
    ids = load_file(GOLDEN / "tensors.safetensors")["ids"]
    encoder, unfolded = quantised(*golden(torch.float32), method)
    assert relative_error(encoder(ids), unfolded(ids)) < 1e-5


@pytest.mark.parametrize("method", METHODS)
def test_a_bundle_of_it(bundles: dict[TextMethod, Bundle], method: TextMethod) -> None:
    bundle, plain = Bundle.open(bundles[method].path), Bundle.open(resolve_model())
    facts, given = bundle.manifest.text_quantization, plain.load("text_encoder")
    assert facts == bundles[method].manifest.text_quantization and facts is not None and facts.method == method
    assert 0 < facts.embeds_error < (0.1 if method == "float8" else 0.04)
    stored = bundle.load("text_encoder")
    for name, tensor in given.items():
        if tensor.ndim == 2 and "pos_embedding" not in name:
            assert stored[name].dtype == weight_dtype(method)
            assert stored[f"{name}_scale"].shape == tensor.shape[:1]
        else:
            assert torch.equal(stored[name], tensor)
    assert bundle.manifest.files["transformer.safetensors"] == plain.manifest.files["transformer.safetensors"]
    ours, theirs = (load_text_encoder(one, CPU).read(PROMPT) for one in (bundle, plain))
    assert ours.dtype == theirs.dtype and relative_error(ours, theirs) < (0.06 if method == "float8" else 0.02)


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_stated_is_that_of_the_tensors(bundles: dict[TextMethod, Bundle], method: TextMethod) -> None:
    bundle, plain = bundles[method], Bundle.open(resolve_model())
    need = text_encoder_need(bundle.manifest).parts
    encoder = load_text_encoder(bundle, CPU).encoder
    assert isinstance(encoder, Umt5Encoder)
    taken = sum(weight.nbytes for weight in encoder.parameters())
    with (bundle.path / "text_encoder.safetensors").open("rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert need["text encoder"] == taken + header
    assert taken < 0.52 * sum(tensor.nbytes for tensor in plain.load("text_encoder").values())
    assert text_encoder_need(plain.manifest).parts.keys() == {"text encoder"}


def test_the_layer_that_is_unfolded_is_as_large_as_stated(bundles: dict[TextMethod, Bundle]) -> None:
    config = Umt5Config(vocab_size=8, dim=256, dim_attn=128, dim_ffn=1024, num_heads=2, num_layers=1)
    torch.manual_seed(0)
    weights = {name: value.bfloat16() for name, value in Umt5Encoder(config).state_dict().items()}
    encoder, _ = quantised(config, weights, "float8")
    manifest = bundles["float8"].manifest
    wide = replace(manifest, model=replace(manifest.model, text_dim=256), text_encoder=config)
    peak = peak_of(lambda: encoder(torch.tensor([[3, 4, 1]])))
    assert 0.9 < peak / text_encoder_need(wide).parts["text layer"] < 1.1


def test_the_prompt_cache_tells_it_from_the_plain_one(bundles: dict[TextMethod, Bundle]) -> None:
    found = [Runtime(model, device="cpu", backend="torch") for model in (None, *(b.path for b in bundles.values()))]
    first = [runtime._embeddings(PROMPT) for runtime in found]
    assert not torch.equal(first[0], first[1]) and not torch.equal(first[1], first[2])
    again = [Runtime(runtime._bundle.path, device="cpu", backend="torch") for runtime in found]
    assert all(torch.equal(runtime._embeddings(PROMPT), embeds) for runtime, embeds in zip(again, first, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_backend_reads_it_with_torch(bundles: dict[TextMethod, Bundle], method: TextMethod) -> None:
    pytest.importorskip("onnxruntime")
    bundle, plain = bundles[method], Bundle.open(resolve_model())
    assert bundle.manifest.graphs == plain.manifest.graphs != ()
    gone = plain.manifest.expected_files() - bundle.manifest.files.keys()
    assert gone == {f"text_encoder.{dtype}.onnx" for dtype in plain.manifest.graphs}
    encoder = text_encoder_of(bundle, "onnx", CPU)
    assert torch.equal(encoder.read(PROMPT), load_text_encoder(bundle, CPU).read(PROMPT))


def rewritten(bundle: Bundle, folder: Path, edit: Edit, facts: TextQuantization | None) -> Bundle:
    """The bundle with some of the text encoder's tensors changed, hashed anew."""
    tensors = bundle.load("text_encoder")
    edit(tensors)
    with BundleWriter(folder) as writer:
        writer.add_tensors("text_encoder", tensors)
        writer.add_file("transformer.safetensors", bundle.path / "transformer.safetensors")
        writer.add_tokenizer(bundle.tokenizer_path)
        return writer.finish(replace(bundle.manifest, graphs=(), decoder=None, text_quantization=facts))


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda tensors: tensors.pop(SCALE), rf"1 missing \({SCALE}\)"),
        (lambda tensors: tensors.pop("token_embedding.weight_scale"), r"1 missing \(token_embedding\.weight_scale\)"),
        (lambda tensors: tensors.update({SCALE: tensors[SCALE][:-1]}), rf"1 misshapen \({SCALE}\)"),
        (lambda tensors: tensors.update({"norm.weight_scale": torch.ones(128)}), "1 unexpected"),
        (
            lambda tensors: tensors.update({"blocks.0.attn.q.weight": tensors["blocks.0.attn.q.weight"].half()}),
            r"1 of another type \(blocks\.0\.attn\.q\.weight\)",
        ),
    ],
    ids=["missing", "missing of the table", "misshapen", "unexpected", "plain weight"],
)
def test_damaged_tensors_are_refused(bundles: dict[TextMethod, Bundle], tmp_path: Path, edit: Edit, told: str) -> None:
    broken = rewritten(bundles["float8"], tmp_path / "broken", edit, bundles["float8"].manifest.text_quantization)
    with pytest.raises(BundleError, match=f"the tensors of the text encoder do not fit its settings: .*{told}"):
        load_text_encoder(broken, CPU)


def test_manifest_and_tensors_must_agree(bundles: dict[TextMethod, Bundle], tmp_path: Path) -> None:
    for number, (facts, told) in enumerate(
        ((None, "22 unexpected"), (TextQuantization("int8", 0.1), "22 of another type"))
    ):
        with pytest.raises(BundleError, match=told):
            load_text_encoder(rewritten(bundles["float8"], tmp_path / str(number), lambda _: None, facts), CPU)
    with pytest.raises(ConfigError, match="a text encoder is said to be quantised, but there is none"):
        replace(bundles["int8"].manifest, text_encoder=None)


def test_a_flipped_bit_of_a_scale_is_found(bundles: dict[TextMethod, Bundle], tmp_path: Path) -> None:
    facts = bundles["int8"].manifest.text_quantization
    file = rewritten(bundles["int8"], tmp_path / "copy", lambda _: None, facts).path / "text_encoder.safetensors"
    data = bytearray(file.read_bytes())
    length = int.from_bytes(data[:8], "little")
    data[8 + length + json.loads(data[8 : 8 + length])[SCALE]["data_offsets"][0]] ^= 1
    file.write_bytes(data)
    with pytest.raises(BundleError, match=r"text_encoder\.safetensors is damaged"):
        text_encoder_of(Bundle.open(tmp_path / "copy", verify=False), "torch", CPU, verify=True)


def test_no_more_than_a_block_is_in_memory_at_a_time() -> None:
    """When a part of either encoder has run, none of its tensors is left, and so when one was made to be written."""
    bundle = Bundle.open(resolve_model())
    given = bundle.load("text_encoder")
    alive: list[weakref.ref[Tensor]] = []

    def make(name: str) -> Callable[[], Tensor]:
        def made() -> Tensor:
            tensor = given[name].clone()
            alive.append(weakref.ref(tensor))
            return tensor

        return made

    weights = {name: LazyTensor(tuple(value.shape), value.dtype, make(name)) for name, value in given.items()}
    told: list[tuple[object, ...]] = []

    def progress(*stage: object) -> None:
        told.append(stage)
        assert [tensor() for tensor in alive] == [None] * len(alive)

    config = bundle.manifest.text_encoder
    assert config is not None
    tensors, _ = quantized_text(config, weights, load_tokenizer(bundle), "float8", False, progress)
    assert told == [("text gate", number, 10) for number in range(1, 11)]
    for tensor in tensors.values():
        tensor.make()
        progress()


def harmed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Huge weights for a feature that is always zero: of no effect, but for the rows' scales."""
    for block in range(3):
        weights[f"blocks.{block}.norm1.weight"][0] = 0.0
        weights[f"blocks.{block}.attn.v.weight"][:, 0] = 5e4
    return weights


@pytest.mark.parametrize("method", METHODS)
def test_the_gate_refuses_what_is_harmed(method: TextMethod) -> None:
    bundle = Bundle.open(resolve_model())
    config, tokenizer = bundle.manifest.text_encoder, load_tokenizer(bundle)
    assert config is not None
    weights = lazy(harmed({name: value.clone() for name, value in bundle.load("text_encoder").items()}))
    with pytest.raises(ConfigError, match=rf"^quantised to {method} the text encoder strays too far: .* --force$"):
        quantized_text(config, weights, tokenizer, method, False, lambda *_: None)
    _, facts = quantized_text(config, weights, tokenizer, method, True, lambda *_: None)
    assert facts.embeds_error > MOST_EMBEDS_ERROR
    weights["norm.weight"] = replace(weights["norm.weight"], make=lambda: torch.full((128,), torch.nan))
    with pytest.raises(ConfigError, match="makes values that are no numbers"):
        quantized_text(config, weights, tokenizer, method, True, lambda *_: None)


@pytest.mark.parametrize("method", METHODS)
def test_a_published_layout_is_quantised_on_its_way(tmp_path: Path, method: TextMethod) -> None:
    from tests.test_export import save_text_model  # not at the top: the GPU tests run where there is no command line

    encoder, tokenizer = save_text_model(tmp_path)
    known = {"family": "self-forcing", "heads": 2, "text_len": 24, "text_encoder": encoder, "tokenizer": tokenizer}
    plain = export_checkpoint(WEIGHTS, tmp_path / "plain", **known)
    bundle = export_checkpoint(WEIGHTS, tmp_path / "model", quantize_text=method, **known)
    ours, theirs = (load_text_encoder(one, CPU).read("1 2 3") for one in (bundle, plain))
    assert 1e-3 < relative_error(ours, theirs) < MOST_EMBEDS_ERROR


def test_the_command_line(run: Run, tmp_path: Path, tiny_bundle: Path) -> None:
    from tests.test_export import save_text_model

    encoder, tokenizer = save_text_model(tmp_path)
    known = ("--family", "self-forcing", "--heads", 2, "--text-len", 24, "--height", 32, "--width", 48)
    reader = ("--text-encoder", encoder, "--tokenizer", tokenizer)
    exported = run("export", WEIGHTS, "-o", "one", *known, *reader, "--quantize-text", "float8")
    assert exported.code == 0 and "layers, float8, embeddings off by " in exported.out
    assert run("info", "one").out.count("text layer") == 2
    both = ("--quantize", "int8", "--quantize-text", "int8", "--force")
    assert run("export", tiny_bundle, "-o", "two", *both).code == 0
    manifest = Bundle.open(tmp_path / "two").manifest
    assert manifest.quantization is not None and manifest.text_quantization is not None
    with Runtime(tmp_path / "two", device="cpu").session("a red circle", limit=1) as session:
        assert next(session).frames.shape == (9, 32, 48, 3)
    for source, arguments, told in (
        ("one", ("--quantize-text", "int8"), "the text encoder of one is quantised already (float8)"),
        (
            WEIGHTS,
            (*known, "--quantize-text", "int8"),
            "there is no text encoder to quantise; give one with --text-enc",
        ),
        (tiny_bundle, ("--quantize-text", "int4"), "no quantisation of a text encoder is called 'int4'; choose one of"),
        (tiny_bundle, ("--force",), "give --quantize or --quantize-text with -o DIR"),
    ):
        assert told in run("export", source, "-o", "no", *arguments).complaint
    bare = export_checkpoint(WEIGHTS, tmp_path / "bare", family="self-forcing", heads=2)
    with pytest.raises(ConfigError, match=r"bare has no text encoder to quantise; export the checkpoint again with"):
        quantize_bundle(bare, tmp_path / "no", None, text="int8")
    with pytest.raises(ConfigError, match=r"bare to quantise, and how"):
        quantize_bundle(bare, tmp_path / "no", None)
    assert not (tmp_path / "no").exists()


def test_a_table_is_quantised_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    table = {"table.weight": torch.randn(4096, 64).bfloat16()}
    whole = quantized_tensors(lazy(table), "float8", ["table"], {})
    expected = {name: tensor.make() for name, tensor in whole.items()}
    monkeypatch.setattr(quantize, "_BLOCK", 100 * 64)
    made = quantized_tensors(lazy(table), "float8", ["table"], {})
    for name, tensor in made.items():
        assert torch.equal(tensor.make().float(), expected[name].float())
    read, written = table["table.weight"].nbytes, expected["table.weight"].nbytes
    assert peak_of(made["table.weight"].make) < 1.2 * (read + 2 * written)
