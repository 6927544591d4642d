"""What the gap is measured by: readings of drawn clips, windows of a stream, and the files that come of them."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from sfrt import Runtime
from sfrt.errors import ConfigError
from sfrt.plot import Line, Panel, write_plot
from sfrt.text import Tokenizer
from sfrt_train import autoencoder, export, gap
from sfrt_train.data import COLOURS, RADIUS, SHAPES, Scene, coverage, make_clip
from sfrt_train.model import trained_model
from sfrt_train.settings import FlowSettings, Settings
from sfrt_train.watching import Reading, held_out, read, watch
from tests.recipe import MICRO, train

BRIEF: Settings = replace(MICRO, teacher_forcing=FlowSettings(steps=2, batch_chunks=20, lengths=(3,), warmup=1))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("brief")
    train(folder, "autoencoder", "sharpening", "reading", "teacher_forcing", settings=BRIEF)
    return folder


def clip(scene: Scene) -> torch.Tensor:
    return make_clip(np.random.default_rng(3), [scene], chunks=3).pixels


@pytest.mark.parametrize("shape", SHAPES)
def test_a_drawn_clip_reads_as_drawn(shape: str) -> None:
    scene = Scene("red", shape, "left", "white")
    seen = read(clip(scene), scene)
    assert (seen.colour, seen.shape, seen.direction) == (1, 1, 1)
    assert seen.size_error < 0.03 and seen.colour_error < 0.02
    assert seen.sharpness == pytest.approx(1, abs=0.1)


def test_what_is_wrong_shows_in_its_own_measure() -> None:
    scene = Scene("red", "circle", "left", "white")
    pixels = clip(scene)
    right = read(pixels, scene)
    blurred = read(F.avg_pool2d(pixels, 5, stride=1, padding=2, count_include_pad=False), scene)
    assert blurred.sharpness < 0.6 * right.sharpness and blurred.shape == 1
    places = torch.full((len(pixels), 2), 32.0)
    smaller = torch.lerp(*(torch.tensor(COLOURS[n]).view(1, 3, 1, 1) for n in ("white", "red")), _cover(places))
    assert read(smaller, scene).size_error == pytest.approx(0.25, abs=0.02)
    assert read(pixels * 0.9, scene).colour_error == pytest.approx(0.1 * pixels.mean().item(), abs=0.04)
    assert read(pixels, replace(scene, colour="blue")).colour == 0
    assert read(pixels, replace(scene, motion="right")).direction == 0
    blank = read(torch.ones_like(pixels), scene)
    assert blank.colour_error > 0.4 and blank.size_error == 1 and blank.sharpness == 0


def _cover(places: torch.Tensor) -> torch.Tensor:
    return coverage(places, 0.75 * RADIUS, "circle")[:, None]


def test_what_is_watched_is_what_streams(trained: Path) -> None:
    """Window after window, decoded as one video, from the words on: as the exported bundle shows them."""
    model = trained_model(BRIEF, trained, "teacher_forcing", "cpu")
    decoder = autoencoder.load(BRIEF, trained, "cpu", "sharpening")
    tokenizer = Tokenizer(trained / "tokenizer.json", BRIEF.transformer.text_len)
    asked, ids = held_out(BRIEF, tokenizer, 2, seed=1)
    stream = BRIEF.euler(2)
    windows = list(watch(BRIEF, model, decoder, stream, ids, seed=1, windows=2))
    assert [len(window[0]) for window in windows] == [33, 36] and len(asked) == 2
    bundle = export.export(BRIEF, trained, trained / "shapes", "teacher_forcing")
    assert bundle.manifest.stream == BRIEF.euler(8)
    embeds = model.text_encoder(ids[1, :1], ids[1, :1] != 0)[0]
    session = Runtime(bundle.path, device="cpu", backend="torch").session(
        embeds, seed=1_000_004, limit=6, stream=stream
    )
    streamed = torch.from_numpy(np.concatenate([chunk.frames for chunk in session])).permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(torch.cat(windows, dim=1)[1], streamed, rtol=0, atol=0.02)  # the bundle is float16


def test_the_gap_is_written_with_every_seed(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = gap.measure(BRIEF, trained, "cpu", tmp_path / "gap.json", prompts=2, seeds=2, times=2)
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == 2 * ["1×", "2×"], (
        "with many steps and few"
    )
    report = json.loads((tmp_path / "gap.json").read_text())
    assert report["trained_latent_frames"] == 9
    assert [(row["seed"], row["times"]) for row in report["means"]] == 2 * [(0, 1), (0, 2), (1, 1), (1, 2)]
    written = (tmp_path / "gap.json").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(gap, "watch", None)  # what is there is not rolled out again
        assert gap.measure(BRIEF, trained, "cpu", tmp_path / "gap.json", prompts=2, seeds=2, times=2) == table
        (trained / "teacher_forcing.pt").touch()  # trained on
        with pytest.raises(TypeError, match="not callable"):
            gap.measure(BRIEF, trained, "cpu", tmp_path / "gap.json", prompts=2, seeds=2, times=2)
    assert (tmp_path / "gap.json").read_bytes() == written
    with (tmp_path / "gap.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["size_error"]) for row in rows] == [row["size_error"] for row in report["means"]]
    assert Image.open(tmp_path / "gap.png").size[0] > 900


def test_the_gap_with_fewer_steps(tmp_path: Path) -> None:
    for stage in ("teacher_forcing", "self_forcing"):
        (tmp_path / f"{stage}.pt").touch()
    few = gap.contestants(BRIEF, tmp_path, (1000.0, 500.0))
    assert [each.name for each in few] == [
        "teacher forcing, 8 steps",
        "teacher forcing, 2 steps",
        "Self Forcing, 2 steps",
    ]
    assert [each.stream.steps for each in few[1:]] == 2 * [(1000.0, 500.0)]
    assert [each.stream.sampler for each in few[1:]] == ["euler", "renoise"]
    with pytest.raises(ConfigError, match=r"trained for the steps .*; \[900.0\] are others"):
        gap.contestants(BRIEF, tmp_path, (900.0,))


def test_spread_is_that_of_the_seeds() -> None:
    readings = [Reading(share, 1, 1, 0.1, 0.1, 1) for share in (0.5, 1.0)]
    points = [gap.Point("a model", seed, 1, reading) for seed, reading in enumerate(readings)]
    assert "| a model | 1× | 75.0 ± 25.0 | 100.0 ± 0.0 |" in gap.table(points)
    (line,) = gap.panels(points, 15)[0].lines
    assert (list(line.x), list(line.y), list(line.spread)) == ([15], [0.75], [0.25])


def test_a_plot_shows_its_lines(tmp_path: Path) -> None:
    rising = Line("rising", [0, 1, 2], [0, 1, 2], [0.1, 0.1, 0.1])
    write_plot(tmp_path / "plot.png", [Panel("one", [rising, Line("level", [0, 2], [1, 1])])], "x")
    image = np.asarray(Image.open(tmp_path / "plot.png")).astype(int)
    blue = (np.abs(image - (31, 119, 180)).sum(2) < 10).nonzero()
    orange = (np.abs(image - (214, 95, 14)).sum(2) < 10).nonzero()
    in_panel = image.shape[0] * 0.7
    assert np.ptp(blue[0][blue[0] < in_panel]) > 120 and np.ptp(orange[0][orange[0] < in_panel]) < 20
