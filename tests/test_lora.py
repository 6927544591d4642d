"""export/sfrt_export/lora.py: every spelling merges to the golden weights, every fault has its own sentence."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt.bundle import Bundle, hash_file
from sfrt.bundle.writer import LazyTensor
from sfrt.cli import cli
from sfrt.errors import CheckpointError, ConfigError
from sfrt_export.checkpoint import load_transformer
from sfrt_export.export import export_checkpoint
from sfrt_export.lora import Adapter, Pair, load_adapter

WEIGHTS = Path(__file__).parent / "golden" / "dit" / "weights_d128h2l2.safetensors"
RANK = 4
QUERY = "blocks.0.self_attn.q"
Tensors = dict[str, Tensor]
Pairs = dict[str, tuple[Tensor, Tensor]]
"""Module → its down and up."""


def is_adapted(name: str) -> bool:
    """LongLive adapts every linear layer of its blocks."""
    return re.fullmatch(r"blocks\.\d\.(self_attn\.|cross_attn\.|ffn\.)[qkvo02]\.weight", name) is not None


@pytest.fixture(scope="module")
def golden_weights() -> Tensors:
    return {name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}


@pytest.fixture(scope="module")
def pairs(golden_weights: Tensors) -> Pairs:
    torch.manual_seed(0)
    return {
        name.removesuffix(".weight"): (torch.randn(RANK, weight.shape[1]) / 30, torch.randn(weight.shape[0], RANK) / 30)
        for name, weight in golden_weights.items()
        if is_adapted(name)
    }


def without(weights: Tensors, pairs: Pairs, scale: float) -> Tensors:
    """The base that becomes these weights when the pairs are merged at this scale."""
    base = dict(weights)
    for module, (down, up) in pairs.items():
        base[f"{module}.weight"] = weights[f"{module}.weight"] - scale * up @ down
    return base


@pytest.fixture(scope="module")
def base_file(tmp_path_factory: pytest.TempPathFactory, golden_weights: Tensors, pairs: Pairs) -> Path:
    """What LongLive's base is called and looks like, such that its adapter makes it the golden model."""
    path = tmp_path_factory.mktemp("base") / "longlive_base.pt"
    base = without(golden_weights, pairs, scale=1)
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in base.items()}}, path)
    return path


def peft(pairs: Pairs, prefix: str = "base_model.model.", ending: str = ".weight") -> Tensors:
    down = {f"{prefix}{module}.lora_A{ending}": pair[0] for module, pair in pairs.items()}
    return down | {f"{prefix}{module}.lora_B{ending}": pair[1] for module, pair in pairs.items()}


def trainers(pairs: Pairs, alpha: float, name: Callable[[str], str], lora: str = "lora_") -> Tensors:
    """As kohya's trainers write it, and those that took it over."""
    tensors: Tensors = {}
    for module, (down, up) in pairs.items():
        tensors[f"{name(module)}.{lora}down.weight"] = down
        tensors[f"{name(module)}.{lora}up.weight"] = up
        tensors[f"{name(module)}.alpha"] = torch.tensor(alpha)
    return tensors


def in_diffusers_names(module: str) -> str:
    name = module.replace("self_attn", "attn1").replace("cross_attn", "attn2")
    name = re.sub(r"\.([qkv])$", r".to_\1", name).replace(".o", ".to_out.0")
    return name.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")


def diffusers(pairs: Pairs) -> Tensors:
    return peft({in_diffusers_names(module): pair for module, pair in pairs.items()}, "transformer.")


