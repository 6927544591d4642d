"""export/sfrt_export/checkpoint.py: every published spelling gives the same weights, every fault its own sentence."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfrt.backends import Grid
from sfrt.backends.torch import TorchBackend
from sfrt.config import ModelConfig, StreamConfig
from sfrt.errors import CheckpointError
from sfrt.ops.layout import latents_from_tokens, tokens_from_latents
from sfrt.ring import chunk_sizes, ring_for
from sfrt.transformer import Transformer
from sfrt_export.checkpoint import TransformerCheckpoint, load_transformer, plain_name
from sfrt_export.layout import module_shapes, module_tensors, published_shapes
from tests.checkpoints import GOLDEN, WEIGHTS, Tensors, full_size, shallower, without


@pytest.fixture(scope="module")
def weights() -> Tensors:
    return load_file(WEIGHTS)


def load(path: Path, **options: Any) -> TransformerCheckpoint:
    return load_transformer(path, heads=2, text_len=24, **options)


def prefixed(tensors: Tensors, prefix: str) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def wrapped_by_fsdp(tensors: Tensors) -> Tensors:
    """As saved out of FSDP over checkpointed, compiled blocks."""
    inner = {name.replace(".self_attn.", "._checkpoint_wrapped_module.self_attn."): name for name in tensors}
    return {f"model._fsdp_wrapped_module._orig_mod.{new}": tensors[name] for new, name in inner.items()}


def in_diffusers_names(tensors: Tensors) -> Tensors:
    """Written out by hand for the golden model, so as not to test a table with itself."""
    renamed = {}
    for name, tensor in tensors.items():
        new = {
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "head.head": "proj_out",
        }.get(name.rpartition(".")[0], "")
        if new:
            new += "." + name.rpartition(".")[2]
        else:
            new = name.replace("head.modulation", "scale_shift_table").replace("modulation", "scale_shift_table")
            new = new.replace("self_attn", "attn1").replace("cross_attn", "attn2").replace("norm3", "norm2")
            new = new.replace("ffn.0", "ffn.net.0.proj").replace("ffn.2", "ffn.net.2")
            for letter in "qkv":
                new = new.replace(f".{letter}.", f".to_{letter}.")
            new = new.replace(".o.", ".to_out.0.")
        renamed[new] = tensor
    return renamed


SPELLINGS: dict[str, Callable[[Tensors], Any]] = {
    "flat": lambda w: w,
    "generator": lambda w: {"generator": prefixed(w, "model.")},
    "generator beside other things": lambda w: {"generator": prefixed(w, "model."), "step": 600, "critic": {}},
    "both kinds": lambda w: {"generator": w, "generator_ema": {k: v + 1 for k, v in w.items()}},
    "only averaged": lambda w: {"generator_ema": prefixed(w, "model.")},
    "averaged, wrapped by fsdp": lambda w: {"generator_ema": prefixed(w, "model._fsdp_wrapped_module.")},
    "state_dict": lambda w: {"state_dict": prefixed(w, "net.")},
    "model": lambda w: {"model": w, "epoch": 3},
    "nested": lambda w: {"state_dict": {"generator": prefixed(w, "model.")}},
    "fsdp, checkpointing and compile": lambda w: {"generator": wrapped_by_fsdp(w)},
    "diffusers": in_diffusers_names,
    "flat with model.": lambda w: prefixed(w, "model."),
}
AVERAGED = {"only averaged", "averaged, wrapped by fsdp"}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_loads_to_the_same_tensors(tmp_path: Path, weights: Tensors, spelling: str) -> None:
    torch.save(SPELLINGS[spelling](weights), tmp_path / "model.pt")
    loaded = load(tmp_path / "model.pt")
    assert loaded.tensors.keys() == weights.keys()
    assert all(torch.equal(loaded.tensors[name], weights[name]) for name in weights)
    assert loaded.config == ModelConfig(128, 256, 2, 2, 64, 48, 24)


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_rolls_out_to_the_golden_latents(
    tmp_path: Path, weights: Tensors, spelling: str, golden_rollout: Callable[..., float]
) -> None:
    torch.save(SPELLINGS[spelling](weights), tmp_path / "model.pt")
    assert golden_rollout(tmp_path / "model.pt", tmp_path / "bundle", ema=spelling in AVERAGED) <= 1e-4


def test_a_diffusers_folder_rolls_out_to_the_golden_latents(
    tmp_path: Path, weights: Tensors, golden_rollout: Callable[..., float]
) -> None:
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_file(in_diffusers_names(weights), folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "text_len": 24, "num_layers": 2}))
    assert golden_rollout(tmp_path / "pipeline", tmp_path / "bundle", heads=None, text_len=None) <= 1e-4


@pytest.mark.parametrize("spelling", ["flat", "diffusers", "flat with model."])
def test_safetensors_spellings(tmp_path: Path, weights: Tensors, spelling: str) -> None:
    save_file(SPELLINGS[spelling](weights), tmp_path / "model.safetensors")
    loaded = load(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded.tensors[name], weights[name]) for name in weights)


def test_which_weights_are_taken(tmp_path: Path, weights: Tensors) -> None:
    averaged = {name: tensor + 1 for name, tensor in weights.items()}

    def taken(content: dict[str, Any], **options: Any) -> str:
        torch.save(content, tmp_path / "model.pt")
        loaded = load(tmp_path / "model.pt", **options)
        expected = averaged if "generator_ema" in loaded.weights else weights
        assert all(torch.equal(loaded.tensors[name], expected[name]) for name in weights)
        return loaded.weights

    for raw in ("generator", "model", "state_dict"):
        for both in ({raw: weights, "generator_ema": averaged}, {"generator_ema": averaged, raw: weights}):
            assert taken(both, prefer_ema=True) == taken(both, ema=True, prefer_ema=False) == "generator_ema"
            assert taken(both, prefer_ema=False) == taken(both, ema=False, prefer_ema=True) == raw
        assert taken({raw: weights}, prefer_ema=True) == raw
    assert taken({"generator_ema": averaged}, prefer_ema=False) == "generator_ema", "there is nothing else"
    assert taken({"state_dict": {"generator_ema": averaged}}, ema=True) == "state_dict.generator_ema"
    assert taken(weights) == "flat"
    with pytest.raises(CheckpointError, match=r"model\.pt has no averaged weights \(generator_ema\)"):
        taken({"generator": weights}, ema=True)
    with pytest.raises(CheckpointError, match=r"model\.pt has averaged weights only"):
        taken({"generator_ema": weights}, ema=False)


ADAPTERS: dict[str, Callable[[Tensors], Any]] = {
    "lora_A": lambda w: {"base_model.model.blocks.0.self_attn.q.lora_A.weight": torch.ones(4, 128)},
    "generator_lora": lambda w: {"generator_lora": {"x": torch.ones(1)}},
    "generator_lora beside a model": lambda w: {"generator": w, "generator_lora": {"x": torch.ones(1)}},
    "lora_down": lambda w: {"generator": {**w, "blocks.0.self_attn.q.lora_down.weight": torch.ones(4, 128)}},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapters_are_refused(tmp_path: Path, weights: Tensors, kind: str) -> None:
    torch.save(ADAPTERS[kind](weights), tmp_path / "lora.pt")
    with pytest.raises(
        CheckpointError,
        match=rf"lora\.pt holds an adapter \(.*{kind.split()[0]}.*\), .*; export its base .* with --lora FILE$",
    ):
        load(tmp_path / "lora.pt")


def test_a_folder_with_an_adapter_beside_its_base_is_refused(tmp_path: Path, weights: Tensors) -> None:
    torch.save({"generator": weights}, tmp_path / "longlive_base.pt")
    torch.save({"generator_lora": {"x": torch.ones(1)}}, tmp_path / "lora.pt")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        load(tmp_path)
    assert load(tmp_path / "longlive_base.pt").weights == "generator"


@pytest.mark.parametrize(("name", "heads", "layers"), [("wan_t2v_1.3b", 12, 30), ("wan_t2v_14b", 40, 40)])
def test_full_size_models_are_told_by_their_shapes(tmp_path: Path, name: str, heads: int, layers: int) -> None:
    torch.save({"generator": prefixed(full_size(name), "model.")}, tmp_path / "model.pt")
    config = load_transformer(tmp_path / "model.pt").config
    assert (config.num_heads, config.num_layers, config.text_len) == (heads, layers, 512)


def test_a_model_without_its_last_block_is_not_a_shallower_one(tmp_path: Path) -> None:
    torch.save(shallower(full_size("wan_t2v_1.3b"), 29), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"with 30 layers .* keys missing \(blocks\.29\."):
        load_transformer(tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps({"num_layers": 29}))
    assert load_transformer(tmp_path / "model.pt").config.num_layers == 29, "pruned on purpose, and said so"


def test_the_config_beside_a_single_file(tmp_path: Path, weights: Tensors) -> None:
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file(in_diffusers_names(weights), file)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "eps": 1e-5, "text_len": 24}))
    config = load_transformer(file).config
    assert (config.num_heads, config.eps, config.text_len) == (2, 1e-5, 24)
    (tmp_path / "config.json").write_text(json.dumps({"d_model": 4096, "num_heads": 64, "num_layers": 24}))
    assert load_transformer(file, heads=2).config.num_layers == 2, "a text encoder's config says nothing of a DiT"


def test_no_text_slots(weights: Tensors) -> None:
    with pytest.raises(CheckpointError, match="model text_len is 0; it must be positive"):
        load_transformer(WEIGHTS, heads=2, text_len=0)


def test_several_variants_in_a_folder(tmp_path: Path, weights: Tensors) -> None:
    for variant in ("", "fp16."):
        save_file(weights, tmp_path / f"model.{variant}safetensors")
        index = json.dumps({"weight_map": dict.fromkeys(weights, f"model.{variant}safetensors")})
        (tmp_path / f"model.safetensors.index.{variant}json").write_text(index)
    assert load(tmp_path).files == (tmp_path / "model.safetensors",)
    (tmp_path / "model.safetensors.index.fp16.json").rename(tmp_path / "model.fp16.safetensors.index.json")
    with pytest.raises(CheckpointError, match=r"several variants \(model\.fp16\.safetensors\.index\.json, model\.safe"):
        load(tmp_path)


def test_two_tensors_for_one_published_name(tmp_path: Path, weights: Tensors) -> None:
    renamed = in_diffusers_names(weights)
    torch.save({**renamed, "head.head.bias": weights["head.head.bias"].clone()}, tmp_path / "model.pt")
    assert load(tmp_path / "model.pt").tensors.keys() == weights.keys(), "the same values twice are one parameter"
    torch.save({**renamed, "head.head.bias": weights["head.head.bias"] + 1}, tmp_path / "model.pt")
    with pytest.raises(
        CheckpointError, match=r"two different tensors for head\.head\.bias, one of them head\.head\.bias"
    ):
        load(tmp_path / "model.pt")


def test_a_diffusers_folder_in_shards(tmp_path: Path, weights: Tensors) -> None:
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    renamed = sorted(in_diffusers_names(weights).items())
    files = {}
    for index, part in enumerate((renamed[:40], renamed[40:]), start=1):
        file = f"diffusion_pytorch_model-0000{index}-of-00002.safetensors"
        save_file(dict(part), folder / file)
        files.update({name: file for name, _ in part})
    index_file = folder / "diffusion_pytorch_model.safetensors.index.json"
    index_file.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": 2, "attention_head_dim": 64, "eps": 1e-5}))
    for path in (tmp_path / "pipeline", folder):
        loaded = load_transformer(path)
        assert all(torch.equal(loaded.tensors[name], weights[name]) for name in weights)
        assert (loaded.config.num_heads, loaded.config.eps, loaded.config.text_len) == (2, 1e-5, 512)
        assert len(loaded.files) == 2
    (folder / "config.json").write_text(json.dumps({"num_attention_heads": "two"}))
    with pytest.raises(CheckpointError, match="does not describe a model: invalid literal"):
        load_transformer(folder)
    (folder / "config.json").unlink()
    index_file.unlink()
    assert load_transformer(folder).tensors.keys() == weights.keys()
    save_file({"head.head.bias": weights["head.head.bias"], renamed[0][0]: renamed[0][1]}, folder / "extra.safetensors")
    with pytest.raises(CheckpointError, match="in more than one file"):
        load_transformer(folder)
    index_file.write_text(json.dumps({"weight_map": {"x": "../../outside.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"transformer/outside\.safetensors cannot be read"):
        load_transformer(folder)
    index_file.write_text("{}")
    with pytest.raises(CheckpointError, match=r"index\.json lists no files"):
        load_transformer(folder)


def test_the_old_torch_format(tmp_path: Path, weights: Tensors) -> None:
    torch.save({"generator": weights}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert load(tmp_path / "old.pt").tensors.keys() == weights.keys()
    data = (tmp_path / "old.pt").read_bytes()
    (tmp_path / "old.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match=r"old\.pt is truncated or"):
        load(tmp_path / "old.pt")


class Malicious:
    """A pickle that makes a file when it is read."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("new_format", [True, False])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path: Path, weights: Tensors, new_format: bool) -> None:
    target = tmp_path / "was-run"
    bad = {"generator": weights, "hook": Malicious(target)}
    torch.save(bad, tmp_path / "bad.pt", _use_new_zipfile_serialization=new_format)
    with pytest.raises(CheckpointError, match=r"wants to run code when it is read \(posix\.mkdir\), which was not"):
        load(tmp_path / "bad.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(bad["hook"]))
    with pytest.raises(CheckpointError, match="cannot be read without running what is in it, which was not done"):
        load(tmp_path / "plain.pkl")
    assert not target.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match="wants to run code"):
        load(tmp_path / "module.pt")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty; download it again"),
        (b"just some text, not a model", "is not a checkpoint: neither a safetensors nor a torch file"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer, not the file"),
        (b"PK\x03\x04 cut off", "is truncated: a torch file without its end"),
        (b"\x80\x02 no pickle", "is damaged, or a pickle"),
        (b"\xff\x00\x00\x00\x00\x00\x00\x00{}", "is truncated or damaged"),
        (b"PK\x05\x06" + bytes(18), "is truncated or no torch checkpoint"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"model\.pt {message}") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_truncated_files(tmp_path: Path, weights: Tensors) -> None:
    torch.save(weights, tmp_path / "model.pt")
    save_file(weights, tmp_path / "model.safetensors")
    for name in ("model.pt", "model.safetensors"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-100])
        with pytest.raises(CheckpointError, match=rf"{name} is truncated"):
            load(tmp_path / name)


