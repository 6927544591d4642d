"""What the command line refuses: one line that names the thing and the way out, exit code 2, nothing left behind."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sfrt.bundle import resolve_model
from tests.command_line import PROMPT, Run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "Missing command; see sfrt --help"),
        (["dream"], "No such command 'dream'; see sfrt --help"),
        (["generate", PROMPT], "Missing option '-o' / '--output'; see sfrt generate --help"),
        (["generate", PROMPT, "-o", "x.mp4", "--seconds", "1", "--chunks", "1"], "give one of them"),
        (["generate", PROMPT, "-o", "-", "--json"], "give the video a file"),
        (["generate", PROMPT, "-o", "x.mp4", "--seconds", "0"], "'0' is no length of a video"),
        (["generate", PROMPT, "-o", "x.mp4", "--seconds", "nan"], "'nan' is no length of a video"),
        (["generate", PROMPT, "-o", "x.mp4", "--seconds", "inf"], "'inf' is no length of a video"),
        (["generate", PROMPT, "-o", "x.mp4", "--seconds", "1e308"], "'1e308' is no length of a video"),
        (["generate", PROMPT, "-o", "nowhere/x.mp4", "--model", "nowhere"], "its folder does not exist"),
        (["info", "a" * 300], "a" * 300),
        (["generate", PROMPT, "-o", "x.mp4", "--steps", "a,b"], "'a,b' is no list of numbers"),
        (["generate", PROMPT, "-o", "x.avi", "--model", "nowhere"], "unknown ending .avi; use .mp4, .gif"),
        (["generate", PROMPT, "-o", "x.mp4", "--model", "nowhere"], "there is no model at nowhere"),
        (["info", "nowhere"], "there is no model at nowhere"),
        (["verify", "nowhere"], "nowhere has no golden case"),
        (["export", "nowhere.pt", "-o", "bundle"], "nowhere.pt"),
        (["export", "nowhere.pt"], "give the new bundle a folder: -o DIR"),
        (["generate", PROMPT, "-o", "x.mp4", "--backend", "tvm"], "no backend is called 'tvm'"),
        (["export", "nowhere.pt", "-o", "bundle", "--onnx-dtype", "int4"], "dtype 'int4' is not one of"),
        (["export", "nowhere.pt", "-o", "bundle", "--force"], "--force says nothing without --quantize"),
        (["export", "nowhere.pt", "-o", "bundle", "--frames", "9"], "--frames says nothing without --tensorrt"),
        (["export", "nowhere.pt", "-o", "bundle", "--any-start"], "--any-start says nothing without --tensorrt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_commands_that_make_no_sense(run: Run, tmp_path: Path, arguments: list[str], words: str) -> None:
    assert words in run(*arguments).complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--height", "60"], "height 60 is not a positive multiple of 16; the nearest is 64"),
        (["--width", "0"], "width 0 is not a positive multiple of 16"),
        (["--window", "4"], "window 4 is smaller than chunk 3 + sink 3; make it at least 6"),
        (["--steps", "500,750"], "do not descend"),
        (["--steps", "1001"], "leave (0, 1000]"),
        (["--shift", "0"], "shift is 0.0; it must be positive"),
        (["--seed", "-1"], "seed -1 is out of range"),
        (["--device", "cuda:99"], "there is no device cuda:99"),
        (["--device", "toaster"], "'toaster' is no device"),
        (["--dtype", "int3"], "'int3' is no dtype"),
        (["--backend", "abacus"], "no backend is called 'abacus'"),
        (["--initial", "nowhere.png"], "nowhere.png: there is no such file"),
        (["--initial", "text.png"], "text.png"),
        (["--width", "160000", "--height", "160000"], "GiB are free"),
        (["-o", "nowhere/out.mp4"], "nowhere/out.mp4"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_settings_that_cannot_be(run: Run, tmp_path: Path, tiny_bundle: Path, change: list[str], words: str) -> None:
    (tmp_path / "text.png").write_text("this is no picture")
    complaint = run("generate", PROMPT, "-o", "out.mp4", "--model", tiny_bundle, "--chunks", 1, *change).complaint
    assert words in complaint
    assert os.listdir(tmp_path) == ["text.png"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--height", "60"], "height 60 is not a positive multiple of 16"),
        (["--window", "2"], "window 2 is smaller than chunk 3"),
        (["--frames", "0"], "a stream of 0 latent frames is none"),
        (["--dtype", "int3"], "dtype 'int3' is not one of"),
        (["--dtype", "float16"], "has graphs in float32 only; export the checkpoint again with --onnx"),
        (["--heads", "2"], "is a bundle: give --quantize or --quantize-text with -o DIR, --tensorrt or --kernels"),
        (["--force"], "--force says nothing without --quantize"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plans_that_cannot_be(run: Run, change: list[str], words: str) -> None:
    """With or without a GPU."""
    outcome = run("export", resolve_model(), "--tensorrt", "--json", *change)
    assert outcome.code == 2 and words in outcome.err


@pytest.mark.parametrize("prompt", ["", "  \n\t"])
def test_an_empty_prompt(run: Run, tmp_path: Path, tiny_bundle: Path, prompt: str) -> None:
    assert "the prompt is empty" in run("generate", prompt, "-o", "out.mp4", "--model", tiny_bundle).complaint
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk(run: Run, tiny_bundle: Path) -> None:
    Path("out.mp4").symlink_to("/dev/full")
    complaint = run("generate", PROMPT, "-o", "out.mp4", "--model", tiny_bundle, "--chunks", 2).complaint
    assert complaint == "cannot write out.mp4: the disk is full; free some space or write elsewhere"


def edit(manifest: Path, change: Callable[[Any], None]) -> None:
    data = json.loads(manifest.read_text())
    change(data)
    manifest.write_text(json.dumps(data))


def flip_a_bit(bundle: Path) -> None:
    weights = bundle / "transformer.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)


def truncate(bundle: Path) -> None:
    weights = bundle / "transformer.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (flip_a_bit, "transformer.safetensors is damaged: its sha256 is"),
        (truncate, "transformer.safetensors has "),
        (lambda bundle: (bundle / "decoder.safetensors").unlink(), "decoder.safetensors is missing"),
        (lambda bundle: (bundle / "manifest.json").unlink(), "has no manifest.json"),
        (lambda bundle: (bundle / "manifest.json").write_text("{"), "manifest.json is not JSON"),
        (
            lambda bundle: edit(bundle / "manifest.json", lambda data: data.update(mood="sunny")),
            "mood is not a known key",
        ),
        (lambda bundle: edit(bundle / "manifest.json", lambda data: data.update(schema_version=99)), "update sfrt"),
    ],
    ids=["bit", "truncated", "missing", "no manifest", "no json", "unknown key", "newer schema"],
)
@pytest.mark.parametrize("verb", ["generate", "info"])
def test_a_damaged_bundle(
    run: Run, tmp_path: Path, tiny_bundle: Path, damage: Callable[[Path], None], words: str, verb: str
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "bundle")
    damage(tmp_path / "bundle")
    arguments = ["info", "bundle"] if verb == "info" else ["generate", PROMPT, "-o", "out.mp4", "--model", "bundle"]
    assert words in run(*arguments).complaint
    assert os.listdir(tmp_path) == ["bundle"]


class Trap:
    """A pickle that would make a file where it is loaded."""

    def __reduce__(self) -> tuple[Any, tuple[str, ...]]:
        return os.system, ("touch sprung",)


def write_trap(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Trap(), protocol=2))
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")


def write_changed(path: Path, golden: Path, change: Callable[[dict[str, Any]], object]) -> None:
    tensors = load_file(golden / "dit" / "weights_d128h2l2.safetensors")
    change(tensors)
    save_file(tensors, path)


@pytest.mark.parametrize(
    ("name", "write", "options", "words"),
    [
        ("empty.pt", lambda path, golden: path.write_bytes(b""), [], ["empty.pt"]),
        ("text.safetensors", lambda path, golden: path.write_text("hello"), [], ["text.safetensors"]),
        ("trap.pt", lambda path, golden: write_trap(path), [], ["trap.pt"]),
        (
            "short.safetensors",
            lambda path, golden: path.write_bytes(
                (golden / "dit" / "weights_d128h2l2.safetensors").read_bytes()[:-1000]
            ),
            [],
            ["short.safetensors"],
        ),
        (
            "missing.safetensors",
            lambda path, golden: write_changed(path, golden, lambda t: t.pop("blocks.1.ffn.0.weight")),
            [],
            ["missing.safetensors", "blocks.1.ffn.0.weight"],
        ),
        (
            "extra.safetensors",
            lambda path, golden: write_changed(path, golden, lambda t: t.update(extra=t["patch_embedding.bias"] * 1)),
            [],
            ["extra.safetensors", "extra"],
        ),
        (
            "shape.safetensors",
            lambda path, golden: write_changed(
                path, golden, lambda t: t.update({"head.head.bias": t["head.head.bias"][:-1].clone()})
            ),
            [],
            ["shape.safetensors", "head.head.bias"],
        ),
        (
            "nan.safetensors",
            lambda path, golden: write_changed(path, golden, lambda t: t["blocks.0.ffn.0.bias"].fill_(float("nan"))),
            [],
            ["nan.safetensors", "NaN"],
        ),
        (
            "rolling_forcing.safetensors",
            lambda path, golden: write_changed(path, golden, lambda t: None),
            [],
            ["rolling-forcing checkpoints need more than settings"],
        ),
        (
            "good.safetensors",
            lambda path, golden: write_changed(path, golden, lambda t: None),
            ["--family", "cubism"],
            ["no family is called 'cubism'"],
        ),
        (
            "good.safetensors",
            lambda path, golden: write_changed(path, golden, lambda t: None),
            ["--dtype", "int3"],
            ["'int3'"],
        ),
        (
            "good.safetensors",
            lambda path, golden: write_changed(path, golden, lambda t: None),
            ["--taehv", "nowhere.pth"],
            ["nowhere.pth"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_checkpoint_that_cannot_be_exported(
    run: Run,
    tmp_path: Path,
    golden: Path,
    name: str,
    write: Callable[[Path, Path], object],
    options: list[str],
    words: list[str],
) -> None:
    write(tmp_path / name, golden)
    complaint = run("export", name, "-o", "bundle", "--heads", 2, "--text-len", 24, *options).complaint
    assert all(word in complaint for word in words), complaint
    assert os.listdir(tmp_path) == [name]
