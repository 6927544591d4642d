"""The reference cases on a tiny model: what is counted, what is stated, and what a reader is shown."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sfrt import Runtime
from sfrt.benchmark import cases, shapes
from sfrt.benchmark.cases import CASES, Effort, Subject, chunk_operations
from sfrt.benchmark.cold_start import cold_start_seconds
from sfrt.benchmark.protocol import Figure, Result, case_of, write
from sfrt.benchmark.report import plot, table
from sfrt.benchmark.roofline import matrix_rate, operations
from sfrt.benchmark.run import RUN
from sfrt.benchmark.shapes import SHAPES, Shape, write_random_bundle
from sfrt.bundle import Bundle
from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, WanVaeConfig
from sfrt.errors import ConfigError, SfrtError
from sfrt.nvml import Gpu, Reading
from tests.command_line import Run

CPU = torch.device("cpu")
TINY = Shape(
    name="tiny",
    model=ModelConfig(dim=48, ffn_dim=64, num_heads=2, num_layers=2, text_dim=24, text_len=12),
    stream=StreamConfig(height=32, width=48),
    decoders={
        "wan_vae": WanVaeConfig(dim=8, num_res_blocks=1),
        "taehv": TaehvConfig(encoder_width=8, decoder_widths=(16, 12, 8, 8)),
    },
)


@pytest.fixture(scope="module")
def runtime(tiny_bundle: Path) -> Runtime:
    return Runtime(tiny_bundle, device="cpu", backend="torch", prompt_cache=False)


def samples(result: Result, name: str) -> tuple[float, ...]:
    figure = result.figure(name)
    assert figure is not None, name
    return figure.samples


def test_a_chunks_operations() -> None:
    """4 passes of 3 frames of 6 tokens, which see 3 + 3·n frames, but no more than the window."""
    model, stream = ModelConfig(), StreamConfig(height=32, width=48, window=12, first_steps=(1000.0, 500.0))
    assert chunk_operations(model, stream, 0) == 2 * operations(model, 18, 18)
    assert chunk_operations(model, stream, 1) == 4 * operations(model, 18, 36)
    assert chunk_operations(model, stream, 3) == chunk_operations(model, stream, 9) == 4 * operations(model, 18, 72)
    assert operations(ModelConfig(num_layers=1, dim=12, num_heads=1, ffn_dim=24, text_len=7), 5, 11) == sum(
        2 * count for count in (5 * 12 * 36, 5 * 12 * 12, 5 * 12 * 12, 5 * 12 * 12, 2 * 5 * 12 * 24)
    ) + 4 * 5 * 12 * (11 + 7)


def test_a_clip(runtime: Runtime) -> None:
    said: list[str] = []
    result = RUN["full21"](Subject(runtime, matrix_rate=1e12), Effort(rounds=2), said.append)
    assert said == ["full21, clip 1 of 2", "full21, clip 2 of 2"]
    assert (result.case.chunk, result.case.window, result.case.sink, result.case.decoder) == (3, 21, 0, "taehv")
    clips, dit = samples(result, "clip_ms"), [samples(result, f"dit_ms[{number}]") for number in range(1, 8)]
    assert len(clips) == 2 and all(len(each) == 2 for each in dit)
    for number in range(2):
        assert clips[number] > max(min(each) for each in dit), "it has all of them, if another time"
        assert samples(result, "fps")[number] == pytest.approx(81e3 / clips[number])
    assert result.figure("chunk_ms[1]") is None and len(samples(result, "chunk_ms[7]")) == 2
    assert len(samples(result, "refresh_ms")) == 2 * 6 and len(samples(result, "decode_ms")) == 2 * 7
    needed = chunk_operations(runtime.manifest.model, Subject(runtime, 1.0).stream("full21"), 6)
    expected = [needed / (ms / 1e3) / 1e12 for ms in dit[6]]
    assert samples(result, "roofline[7]") == pytest.approx(expected)
    assert (
        len(result.stream_ms) == 7
        and result.stated_bytes == runtime.memory(Subject(runtime, 1.0).stream("full21")).parts
    )


@pytest.mark.parametrize(
    ("name", "chunk", "window", "sink", "filling"), [("stream12", 3, 12, 3, 4), ("frame1", 1, 21, 0, 21)]
)
def test_a_steady_stream(runtime: Runtime, name: str, chunk: int, window: int, sink: int, filling: int) -> None:
    result = RUN[name](Subject(runtime, 1e12), Effort(rounds=2, seconds=4 * chunk * 3 / runtime.stream.fps), print)
    assert (result.case.chunk, result.case.window, result.case.sink) == (chunk, window, sink)
    assert len(result.stream_ms) == filling + 3
    assert samples(result, "chunk_ms") == result.stream_ms[filling:]
    assert samples(result, "fps") == pytest.approx([4 * chunk * 1e3 / ms for ms in result.stream_ms[filling:]])
    for part in ("dit_ms", "refresh_ms", "decode_ms", "roofline"):
        assert len(samples(result, part)) == 3
    assert all(
        whole > sum(parts)
        for whole, *parts in zip(
            *(samples(result, part) for part in ("chunk_ms", "dit_ms", "refresh_ms", "decode_ms")), strict=True
        )
    )
    assert len(samples(result, "ttff_ms")) == len(samples(result, "ttff_without_text_ms")) == 2
    assert len(samples(result, "switch_ms")) == cases.SWITCHES
    percentiles = (result.figure("chunk_ms") or Figure("", ())).percentiles
    assert samples(result, "jitter") == (percentiles["p99"] / percentiles["p50"],)


def test_new_prompts_are_read_and_known_ones_are_not(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime(tiny_bundle, device="cpu", backend="torch", prompt_cache=False)
    reads: list[str] = []
    read = runtime._prompts._read
    monkeypatch.setattr(runtime._prompts, "_read", lambda prompt: (reads.append(prompt), read(prompt))[1])
    subject = Subject(runtime, 1e12)
    stream = subject.stream("frame1")
    list(subject.play(stream, 1))
    reads.clear()
    without, fresh = cases._first_frames(subject, stream, Effort(rounds=3))
    assert (without.name, fresh.name) == ("ttff_without_text_ms", "ttff_ms")
    assert len(reads) == len(set(reads)) == 3


def test_what_the_gpu_did_stands_beside_each_figure(runtime: Runtime) -> None:
    class Steady(Gpu):
        def __init__(self) -> None: ...

        def read(self) -> Reading:
            return Reading(1980, 3201, 500.0, 9.0, 55, ())

    result = RUN["frame1"](Subject(runtime, 1e12, Steady()), Effort(rounds=1, seconds=0.1), print)
    assert all(figure.gpu is not None and figure.gpu["watts"]["median"] == 500.0 for figure in result.figures)
    assert "gpu" in result.as_json()["figures"]["chunk_ms"]
    assert "gpu" not in Figure("chunk_ms", (1.0,)).as_json()


@pytest.mark.parametrize(("decoder", "dtype"), [("wan_vae", "float32"), ("taehv", "bfloat16")])
def test_random_weights_are_a_bundle_like_any_other(decoder: Any, dtype: str, tmp_path: Path) -> None:
    path = write_random_bundle(tmp_path / "model", TINY, decoder, dtype, CPU)
    bundle = Bundle.open(path)
    weights = bundle.load("transformer")
    assert bundle.manifest.dtype == dtype and bundle.manifest.decoder is not None
    assert bundle.manifest.decoder.kind == decoder
    assert all(weight.count_nonzero() > 0.9 * weight.numel() for weight in weights.values()), "never zeros"
    runtime = Runtime(path, device="cpu", dtype=dtype)
    result = RUN["frame1"](Subject(runtime, 1e12), Effort(rounds=1, seconds=0.1), print)
    assert result.figure("ttff_ms") is None and len(samples(result, "ttff_without_text_ms")) == 1
    assert len(samples(result, "switch_ms")) == cases.SWITCHES


def test_the_command_lines_names_are_those_of_the_rooms_behind_it() -> None:
    """It writes them down again, so that help costs no import of torch."""
    bench = import_module("sfrt.cli.bench")  # under that name, the package has the command
    assert set(bench.SHAPES) == set(SHAPES)
    assert bench.CASES == CASES
    assert set(bench.DECODERS.values()) == set(shapes.CPU256.decoders) == set(shapes.WAN_1_3B.decoders)


def test_the_command(run: Run, tiny_bundle: Path) -> None:
    outcome = run(
        *("bench", tiny_bundle, "--json", "out/run.json", "--cases", "stream12,full21", "--rounds", 1),
        *("--seconds", 1, "--device", "cpu", "--dtype", "bfloat16"),
    )
    assert outcome.code == 0, outcome.err
    assert outcome.err.splitlines()[0].startswith("needs ") and "ring" in outcome.err.splitlines()[0]
    head, columns, *rows = outcome.out.splitlines()
    assert head.startswith("tiny, 48×32, 4 + 1 passes, bfloat16 by torch on cpu (")
    assert [row.split()[0] for row in rows[:2]] == ["stream12", "full21"] and columns.split()[-1] == "roofline"
    assert rows[-1].startswith("cold start: ")
    report = json.loads(Path("out/run.json").read_text())
    assert report["settings"] == {
        "device": "cpu",
        "dtype": "bfloat16",
        "backend": "torch",
        "text_encoder": "resident",
        "rounds": 1,
        "seconds": 1.0,
    }
    assert report["matrix_tflops"] > 0 and report["not_run"] == {} and report["environment"]["versions"]["torch"]
    assert [case["name"] for case in report["cases"]] == ["stream12", "full21", "cold start"]
    chunk = report["cases"][0]["figures"]["chunk_ms"]
    assert min(chunk["samples"]) <= chunk["p50"] <= chunk["p95"] <= chunk["p99"] <= max(chunk["samples"])
    assert report["cases"][2]["figures"]["cold_start_s"]["samples"][0] > 0.3
    assert Image.open("out/run.png").width > 600


def test_what_cannot_run_is_told_and_the_rest_goes_on(
    run: Run, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Result:
        raise ConfigError("the plans are for a window of 21")

    monkeypatch.setitem(RUN, "stream12", refuse)

    def fail(*_: Any) -> tuple[float, ...]:
        raise SfrtError("no process")

    monkeypatch.setattr("sfrt.benchmark.run.cold_start_seconds", fail)
    monkeypatch.setattr("sfrt.benchmark.run.matrix_rate", lambda *_: 1e12)
    common = ("bench", tiny_bundle, "--rounds", 1, "--seconds", 0.1, "--device", "cpu")
    outcome = run(*common, "--cases", "stream12,frame1", "--json", "run.json")
    assert outcome.code == 0
    assert "stream12 did not run: the plans are for a window of 21" in outcome.err
    assert json.loads(Path("run.json").read_text())["not_run"] == {
        "stream12": "the plans are for a window of 21",
        "cold start": "no process",
    }
    assert "the plans are for a window of 21" in run(*common, "--cases", "stream12").err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("model", "--random", "1.3b"), "MODEL and --random both say what to measure"),
        (("--decoder", "wan"), "--decoder is for --random"),
        (("--cases", "full21,full22"), "'full22' is no case; choose from full21, stream12, frame1"),
        (("--random", "14b"), "'14b' is not one of"),
        (("nowhere",), "there is no model at nowhere"),
        (("--seconds", "0"), "0.0 is not in the range"),
    ],
)
def test_what_makes_no_sense(arguments: tuple[str, ...], complaint: str, run: Run) -> None:
    assert complaint in run("bench", *arguments).err


def test_a_cold_start_that_fails_says_why() -> None:
    with pytest.raises(SfrtError, match="there is no model at nowhere"):
        cold_start_seconds({"model": "nowhere"}, None, 1)


def result_of(name: str, **figures: tuple[float, ...]) -> Result:
    case = case_of(name, "m", StreamConfig(), "torch", "float32", "cpu", decoder="taehv")
    stream_ms = (900.0, *[100.0 + 40 * (number % 2) for number in range(30)])
    return Result(case, tuple(Figure(key, values) for key, values in figures.items()), {}, stream_ms)


def test_the_table() -> None:
    clip = result_of("full21", **{"dit_ms[7]": (40.0,), "chunk_ms[7]": (50.5,), "clip_ms": (1270.0,), "fps": (63.8,)})
    steady = result_of(
        "stream12", chunk_ms=(100.0, 100.0, 108.0), jitter=(1.0499,), roofline=(0.456,), peak_gib=(9.87,)
    )
    lines = table([clip, steady]).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["full21", "taehv", "50.5", "50.5", "40.0", "63.8"],
        ["stream12", "taehv", "100", "108", "1.05", "9.87", "45.6%"],
        ["the", "whole", "clip:", "1.27", "s,", "63.8", "fps"],
    ]
    ends = {name: lines[0].index(name) + len(name) for name in ("p50", "fps", "jitter", "peak GiB", "roofline")}
    assert lines[1][: ends["p50"]].endswith(" 50.5") and lines[1][: ends["fps"]].endswith(" 63.8")
    assert lines[2][: ends["jitter"]].endswith(" 1.05") and lines[2][: ends["peak GiB"]].endswith(" 9.87")


def test_the_plot_begins_at_zero(tmp_path: Path) -> None:
    plot(tmp_path / "one.png", [result_of("stream12")])
    pixels = np.asarray(Image.open(tmp_path / "one.png").convert("RGB")).astype(int)
    line = (pixels[..., 2] - pixels[..., 0]) > 80  # blue
    rows = np.flatnonzero(line.any(axis=1))
    top, bottom = 56, 380  # of the axes: 0 to 150 ms, of which the line takes 100 to 140
    assert rows.min() == pytest.approx(bottom - (bottom - top) * 140 / 150, abs=4)
    assert rows.max() == pytest.approx(bottom - (bottom - top) * 100 / 150, abs=4)
    plot(tmp_path / "none.png", [])
    assert not (tmp_path / "none.png").exists()


def test_a_file_of_a_run(tmp_path: Path) -> None:
    write(tmp_path / "deep" / "run.json", {"cpu": "fast"}, [result_of("stream12", chunk_ms=(1.0, 3.0))], more=1)
    report = json.loads((tmp_path / "deep" / "run.json").read_text())
    assert report["environment"] == {"cpu": "fast"} and report["more"] == 1
    (case,) = report["cases"]
    assert case["figures"]["chunk_ms"] == {"p50": 2.0, "p95": 2.9, "p99": 2.98, "samples": [1.0, 3.0]}
    assert len(case["stream_ms"]) == 31 and "stated_bytes" not in case


def test_the_rate_of_products_is_one() -> None:
    assert 1e8 < matrix_rate(CPU, torch.float32, seconds=0.01) < 1e14