def test_paths_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"gone\.pt does not exist; give the path"):
        load(tmp_path / "gone.pt")
    with pytest.raises(CheckpointError, match="has no weights"):
        load(tmp_path)


@pytest.mark.parametrize("content", [torch.ones(3), [torch.ones(3)], 5])
def test_torch_files_without_names(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt holds a \w+, not named tensors"):
        load(tmp_path / "model.pt")


def with_tensor(name: str, tensor: Tensor) -> Callable[[Tensors], Any]:
    return lambda w: {**w, name: tensor}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("head.head.bias"), r"\(69 keys\): 1 keys missing \(head\.head\.bias\); check that it is whole"),
        (
            without(*(f"blocks.1.self_attn.{letter}.weight" for letter in "qkvo")),
            r"4 keys missing \(blocks\.1\.self_attn\.q\.weight, .*k\.weight, .*v\.weight, …\)",
        ),
        (with_tensor("img_emb.proj.0.weight", torch.ones(1)), r"1 keys unexpected \(img_emb\.proj\.0\.weight\)"),
        (
            with_tensor("head.head.weight", torch.ones(60, 128)),
            r"1 keys misshapen \(head\.head\.weight is \[60, 128\], not \[64, 128\]\)",
        ),
        (without("patch_embedding.weight"), r"it has no patch_embedding\.weight of 5 axes \(it has blocks\.0\.cross"),
        (with_tensor("patch_embedding.weight", torch.ones(128, 64)), r"it has no patch_embedding\.weight of 5 axes"),
        (with_tensor("head.head.bias", torch.ones(64).char()), r"head\.head\.bias is int8, not a 16- or 32-bit float"),
        (with_tensor("model.head.head.bias", torch.ones(64)), r"holds head\.head\.bias twice"),
        (lambda w: {"generator": {"step": 1}}, r"holds no tensors where a model's should be \(it holds step\)"),
        (lambda w: {}, r"holds no tensors where a model's should be \(it holds nothing\)"),
    ],
)
def test_tensors_that_are_not_the_model(
    tmp_path: Path, weights: Tensors, change: Callable[[Tensors], Any], message: str
) -> None:
    torch.save(change(weights), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=message) as caught:
        load(tmp_path / "model.pt")
    assert str(tmp_path / "model.pt") in str(caught.value) and "\n" not in str(caught.value)


