"""The command line as a user meets it: real models, real files."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfrt import __version__
from sfrt.bundle import resolve_model
from sfrt.config import TaehvConfig, Umt5Config
from sfrt.decoders.taehv import Taehv
from sfrt.text import Umt5Encoder
from sfrt.video import open_writer
from tests.command_line import PROMPT, Run


def frames_of(video: str | Path) -> list[np.ndarray[Any, Any]]:
    with av.open(str(video)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def test_mp4(run: Run, tiny_bundle: Path) -> None:
    outcome = run("generate", PROMPT, "-o", "out.mp4", "--model", tiny_bundle, "--seconds", "1.5")
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.startswith("out.mp4: 24 frames, the first after ")
    frames = frames_of("out.mp4")
    assert len(frames) == 24
    assert frames[0].shape == (32, 48, 3)


def test_json_is_all_there_is(run: Run, tiny_bundle: Path) -> None:
    outcome = run("generate", PROMPT, "-o", "out.gif", "--model", tiny_bundle, "--chunks", 3, "--seed", 7, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    said = json.loads(outcome.out)
    assert (said["file"], said["prompt"], said["seed"], said["model"]) == ("out.gif", PROMPT, 7, "tiny")
    assert said["frames"] == 9 + 12 + 12 == len(frames_of("out.gif"))
    assert said["settings"]["backend"] == "torch"
    assert {**said["settings"], "window": 9, "sink": 3, "height": 32, "width": 48} == said["settings"]
    samples = said["chunk_ms"]["samples"]
    assert len(samples) == 3
    p50, p95, p99 = (said["chunk_ms"][name] for name in ("p50", "p95", "p99"))
    assert min(samples) <= p50 <= p95 <= p99 <= max(samples)
    assert said["first_frame_ms"] > 0
    assert said["fps"] == pytest.approx(24_000 / sum(samples[1:]), rel=1e-3)


def test_settings_reach_the_stream(run: Run, tiny_bundle: Path) -> None:
    changes = ["--steps", "1000,400", "--shift", "3", "--window", "8", "--sink", "2", "--width", "64", "--height", "16"]
    outcome = run("generate", PROMPT, "-o", "out", "--model", tiny_bundle, "--chunks", 2, "--json", *changes)
    settings = json.loads(outcome.out)["settings"]
    assert (settings["steps"], settings["shift"]) == ([1000.0, 400.0], 3.0)
    assert (settings["window"], settings["sink"]) == (8, 2)
    assert Image.open("out/000020.png").size == (64, 16)


def test_the_same_seed_is_the_same_video(run: Run, tiny_bundle: Path) -> None:
    for folder, seed in (("one", 1), ("again", 1), ("other", 2)):
        run("generate", PROMPT, "-o", folder, "--model", tiny_bundle, "--chunks", 1, "--seed", seed)
    one, again, other = (Path(folder, "000000.png").read_bytes() for folder in ("one", "again", "other"))
    assert one == again != other


@pytest.mark.parametrize("seconds", [0.01, 0.5, 9 / 16, 10 / 16, 2])
def test_length_in_seconds(run: Run, tiny_bundle: Path, seconds: float) -> None:
    said = run("generate", PROMPT, "-o", "out", "--model", tiny_bundle, "--seconds", seconds, "--json").out
    assert json.loads(said)["frames"] == len(list(Path("out").iterdir())) == max(1, round(16 * seconds))


def test_it_goes_on_from_a_picture(run: Run, tiny_bundle: Path) -> None:
    Image.new("RGB", (200, 100), "red").save("start.png")
    start = ["--initial", "start.png", "--model", tiny_bundle, "--seconds", "1", "--json"]
    said = json.loads(run("generate", PROMPT, "-o", "out", *start).out)
    assert said["frames"] == 1 + 16 == len(list(Path("out").iterdir()))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A clip of 24 frames, larger than the tiny model's and half as fast."""
    frames = np.random.default_rng(0).integers(256, size=(12, 64, 96, 3), dtype=np.uint8)
    with open_writer(str(tmp_path / "source.mp4"), width=96, height=64, fps=8) as writer:
        writer.write(frames)
    return tmp_path / "source.mp4"


def test_it_goes_by_a_source(run: Run, tiny_bundle: Path, source: Path) -> None:
    start = ["--source", source, "--model", tiny_bundle, "--strength", "0.5"]
    outcome = run("generate", PROMPT, "-o", "out.mp4", *start)
    assert outcome.err.startswith("out.mp4: 21 frames"), "9 and 12; three more fill no chunk"
    said = json.loads(run("generate", PROMPT, "-o", "out.gif", "--json", *start, "--seconds", "1").out)
    assert said["frames"] == 16 and said["settings"]["strength"] == 0.5


