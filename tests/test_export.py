"""export/sfrt_export/export.py: checkpoints become bundles, wholly or not at all, in bounded memory."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfrt.bundle import Bundle, TaehvPart, WanVaePart, hash_file
from sfrt.cli import cli
from sfrt.config import StreamConfig, TaehvConfig, Umt5Config
from sfrt.decoders import load_decoder
from sfrt.decoders.taehv import Taehv
from sfrt.errors import BundleError, CheckpointError, ConfigError, SfrtError
from sfrt.text import load_text_encoder
from sfrt.transformer import Transformer
from sfrt_export.export import export_checkpoint
from sfrt_export.layout import module_tensors

GOLDEN = Path(__file__).parent / "golden"
WEIGHTS = GOLDEN / "dit" / "weights_d128h2l2.safetensors"
CPU = torch.device("cpu")
Tensors = dict[str, Tensor]


def export(checkpoint: Path, output: Path, **options: Any) -> Bundle:
    return export_checkpoint(checkpoint, output, **{"family": "self-forcing", "heads": 2, "text_len": 24, **options})


def save_taehv(path: Path, **changes: Tensor) -> Path:
    torch.manual_seed(0)
    weights = Taehv(TaehvConfig(encoder_width=4, decoder_widths=(8, 8, 4, 4))).state_dict()
    torch.save({**weights, **changes}, path)
    return path


def save_text_model(folder: Path, dim: int = 48, words: int = 5) -> tuple[Path, Path]:
    """A UMT5 that fits the golden DiT, with random weights, and a tokenizer of a few words."""
    from sfrt.text import Umt5Encoder

    torch.manual_seed(0)
    config = Umt5Config(vocab_size=16, dim=dim, dim_attn=16, dim_ffn=16, num_heads=2, num_layers=1)
    torch.save(Umt5Encoder(config).state_dict(), folder / "umt5.pth")
    vocab = {token: index for index, token in enumerate(["<pad>", "</s>", "<unk>", *map(str, range(words))])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "umt5.pth", folder / "tokenizer.json"


def test_a_whole_bundle(tmp_path: Path) -> None:
    encoder, tokenizer = save_text_model(tmp_path)
    taehv = save_taehv(tmp_path / "taew2_1.pth")
    stages: dict[str, list[tuple[int, int]]] = defaultdict(list)
    with pytest.warns(UserWarning, match=r"the adapter that longlive checkpoints come with \(lora\.pt\) is not merged"):
        exported = export(
            WEIGHTS,
            tmp_path / "model",
            family="longlive",
            taehv=taehv,
            text_encoder=encoder,
            tokenizer=tokenizer,
            stream={"shift": 8.0, "steps": (1000.0, 500.0)},
            progress=lambda stage, done, total: stages[stage].append((done, total)),
        )
    bundle = Bundle.open(tmp_path / "model")
    assert bundle == exported
    manifest = bundle.manifest
    assert (manifest.name, manifest.family, manifest.dtype) == ("model", "longlive", "bfloat16")
    assert manifest.weights == "flat"
    assert manifest.stream == StreamConfig(window=12, sink=3, shift=8.0, steps=(1000.0, 500.0))
    assert isinstance(manifest.decoder, TaehvPart)
    source = f"transformer/{WEIGHTS.name}"
    assert manifest.source.keys() == {source, "decoder/taew2_1.pth", "text_encoder/umt5.pth"}
    assert manifest.source[source].sha256 == hash_file(WEIGHTS)

    with torch.device("meta"):
        Transformer(manifest.model).load_state_dict(bundle.load("transformer"), strict=True, assign=True)
    decoder = load_decoder(manifest.decoder.config, bundle.load("decoder"), CPU, torch.float32)
    pixels, _ = decoder.decode(torch.zeros(1, 1, 16, 2, 2), None)
    assert pixels.shape == (1, 1, 3, 16, 16)
    assert load_text_encoder(bundle, CPU, torch.float32).encode("1 2 3").shape == (24, 48)

    assert list(stages) == ["transformer", "decoder", "text_encoder", "hash"]
    for told in stages.values():
        assert told == sorted(told) and told[-1][0] == told[-1][1]


def test_transformer_tensors_are_those_of_the_layout(tmp_path: Path) -> None:
    bundle = export(WEIGHTS, tmp_path / "model")
    written = bundle.load("transformer")
    expected = module_tensors(bundle.manifest.model, load_file(WEIGHTS))
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], expected[name].make()) for name in expected)
    qkv = written["blocks.1.self_attn.qkv.weight"].chunk(3)
    published = load_file(WEIGHTS)
    for part, letter in zip(qkv, "qkv", strict=True):
        assert torch.equal(part, published[f"blocks.1.self_attn.{letter}.weight"])
    # Feature 16 of a token is the first channel of the patch's second column.
    assert torch.equal(written["patch_embedding.weight"][:, 16], published["patch_embedding.weight"][:, 0, 0, 0, 1])


def test_which_weights_were_exported_is_said(tmp_path: Path) -> None:
    weights = load_file(WEIGHTS)
    averaged = {name: tensor + 1 for name, tensor in weights.items()}
    torch.save({"generator": weights, "generator_ema": averaged}, tmp_path / "both.pt")
    for name, ema, taken, tensors in (("raw", False, "generator", weights), ("ema", None, "generator_ema", averaged)):
        bundle = export(tmp_path / "both.pt", tmp_path / name, ema=ema)
        assert Bundle.open(tmp_path / name).manifest.weights == taken
        assert torch.equal(bundle.load("transformer")["head.linear.bias"], tensors["head.head.bias"])


def test_a_checkpoint_whose_name_tells_no_family(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"names no family; it is taken as self-forcing \(--family says otherwise\)"):
        bundle = export(WEIGHTS, tmp_path / "model", family=None)
    assert bundle.manifest.family == "self-forcing" and bundle.path.is_dir()


def test_one_step_causal_forcing(tmp_path: Path) -> None:
    bundle = export(WEIGHTS, tmp_path / "model", family="causal-forcing-pp", stream={"steps": (1000.0,)})
    assert (bundle.manifest.stream.steps, len(bundle.manifest.stream.first_steps or ())) == ((1000.0,), 4)


def said(*arguments: object) -> dict[str, str]:
    """The rows that a command prints, by name."""
    outcome = CliRunner().invoke(cli, list(map(str, arguments)), catch_exceptions=False)
    assert outcome.exit_code == 0, outcome.output
    return {
        row[0]: row[1] for line in outcome.output.splitlines() if len(row := re.split(" {2,}", line, maxsplit=1)) > 1
    }


def test_the_command_line_sets_and_shows_the_first_steps(tmp_path: Path) -> None:
    known = ("--family", "causal-forcing-pp", "--heads", 2, "--text-len", 24)
    two = said("export", WEIGHTS, "-o", tmp_path / "two", *known)
    assert (two["steps"], two["first steps"]) == ("1000, 500 warped, shift 5", "1000, 750, 500, 250")
    assert two["weights"] == "flat, bfloat16"
    all_alike = said("export", WEIGHTS, "-o", tmp_path / "one", *known, "--steps", "1000")
    assert all_alike["steps"] == "1000 warped, shift 5" and "first steps" not in all_alike
    one = said("export", WEIGHTS, "-o", tmp_path / "own", *known, "--steps", "1000", "--first-steps", "1000,500")
    assert (one["steps"], one["first steps"]) == ("1000 warped, shift 5", "1000, 500")


def test_rare_settings_are_shown_where_they_are_set(tmp_path: Path) -> None:
    export(WEIGHTS, tmp_path / "rare", stream={"first_chunk": 1, "context_noise": 100.0})
    rare = said("info", tmp_path / "rare")
    assert (rare["first chunk"], rare["context noise"]) == ("1 of 3 latent frames", "100")
    export(WEIGHTS, tmp_path / "usual")
    assert not {"first chunk", "first steps", "context noise"} & said("info", tmp_path / "usual").keys()


def test_dtypes(tmp_path: Path) -> None:
    weights = load_file(WEIGHTS)
    kept = {"blocks.0.modulation", "blocks.0.self_attn.q.bias"}
    save_file(
        {name: value.float() if name in kept else value for name, value in weights.items()},
        tmp_path / "mixed.safetensors",
    )
    mixed = export(tmp_path / "mixed.safetensors", tmp_path / "as-stored")
    assert mixed.manifest.dtype == "bfloat16"
    wide = {name for name, value in mixed.load("transformer").items() if value.dtype == torch.float32}
    assert wide == {"blocks.0.modulation", "blocks.0.self_attn.qkv.bias"}
    half = export(tmp_path / "mixed.safetensors", tmp_path / "half", dtype="float16")
    assert half.manifest.dtype == "float16"
    assert {value.dtype for value in half.load("transformer").values()} == {torch.float16}
    with pytest.raises(ConfigError, match="dtype 'int8' is not one of: float32, float16, bfloat16"):
        export(WEIGHTS, tmp_path / "int8", dtype="int8")


def test_the_wan_vae_as_decoder(tmp_path: Path) -> None:
    golden = load_file(GOLDEN / "wan_vae" / "tensors.safetensors")
    bundle = export(WEIGHTS, tmp_path / "model", vae=GOLDEN / "wan_vae" / "weights.safetensors")
    assert isinstance(bundle.manifest.decoder, WanVaePart)
    assert bundle.manifest.decoder.config.dim == 8
    decoder = load_decoder(bundle.manifest.decoder.config, bundle.load("decoder"), CPU, torch.float32)
    assert decoder.decode(golden["latents"], None)[0].shape[2] == 3


def nan_at(name: str, value: float) -> Tensors:
    weights = load_file(WEIGHTS)
    weights[name] = weights[name].clone()
    weights[name].view(-1)[-1] = value
    return weights


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["head.head.bias", "blocks.1.self_attn.k.weight", "patch_embedding.weight"])
def test_nan_and_infinity_are_found(tmp_path: Path, name: str, value: float) -> None:
    torch.save({"generator": nan_at(name, value)}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match=rf"bad\.pt: {name} holds 1 values that are NaN or infinite"):
        export(tmp_path / "bad.pt", tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.pt"]


def faults(folder: Path) -> dict[str, tuple[dict[str, Any], type[SfrtError], str]]:
    """Name → options of an export that must fail, how, and the words of its one line."""
    encoder, tokenizer = save_text_model(folder)
    (folder / "wide").mkdir()
    (folder / "wordy").mkdir()
    wide, _ = save_text_model(folder / "wide", dim=64)
    _, wordy = save_text_model(folder / "wordy", words=40)
    taehv = save_taehv(folder / "taehv.pth")
    broken = save_taehv(folder / "broken.pth", **{"decoder.22.bias": torch.full((3,), math.nan)})
    cut = folder / "cut.safetensors"
    cut.write_bytes(WEIGHTS.read_bytes()[:-1000])
    return {
        "missing": ({"checkpoint": folder / "gone.pt"}, CheckpointError, "does not exist"),
        "truncated": ({"checkpoint": cut}, CheckpointError, "is truncated"),
        "family": ({"family": "memflow"}, ConfigError, "need more than settings"),
        "unknown family": ({"family": "x"}, ConfigError, "no family is called 'x'"),
        "setting": ({"stream": {"windows": 3}}, ConfigError, "a stream has no setting 'windows'; it has chunk"),
        "window": ({"stream": {"window": 2}}, ConfigError, "window 2 is smaller than chunk 3"),
        "steps": ({"stream": {"steps": (250.0, 500.0)}}, ConfigError, "do not descend"),
        "resolution": ({"stream": {"height": 481}}, ConfigError, "height 481 is not a positive multiple of 16"),
        "two decoders": ({"taehv": taehv, "vae": taehv}, ConfigError, "a bundle has one decoder"),
        "vae": ({"vae": taehv}, CheckpointError, "is not a Wan 2.1 VAE"),
        "taehv": ({"taehv": WEIGHTS}, CheckpointError, "is not a TAEHV of Wan 2.1"),
        "nan in a late part": ({"taehv": broken}, CheckpointError, "decoder.22.bias holds 3 values that are NaN"),
        "no tokenizer": ({"text_encoder": encoder}, ConfigError, "give both or neither"),
        "text width": (
            {"text_encoder": wide, "tokenizer": tokenizer},
            ConfigError,
            "embeddings of 64 but the model reads 48",
        ),
        "vocabulary": ({"text_encoder": encoder, "tokenizer": wordy}, CheckpointError, "knows 43 tokens but"),
        "no text": ({"text_len": 0}, CheckpointError, "model text_len is 0; it must be positive"),
        "tokenizer": ({"text_encoder": encoder, "tokenizer": encoder}, BundleError, "cannot be read as a tokenizer"),
    }


def test_every_fault_is_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "output"
    output.mkdir()
    inputs = tmp_path / "inputs"
    inputs.mkdir()
    for name, (options, kind, message) in faults(inputs).items():
        checkpoint = options.pop("checkpoint", WEIGHTS)
        with pytest.raises(kind) as caught:
            export(checkpoint, output / "model", **options)
        assert message in str(caught.value), name
        assert "\n" not in str(caught.value), name
        assert list(output.iterdir()) == [], name


def test_an_existing_folder_is_kept(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "notes.txt").write_text("mine")
    with pytest.raises(BundleError, match="model exists already; choose another output folder"):
        export(WEIGHTS, tmp_path / "model")
    assert (tmp_path / "model" / "notes.txt").read_text() == "mine"


def test_an_interrupted_export_goes_on(tmp_path: Path) -> None:
    """The part that was finished is not written again; what another export left is not taken for it."""
    taehv = save_taehv(tmp_path / "taehv.pt")
    kept = tmp_path / ".model.interrupted" / "transformer.safetensors"

    def interrupt(stage: str, done: int, total: int) -> None:
        if stage == "decoder":
            raise KeyboardInterrupt

    def interrupted(**options: Any) -> int:
        with pytest.raises(KeyboardInterrupt):
            export(WEIGHTS, tmp_path / "model", taehv=taehv, progress=interrupt, **options)
        assert [file.name for file in kept.parent.iterdir() if file.suffix == ".safetensors"] == [kept.name]
        return kept.stat().st_ino

    first = interrupted()
    assert interrupted() == first, "interrupted again it still has what it had"
    bundle = export(WEIGHTS, tmp_path / "model", taehv=taehv)
    assert (bundle.path / kept.name).stat().st_ino == first
    Bundle.open(bundle.path)
    assert not kept.parent.exists()

    shutil.rmtree(bundle.path)
    second = interrupted(dtype="float16")
    bundle = export(WEIGHTS, tmp_path / "model", taehv=taehv)
    assert (bundle.path / kept.name).stat().st_ino != second and bundle.manifest.dtype == "bfloat16"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "taehv.pt"]


MEASURE = """
import json, sys
from sfrt.machine import peak_memory
from sfrt_export.export import export_checkpoint
base = peak_memory()
export_checkpoint(sys.argv[1], sys.argv[2])
print(json.dumps([base, peak_memory()]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_peak_memory(tmp_path: Path, ending: str) -> None:
    """A model of 400 MB in its own process: at most 1.3 × the file on top of what importing torch takes."""
    from sfrt.config import ModelConfig
    from sfrt_export.layout import published_shapes

    config = ModelConfig(dim=1024, ffn_dim=6144, num_heads=8, num_layers=10)
    weights = {name: torch.full(shape, 0.5, dtype=torch.bfloat16) for name, shape in published_shapes(config).items()}
    path = tmp_path / f"model.{ending}"
    if ending == "pt":
        torch.save({"generator": weights, "generator_ema": weights}, path)
    else:
        save_file(weights, path)
    del weights
    size = path.stat().st_size
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "model")],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    base, peak = json.loads(done.stdout)
    assert size > 350e6
    assert peak - base <= 1.3 * size