def test_heads_that_do_not_fit(weights: Tensors, tmp_path: Path) -> None:
    assert load_transformer(WEIGHTS).config.num_heads == 1, "128 is Wan's head size, which shapes do not tell"
    with pytest.raises(CheckpointError, match="does not describe a model: model dim 128 does not split into 3 heads"):
        load_transformer(WEIGHTS, heads=3)
    narrow = {name: torch.zeros(shape) for name, shape in published_shapes(ModelConfig(24, 8, 2, 1)).items()}
    torch.save(narrow, tmp_path / "narrow.pt")
    with pytest.raises(CheckpointError, match=r"dim 24 does not split into heads of 128; .* \(--heads N\)"):
        load_transformer(tmp_path / "narrow.pt")


@given(st.lists(st.sampled_from(["_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod."])), st.data())
def test_wrappers_are_removed_anywhere(wrappers: list[str], data: st.DataObject) -> None:
    parts = ["blocks.", "3.", "self_attn.", "q.", "weight"]
    for wrapper in wrappers:
        parts.insert(data.draw(st.integers(0, len(parts) - 1)), wrapper)
    prefix = data.draw(st.sampled_from(["", "model.", "net."]))
    assert plain_name(prefix + "".join(parts)) == "blocks.3.self_attn.q.weight"