def test_sources_that_cannot_be(run: Run, tiny_bundle: Path, source: Path, tmp_path: Path) -> None:
    Image.new("RGB", (48, 32)).save("one.png")
    (tmp_path / "text.mp4").write_text("this is no video")
    (tmp_path / "cut.mp4").write_bytes(source.read_bytes()[:500])
    there = sorted(os.listdir())
    for arguments, words in (
        (["--source", "one.png", "--strength", "0.5"], "the source ends after 1 frames; its first chunk needs 9"),
        (["--source", "text.mp4", "--strength", "0.5"], "cannot read text.mp4 as a picture or a video"),
        (["--source", "cut.mp4", "--strength", "0.5"], "cannot read cut.mp4"),
        (["--source", "nowhere.mp4", "--strength", "0.5"], "nowhere.mp4: there is no such file"),
        (["--source", source, "--strength", "1.5"], "strength is 1.5; it must be above 0 and at most 1"),
        (["--source", source], "starts from pure noise"),
        (["--strength", "0.5"], "give a source with it"),
        (["--source", source, "--initial", "one.png", "--strength", "0.5"], "give one of them"),
        (["--source", source, "--strength", "0.5", "--width", "50"], "width 50 is not a positive multiple of 16"),
    ):
        assert words in run("generate", PROMPT, "-o", "out.mp4", "--model", tiny_bundle, *arguments).complaint
        assert sorted(os.listdir()) == there, "nothing half-written is left"


def test_a_pipe_gets_the_video_and_nothing_else(tmp_path: Path, tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "sfrt", "generate", PROMPT, "-o", "-", "--model", tiny_bundle, "--chunks", "1"]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(b"YUV4MPEG2 W48 H32 F16:1")
    assert done.stdout.count(b"FRAME\n") == 9
    assert done.stderr.startswith(b"-: 9 frames")


def test_a_terminal_gets_a_progress_bar(tmp_path: Path, tiny_bundle: Path) -> None:
    terminal, inside = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("4H", 24, 120, 0, 0))
    arguments = ["generate", PROMPT, "-o", str(tmp_path / "out.mp4"), "--model", str(tiny_bundle), "--seconds", "20"]
    with subprocess.Popen([sys.executable, "-m", "sfrt", *arguments], stderr=inside, stdout=subprocess.PIPE) as process:
        os.close(inside)
        shown = b""
        with suppress(OSError):  # the terminal hangs up when its last writer is gone
            while block := os.read(terminal, 4096):
                shown += block
        assert process.wait(timeout=120) == 0
    os.close(terminal)
    assert re.search(rb"\d/27 chunks .*\d+ ms per chunk, \d+\.\d fps", shown)


def test_a_reader_that_leaves_ends_the_stream(tiny_bundle: Path) -> None:
    command = [sys.executable, "-m", "sfrt", "generate", PROMPT, "-o", "-", "--model", tiny_bundle, "--seconds", "3600"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1000)
        process.stdout.close()
        error = process.stderr.read()
        assert process.wait(timeout=120) == 0, error
    assert b"Traceback" not in error


def test_a_long_prompt_is_cut_with_a_warning(run: Run, tiny_bundle: Path) -> None:
    outcome = run("generate", "red " * 30, "-o", "out", "--model", tiny_bundle, "--chunks", 1)
    assert outcome.code == 0
    warning, _ = outcome.err.splitlines()
    assert warning == "sfrt: warning: the prompt has 31 tokens and the model reads 12; the last 19 were dropped"


def test_the_built_in_model(run: Run) -> None:
    outcome = run("generate", PROMPT, "-o", "out.mp4", "--seconds", "1")
    assert outcome.code == 0, outcome.err
    frames = np.stack(frames_of("out.mp4"))
    assert len(frames) == 16
    assert frames.std() > 10, "a picture, not one colour"
    assert sum(file.stat().st_size for file in resolve_model().iterdir()) <= 16_000_000