SPELLINGS: dict[str, tuple[Callable[[Pairs], Any], float]] = {
    "LongLive": (lambda p: {"generator_lora": peft(p), "critic_lora": {}, "step": 3000}, 1),
    "plain PEFT": (peft, 1),
    "PEFT, named adapter": (lambda p: peft(p, ending=".default.weight"), 1),
    "PEFT around a wrapper": (lambda p: peft(p, "base_model.model.model."), 1),
    "FSDP and compile": (lambda p: peft(p, "base_model.model._fsdp_wrapped_module._orig_mod."), 1),
    "FSDP outside": (lambda p: {"state_dict": peft(p, "model._fsdp_wrapped_module.base_model.model.")}, 1),
    "bare": (lambda p: peft(p, ""), 1),
    "diffusers": (diffusers, 1),
    "ComfyUI": (lambda p: trainers(p, 2.0, lambda module: f"diffusion_model.{module}"), 0.5),
    "kohya": (lambda p: trainers(p, 8.0, lambda module: f"lora_unet_{module.replace('.', '_')}"), 2),
    "lora.down": (lambda p: trainers(p, 4.0, lambda module: module, "lora."), 1),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_merges_to_the_golden_latents(
    tmp_path: Path, golden_weights: Tensors, pairs: Pairs, spelling: str, golden_rollout: Callable[..., float]
) -> None:
    write, scale = SPELLINGS[spelling]
    torch.save({"generator": without(golden_weights, pairs, scale)}, tmp_path / "base.pt")
    torch.save(write(pairs), tmp_path / "lora.pt")
    assert golden_rollout(tmp_path / "base.pt", tmp_path / "merged", lora=tmp_path / "lora.pt") <= 1e-4
    merged = Bundle.open(tmp_path / "merged").load("transformer")
    for letter, part in zip("qkv", merged["blocks.1.self_attn.qkv.weight"].chunk(3), strict=True):
        torch.testing.assert_close(part, golden_weights[f"blocks.1.self_attn.{letter}.weight"], rtol=0, atol=1e-6)


def test_the_adapter_matters(tmp_path: Path, base_file: Path, golden_rollout: Callable[..., float]) -> None:
    assert golden_rollout(base_file, tmp_path / "base") > 1e-2


def test_safetensors(tmp_path: Path, base_file: Path, pairs: Pairs, golden_rollout: Callable[..., float]) -> None:
    save_file(peft(pairs), tmp_path / "lora.safetensors")
    assert golden_rollout(base_file, tmp_path / "merged", lora=tmp_path / "lora.safetensors") <= 1e-4


def load(path: Path, base: Path, alpha: float | None = None) -> Adapter:
    return load_adapter(path, load_transformer(base, heads=2, text_len=24), alpha)


def peft_folder(folder: Path, pairs: Pairs, **settings: Any) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(peft(pairs), folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2, "use_dora": False, "rank_pattern": {}, **settings}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_where_alpha_is_said(tmp_path: Path, base_file: Path, pairs: Pairs) -> None:
    file = tmp_path / "lora.pt"

    def scale(path: Path = file, alpha: float | None = None) -> float:
        (found,) = {pair.scale for pair in load(path, base_file, alpha).pairs.values()}
        return found

    torch.save(peft(pairs), file)
    assert scale() == 1, "nothing said: alpha is the rank"
    assert scale(alpha=6) == 1.5, "nothing but the argument"
    torch.save(trainers(pairs, 2.0, str), file)
    assert scale() == scale(alpha=2) == 0.5
    folder = peft_folder(tmp_path / "peft", pairs)
    assert scale(folder) == scale(folder / "adapter_model.safetensors") == scale(folder, alpha=2) == 0.5
    assert scale(peft_folder(folder, pairs, use_rslora=True)) == 1, "2 / √4"
    torch.save(trainers(pairs, 8.0, str), folder / "other.pt")
    assert scale(folder / "other.pt") == 2, "what a file says of itself is nearer than what lies beside it"
    for path, names in ((folder, ["adapter_model.safetensors", "adapter_config.json"]), (file, ["lora.pt"])):
        assert [read.name for read in load(path, base_file).files] == names, "all that was read, to be hashed"
    assert load(folder / "other.pt", base_file).files == (folder / "other.pt",)


def test_a_convolution(tmp_path: Path, golden_weights: Tensors, golden_rollout: Callable[..., float]) -> None:
    torch.manual_seed(1)
    weight = golden_weights["patch_embedding.weight"]
    down, up = torch.randn(2, *weight.shape[1:]) / 9, torch.randn(weight.shape[0], 2, 1, 1, 1) / 9
    base = weight - torch.einsum("or,rcthw->octhw", up.flatten(1), down)
    torch.save({**golden_weights, "patch_embedding.weight": base}, tmp_path / "base.pt")
    torch.save(peft({"patch_embedding": (down, up)}), tmp_path / "lora.pt")
    assert golden_rollout(tmp_path / "base.pt", tmp_path / "merged", lora=tmp_path / "lora.pt") <= 1e-4


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from([0.5, 1.0, 3.0]), st.integers(0, 999))
def test_merging_is_exact_in_float32(out: int, inputs: int, rank: int, scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def whole(*shape: int) -> Tensor:
        return torch.randint(-9, 10, shape, generator=generator).bfloat16()

    weight, pair = whole(out, inputs), Pair(whole(rank, inputs), whole(out, rank), scale)
    exact = weight.double() + scale * pair.up.double() @ pair.down.double()
    assert torch.equal(pair.merged_into(weight.float()).double(), exact)
    assert torch.equal(pair.merged_into(weight), exact.bfloat16()), "rounded once, at the end"


def test_weights_are_merged_one_at_a_time(tmp_path: Path, base_file: Path, pairs: Pairs) -> None:
    down, up = pairs[QUERY]
    torch.save(peft({**pairs, QUERY: (down * math.nan, up)}), tmp_path / "lora.pt")
    base = load_transformer(base_file, heads=2, text_len=24).tensors
    merged = load(tmp_path / "lora.pt", base_file).merged(base)
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        assert (tensor is base[name]) != is_adapted(name)
    bad = merged[f"{QUERY}.weight"]
    assert isinstance(bad, LazyTensor) and (bad.shape, bad.dtype) == ((128, 128), torch.float32)
    with pytest.raises(CheckpointError, match=rf"lora\.pt: lora_A of {QUERY}\.weight holds 512 values that are NaN"):
        bad.make()


def test_a_sum_beyond_the_dtype_is_refused(tmp_path: Path, golden_weights: Tensors) -> None:
    torch.save({name: tensor.half() for name, tensor in golden_weights.items()}, tmp_path / "base.pt")
    huge = peft({QUERY: (torch.full((1, 128), 300.0), torch.full((128, 1), 300.0))})
    torch.save(huge, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=rf"base\.pt: {QUERY}\.weight holds 16384 values that are NaN or inf"):
        export(tmp_path / "base.pt", tmp_path / "out", lora=tmp_path / "lora.pt")
    assert not (tmp_path / "out").exists()


def export(checkpoint: Path, output: Path, **options: Any) -> Bundle:
    return export_checkpoint(checkpoint, output, heads=2, text_len=24, **options)


def test_the_manifest_says_what_was_merged(tmp_path: Path, base_file: Path, pairs: Pairs) -> None:
    torch.save({"generator_lora": peft(pairs)}, tmp_path / "lora.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # such as that no adapter was given
        export(base_file, tmp_path / "merged", lora=tmp_path / "lora.pt")
    manifest = Bundle.open(tmp_path / "merged").manifest
    assert (manifest.family, manifest.weights) == ("longlive", f"generator + lora (rank {RANK}, scale 1)")
    assert manifest.source.keys() == {"transformer/longlive_base.pt", "lora/lora.pt"}
    assert manifest.source["lora/lora.pt"].sha256 == hash_file(tmp_path / "lora.pt")


def test_ranks_and_scales_that_differ_are_told(tmp_path: Path, base_file: Path, pairs: Pairs) -> None:
    other = {"blocks.1.ffn.0": (torch.ones(8, 128), torch.ones(256, 8))}
    torch.save(trainers({QUERY: pairs[QUERY], **other}, 2.0, str), tmp_path / "lora.pt")
    assert load(tmp_path / "lora.pt", base_file).label == "lora (rank 4 to 8, scale 0.25 to 0.5)"


def test_longlive_without_its_adapter_is_warned_of(tmp_path: Path, base_file: Path) -> None:
    with pytest.warns(UserWarning, match=r"\(lora\.pt\) is not merged: this is the base model alone \(--lora FILE"):
        bundle = export(base_file, tmp_path / "base")
    assert bundle.manifest.weights == "generator"


def test_the_command_line(tmp_path: Path, base_file: Path, pairs: Pairs) -> None:
    torch.save(peft(pairs), tmp_path / "lora.pt")
    arguments = ["export", base_file, "-o", tmp_path / "model", "--heads", 2, "--text-len", 24]
    arguments += ["--lora", tmp_path / "lora.pt", "--lora-alpha", 8]
    outcome = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    assert re.search(rf"^weights +generator \+ lora \(rank {RANK}, scale 2\), float32$", outcome.output, re.MULTILINE)
    assert "\nfrom lora/lora.pt " in outcome.output


def changed(**options: Any) -> Callable[[Pairs], Any]:
    """A PEFT file with tensors added or, where None, left out."""

    def write(pairs: Pairs) -> Any:
        tensors: dict[str, Any] = {**peft(pairs), **options}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    return write


def with_alphas(value: Tensor, module: str = QUERY) -> Callable[[Pairs], Any]:
    return lambda pairs: {**trainers(pairs, 4.0, str), f"{module}.alpha": value}


PEFT_QUERY = f"base_model.model.{QUERY}"
FAULTS: dict[str, tuple[Callable[[Pairs], Any], str]] = {
    "half a pair": (
        changed(**{f"{PEFT_QUERY}.lora_B.weight": None}),
        rf"is no LoRA of .*longlive_base\.pt: 1 incomplete pairs \({QUERY}\.weight without lora_B\); check that",
    ),
    "another model": (
        changed(**peft({"blocks.7.ffn.0": (torch.ones(4, 128), torch.ones(256, 4))})),
        r"1 pairs for weights that the model has not \(blocks\.7\.ffn\.0\.weight\)",
    ),
    "another width": (
        changed(**{f"{PEFT_QUERY}.lora_A.weight": torch.ones(4, 64)}),
        rf"1 misshapen pairs \(\[128, 4\] · \[4, 64\] for {QUERY}\.weight of \[128, 128\]\)",
    ),
    "two ranks": (changed(**{f"{PEFT_QUERY}.lora_B.weight": torch.ones(128, 8)}), r"\[128, 8\] · \[4, 128\] for"),
    "no rank": (
        changed(**peft({QUERY: (torch.ones(0, 128), torch.ones(128, 0))})),
        r"misshapen pairs \(\[128, 0\] · \[0, 128\] for",
    ),
    "a norm": (
        changed(**peft({"blocks.0.norm3": (torch.ones(4, 1), torch.ones(128, 4))})),
        r"1 misshapen pairs \(.* for blocks\.0\.norm3\.weight of \[128\]\)",
    ),
    "what is no pair": (
        changed(**{f"{PEFT_QUERY}.lora_magnitude_vector": torch.ones(128), "diffusion_model.head.diff": torch.ones(1)}),
        r"2 tensors of no pair \(base_model.*\.lora_magnitude_vector, diffusion_model\.head\.diff\)",
    ),
    "several at once": (
        changed(**{f"{PEFT_QUERY}.lora_B.weight": None, f"{PEFT_QUERY}.lora_B.bias": torch.ones(128)}),
        r"1 tensors of no pair \(.*\.bias\); 1 incomplete pairs \(.*\); check",
    ),
    "an alpha missing": (
        lambda pairs: {name: t for name, t in trainers(pairs, 4.0, str).items() if name != f"{QUERY}.alpha"},
        rf"1 incomplete pairs \({QUERY}\.weight without alpha\)",
    ),
    "an alpha alone": (with_alphas(torch.tensor(4.0), "head.head"), r"head\.head\.weight without lora_A and lora_B"),
    "no alpha": (with_alphas(torch.tensor(0.0)), rf"the alpha of {QUERY}\.weight is not one number above 0; download"),
    "alpha is NaN": (with_alphas(torch.tensor(math.nan)), r"is not one number above 0"),
    "alpha of two": (with_alphas(torch.ones(2)), r"is not one number above 0"),
    "two adapters": (
        lambda pairs: {**peft(pairs, ending=".one.weight"), **peft(pairs, ending=".two.weight")},
        r"holds lora_A of .*\.weight twice, under different names; give a file with one adapter",
    ),
    "quantised": (
        changed(**{f"{PEFT_QUERY}.lora_A.weight": torch.ones(4, 128, dtype=torch.int8)}),
        r"lora_A\.weight is int8, not a 16- or 32-bit float",
    ),
    "a model": (lambda pairs: {"generator": load_file(WEIGHTS)}, r"is not an adapter: nothing .* \(it has blocks\.0"),
    "nothing": (lambda pairs: {"step": 1}, r"holds no tensors where a model's should be \(it holds step\)"),
    "an infinite half": (
        changed(**{f"{PEFT_QUERY}.lora_B.weight": torch.full((128, 4), math.inf)}),
        r"512 values that",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_adapters_are_refused_in_one_sentence(tmp_path: Path, base_file: Path, pairs: Pairs, fault: str) -> None:
    write, message = FAULTS[fault]
    torch.save(write(pairs), tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        export(base_file, tmp_path / "out", lora=tmp_path / "lora.pt")
    assert str(caught.value).startswith(str(tmp_path / "lora.pt")) and "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["lora.pt"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"use_dora": True}, r"sets use_dora, which makes it more than a plain LoRA; merge it with PEFT and export"),
        ({"peft_type": "LOHA"}, r"sets peft_type"),
        ({"rank_pattern": {"ffn": 8}, "alpha_pattern": {"ffn": 8}}, r"sets rank_pattern, alpha_pattern"),
        ({"init_lora_weights": "pissa"}, r"sets init_lora_weights"),
        ({"r": 8}, r"says r is 8 but the pair of .*\.weight has rank 4; the two are not of one adapter"),
        ({"lora_alpha": None}, r"says lora_alpha is None, not a number above 0"),
        ({"lora_alpha": "2"}, r"says lora_alpha is '2', not a number above 0"),
        ({"lora_alpha": 0}, r"says lora_alpha is 0, not a number above 0"),
    ],
)
def test_settings_of_peft_that_are_not_merged(
    tmp_path: Path, base_file: Path, pairs: Pairs, settings: dict[str, Any], message: str
) -> None:
    folder = peft_folder(tmp_path / "peft", pairs, **settings)
    with pytest.raises(CheckpointError, match=rf"peft/adapter_config\.json {message}") as caught:
        load(folder, base_file)
    assert "\n" not in str(caught.value)


def test_an_alpha_that_contradicts_the_file(tmp_path: Path, base_file: Path, pairs: Pairs) -> None:
    torch.save(trainers(pairs, 16.0, str), tmp_path / "lora.pt")
    for path, own in ((tmp_path / "lora.pt", 16), (peft_folder(tmp_path / "peft", pairs), 2)):
        with pytest.raises(CheckpointError, match=rf"is made for an alpha of {own} \(.*\), not of 8; leave --lora-alp"):
            load(path, base_file, alpha=8)


def test_arguments_that_make_no_sense(tmp_path: Path, base_file: Path, pairs: Pairs) -> None:
    torch.save(peft(pairs), tmp_path / "lora.pt")
    for alpha in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ConfigError, match=r"an adapter's alpha is .*; it must be above 0 and finite"):
            load(tmp_path / "lora.pt", base_file, alpha)
    with pytest.raises(ConfigError, match=r"alpha 4 is of no adapter; give the file of one with --lora"):
        export(base_file, tmp_path / "out", lora_alpha=4)
    with pytest.raises(CheckpointError, match=r"gone\.pt does not exist"):
        export(base_file, tmp_path / "out", lora=tmp_path / "gone.pt")
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not a JSON object"):
        load(tmp_path / "lora.pt", base_file)