@pytest.mark.parametrize("name", ["1.3b", "14b"])
def test_full_size_names_match_the_module(name: str) -> None:
    table = json.loads((GOLDEN / "checkpoint_keys" / f"wan_t2v_{name}.json").read_text())
    said = table["config"]
    config = ModelConfig(said["dim"], said["ffn_dim"], said["num_heads"], said["num_layers"])
    assert {key: list(shape) for key, shape in published_shapes(config).items()} == table["keys"]
    published = {key: torch.empty(shape, device="meta") for key, shape in table["keys"].items()}
    made = {key: value.make() for key, value in module_tensors(config, published).items()}
    with torch.device("meta"):
        Transformer(config).load_state_dict(made, strict=True, assign=True)


def test_announced_shapes_are_those_made(weights: Tensors) -> None:
    config = load(WEIGHTS).config
    for name, value in module_tensors(config, weights, torch.float32).items():
        made = value.make()
        assert made.dtype == value.dtype == torch.float32
        assert tuple(made.shape) == value.shape == module_shapes(config)[name]


def test_values_too_large_for_float16(weights: Tensors) -> None:
    large = {**weights, "head.head.bias": torch.full((64,), 1e5)}
    tensors = module_tensors(load(WEIGHTS).config, large, torch.float16)
    tensors["head.linear.weight"].make()
    with pytest.raises(CheckpointError, match=r"head\.linear\.bias holds values beyond the range of float16"):
        tensors["head.linear.bias"].make()


def test_converted_weights_compute_the_published_flow(weights: Tensors) -> None:
    """The first golden call through the torch backend: fusion, permutation and renaming together."""
    golden = load_file(GOLDEN / "dit" / "chunk3_full" / "tensors.safetensors")
    config = load(WEIGHTS).config
    state = {name: value.make() for name, value in module_tensors(config, weights, torch.float32).items()}
    stream, grid, cpu = StreamConfig(height=48, width=64), Grid(3, 4), torch.device("cpu")
    ring = ring_for(stream)
    with torch.inference_mode():
        backend = TorchBackend(config, state, cpu, torch.float32)
        rollout = backend.rollout(grid, ring, chunk_sizes(stream), (1000.0,))
        rollout.set_text(golden["prompt_embeds"][0])
        rollout.place(ring.plan(0, 3))
        tokens = rollout.flow(tokens_from_latents(golden["call.000.x"][0], config), 1000.0)
    flow, reference = latents_from_tokens(tokens, config, 3, 4), golden["call.000.flow"][0]
    assert float((flow - reference).norm() / reference.norm()) <= 1e-4