def test_interrupted_it_leaves_a_playable_file(tmp_path: Path, tiny_bundle: Path) -> None:
    video = tmp_path / "out.mp4"
    arguments = ["generate", PROMPT, "-o", str(video), "--model", str(tiny_bundle), "--seconds", "3600"]
    process = subprocess.Popen(
        [sys.executable, "-m", "sfrt", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts its background jobs deaf to Ctrl-C; this one must hear it wherever the tests run.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 120
    while not (video.exists() and video.stat().st_size > 2000):
        assert process.poll() is None
        assert time.monotonic() < deadline, "no video came"
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130
    assert error.split() == ["sfrt:", "interrupted"]
    assert len(frames_of(video)) >= 1
    assert os.listdir(tmp_path) == ["out.mp4"]


def test_info(run: Run, tiny_bundle: Path) -> None:
    text = run("info", tiny_bundle).out
    for part in ("tiny, family self-forcing", "taehv", "UMT5", "48×32", "window 9, sink 3", "transformer.safetensors"):
        assert part in text
    assert json.loads(run("info", tiny_bundle, "--json").out) == json.loads((tiny_bundle / "manifest.json").read_text())


def test_verify(run: Run, golden: Path) -> None:
    outcome = run("verify", golden / "dit" / "frame1_window4_sink1")
    assert outcome.code == 0
    case, total = outcome.out.splitlines()
    assert " ok, worst " in case
    assert total.endswith("tensors within tolerance (torch, float32)")


def test_verify_tells_by_its_exit_code(run: Run, golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "umt5", tmp_path / "umt5")
    tensors = load_file(tmp_path / "umt5" / "tensors.safetensors")
    save_file({**tensors, "prompt_embeds": tensors["prompt_embeds"] * 1.01}, tmp_path / "umt5" / "tensors.safetensors")
    outcome = run("verify", tmp_path / "umt5", "--json")
    assert outcome.code == 1
    said = json.loads(outcome.out)
    assert said["passed"] is False
    assert [(tensor["tensor"], tensor["passed"]) for tensor in said["tensors"]] == [("prompt_embeds", False)]
    assert said["tensors"][0]["error"] == pytest.approx(0.01 / 1.01, rel=1e-3)
    assert "1 of 1 OVER" in run("verify", tmp_path / "umt5").out


def test_verify_calls_nan_a_failure(run: Run, golden: Path, tmp_path: Path) -> None:
    shutil.copytree(golden / "umt5", tmp_path / "umt5")
    from safetensors.numpy import load_file, save_file

    weights = load_file(tmp_path / "umt5" / "tensors.safetensors")
    save_file(
        {**weights, "prompt_embeds": weights["prompt_embeds"] * np.nan}, tmp_path / "umt5" / "tensors.safetensors"
    )
    outcome = run("verify", tmp_path / "umt5", "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["tensors"][0]["error"] is None


def test_export_then_generate(run: Run, golden: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """From files with published names to a video, all through the command line."""
    text = Umt5Config(vocab_size=16, dim=48, dim_attn=16, dim_ffn=32, num_heads=2, num_layers=1)
    save_file(Umt5Encoder(text).state_dict(), "encoder.safetensors")
    save_file(Taehv(TaehvConfig(encoder_width=8, decoder_widths=(16, 8, 8, 8))).state_dict(), "taehv.safetensors")
    checkpoint = golden / "dit" / "weights_d128h2l2.safetensors"
    family = ["--family", "self-forcing"]
    settings = [*family, "--heads", 2, "--text-len", 24, "--window", 6, "--width", 32, "--height", 32]
    decoder = ["--taehv", "taehv.safetensors"]
    encoder = ["--text-encoder", "encoder.safetensors", "--tokenizer", tiny_bundle]

    outcome = run("export", checkpoint, "-o", "silent", *settings, *decoder)
    assert (outcome.code, outcome.err) == (0, "")
    assert "dim 128, 2 heads, 2 layers" in outcome.out
    assert "--text-encoder" in run("generate", PROMPT, "-o", "out.mp4", "--model", "silent").complaint
    blind = json.loads(run("export", checkpoint, "-o", "blind", *settings, *encoder, "--json").out)["name"]
    complaint = run("generate", PROMPT, "-o", "out.mp4", "--model", "blind").complaint
    assert complaint.startswith(f"the model '{blind}' has no decoder") and "--taehv" in complaint
    assert not Path("out.mp4").exists()

    said = json.loads(run("export", checkpoint, "-o", "whole", *settings, *decoder, *encoder, "--json").out)
    assert (said["model"]["text_len"], said["stream"]["window"], said["stream"]["width"]) == (24, 6, 32)
    assert run("generate", PROMPT, "-o", "out.mp4", "--model", "whole", "--chunks", 3).code == 0
    assert len(frames_of("out.mp4")) == 33
    complaint = run("generate", PROMPT, "-o", "onnx.mp4", "--model", "whole", "--backend", "onnx").complaint
    assert "has no ONNX graphs" in complaint and not Path("onnx.mp4").exists()


def test_export_with_graphs(run: Run, golden: Path) -> None:
    """ONNX here; TensorRT refused where there is none, with the graphs left whole."""
    pytest.importorskip("onnx_ir")
    checkpoint = golden / "dit" / "weights_d128h2l2.safetensors"
    save_file(Taehv(TaehvConfig(encoder_width=8, decoder_widths=(16, 8, 8, 8))).state_dict(), "taehv.safetensors")
    settings = ["--family", "self-forcing", "--heads", 2, "--text-len", 24, "--taehv", "taehv.safetensors"]
    outcome = run("export", checkpoint, "-o", "bundle", *settings, "--tensorrt")
    if not torch.cuda.is_available():
        assert outcome.code == 2 and "TensorRT builds and runs plans on an NVIDIA GPU" in outcome.err
    assert run("info", "bundle", "--json").code == 0
    assert json.loads(run("info", "bundle", "--json").out)["graphs"] == ["float32", "bfloat16"]
    assert Path("bundle", "decoder.float16.onnx").exists(), "a TAEHV beside a bfloat16 model runs in float16"
    complaint = run("generate", PROMPT, "-o", "x.mp4", "--model", "bundle", "--backend", "tensorrt").complaint
    assert "TensorRT" in complaint and not Path("x.mp4").exists()


def test_doctor(run: Run) -> None:
    outcome = run("doctor", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["runs"]["cpu"] == "yes"
    assert "torch backend on cpu: yes" in run("doctor").out


def test_help_and_version(run: Run) -> None:
    assert run("--version").out == f"sfrt, version {__version__}\n"
    text = run("--help").out
    assert all(verb in text for verb in ("generate", "verify", "export", "info", "doctor"))
