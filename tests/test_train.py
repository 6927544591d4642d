"""The recipe: the clips say what they show, training learns, resumes exactly, and sees what streaming sees."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from sfrt.backends import Grid
from sfrt.cache import KVCache
from sfrt.config import ModelConfig, StreamConfig, TaehvConfig, Umt5Config
from sfrt.errors import BundleError
from sfrt.ring import ring_for
from sfrt.text import Tokenizer
from sfrt.transformer import TextKV, rotary_phases
from sfrt_train import autoencoder, evaluate, export, flow, reading
from sfrt_train.clips import Clips
from sfrt_train.data import (
    COLOURS,
    DIRECTIONS,
    MOTIONS,
    SHAPES,
    Scene,
    chunk_lengths,
    every_scene,
    make_clip,
    say,
    split_scenes,
)
from sfrt_train.loop import weights_of
from sfrt_train.reader import motion_of, read_scene
from sfrt_train.settings import AutoencoderSettings, FlowSettings, ReadingSettings, Settings
from sfrt_train.vocabulary import make_tokenizer

MICRO = Settings(
    transformer=ModelConfig(
        dim=32, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=32, text_dim=32, text_len=24, latent_channels=4
    ),
    taehv=TaehvConfig(latent_channels=4, encoder_width=8, decoder_widths=(12, 8, 8, 8)),
    text=Umt5Config(
        vocab_size=384, dim=32, dim_attn=32, dim_ffn=32, num_heads=2, num_layers=1, num_buckets=8, max_distance=16
    ),
    autoencoder=AutoencoderSettings(steps=40, batch_frames=4, lengths=(2,), warmup=3),
    reading=ReadingSettings(steps=40, batch=8, warmup=3),
    flow=FlowSettings(steps=40, batch_chunks=20, lengths=(3, 1), clips=8, chunks=3, warmup=3),
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the micro recipe ran through."""
    folder = tmp_path_factory.mktemp("micro")
    for stage in (autoencoder, reading, flow):
        stage.train(MICRO, folder, "cpu")
    return folder


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng((99, number))


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_reader_reads_what_was_drawn(shape: str, motion: str) -> None:
    names = list(COLOURS)
    for i in range(3):
        colour, background = rng(i).choice(len(names), 2, replace=False)
        scene = Scene(names[colour], shape, motion, names[background])
        clip = make_clip(rng(10 + i), [scene], chunks=5)
        assert read_scene(clip.pixels) == scene


@pytest.mark.parametrize("motion", MOTIONS)
def test_reader_knows_a_motion_from_places_that_are_half_a_pixel_off(motion: str) -> None:
    """As a model's objects are; a bounce that goes round is no circle, nor a circle that trembles a bounce."""
    scene = Scene("red", "circle", motion, "white")
    for i in range(20):
        clip = make_clip(rng(40 + i), [scene], chunks=5)
        path = np.array([_centre_column_and_row(frame) for frame in clip.pixels])
        assert motion_of(path + 0.5 * rng(i).normal(size=path.shape)) == motion


@pytest.mark.parametrize("motion", MOTIONS)
def test_objects_stand_on_latent_cells_where_chunks_begin(motion: str) -> None:
    """And so come back to few places: every linear and bouncing path, in any clip."""
    clip = make_clip(rng(4), [Scene("red", "square", motion, "white")], chunks=4)
    first_of_chunks = np.cumsum([0, *chunk_lengths(4, 3)])[:-1]
    for frame in first_of_chunks:
        column, row = _centre_column_and_row(clip.pixels[frame - 1 if frame else 0])
        if motion != "circling":
            assert min(column % 8, 8 - column % 8) < 0.2 and min(row % 8, 8 - row % 8) < 0.2
    travelled = [_centre_column_and_row(frame) for frame in clip.pixels[:2]]
    assert max(abs((a - b + 32) % 64 - 32) for a, b in zip(*travelled, strict=True)) < 2.3


def test_reader_is_not_fooled_by_nothing_or_stillness() -> None:
    blank = torch.tensor(COLOURS["blue"]).view(1, 3, 1, 1).expand(30, 3, 64, 64)
    assert read_scene(blank) == Scene("?", "?", "?", "blue")
    clip = make_clip(rng(), [Scene("red", "square", "left", "white")], chunks=3)
    still = read_scene(clip.pixels[:1].expand(30, -1, -1, -1))
    assert still == Scene("red", "square", "?", "white")


def test_clip_changes_its_scene_where_a_chunk_begins_and_moves_on() -> None:
    scenes = [Scene("red", "circle", "left", "white"), Scene("red", "circle", "down", "black")]
    clip = make_clip(rng(3), scenes, chunks=5, switch_share=1.0)
    lengths = chunk_lengths(5, 3)
    assert len(clip.pixels) == sum(lengths) == 4 * 15 - 3
    boundary = clip.scenes.index(clip.scenes[-1])
    assert boundary > 0 and len(set(clip.scenes)) == 2
    start = sum(lengths[:boundary])
    assert read_scene(clip.pixels[:start]).background == clip.scenes[0].background
    assert read_scene(clip.pixels[start:]).background == clip.scenes[-1].background
    jump = [_centre_column_and_row(frame) for frame in clip.pixels[start - 1 : start + 1]]
    assert max(abs((a - b + 32) % 64 - 32) for a, b in zip(*jump, strict=True)) < 3


def _centre_column_and_row(frame: torch.Tensor) -> tuple[float, float]:
    """On the torus, of what is red."""
    red = (frame - torch.tensor(COLOURS["red"]).view(3, 1, 1)).abs().sum(0) < 0.3
    turn = torch.polar(torch.ones(64), 2 * torch.pi * (torch.arange(64) + 0.5) / 64)
    column, row = ((red.sum(axis) * turn).sum().angle().item() * 64 / (2 * torch.pi) for axis in (0, 1))
    return column, row


def test_held_out_scenes_are_apart() -> None:
    train, held_out = split_scenes(100, seed=7)
    assert len(held_out) == 100 and not set(train) & set(held_out)
    assert set(train) | set(held_out) == set(every_scene())
    assert {scene.motion for scene in held_out} == set(MOTIONS) and set(DIRECTIONS) < set(MOTIONS)


def test_every_sentence_fits_the_tokenizer(tmp_path: Path) -> None:
    tokenizer = Tokenizer(make_tokenizer(MICRO, tmp_path), MICRO.transformer.text_len)
    assert tokenizer.vocab_size <= MICRO.text.vocab_size
    unknown = tokenizer._tokenizer.token_to_id("<unk>")
    for i, scene in enumerate(every_scene()[::7]):
        ids = tokenizer.encode(say(scene, rng(i)))  # warns, which is an error here, where it must cut
        assert len(ids) < MICRO.transformer.text_len and unknown not in ids


@pytest.mark.parametrize("name", [autoencoder.NAME, reading.NAME, flow.NAME])
def test_the_loss_falls(trained: Path, name: str) -> None:
    model = weights_of(trained, name)
    assert all(value.isfinite().all() for value in model.values())
    with (trained / f"{name}.csv").open() as file:
        losses = [float(row["loss"]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("stage", [autoencoder, reading, flow], ids=lambda stage: stage.NAME)
def test_a_resumed_run_ends_where_an_unbroken_one_does(trained: Path, tmp_path: Path, stage: ModuleType) -> None:
    name, train = stage.NAME, stage.train
    if name == flow.NAME:
        for before in (autoencoder, reading):
            before.train(MICRO, tmp_path, "cpu")
    train(MICRO, tmp_path, "cpu", until=27)
    train(MICRO, tmp_path, "cpu")
    unbroken, resumed = weights_of(trained, name), weights_of(tmp_path, name)
    for key, value in unbroken.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)


@pytest.mark.parametrize(("window", "sink"), [(9, 0), (6, 0), (6, 3), (7, 1)])
def test_teacher_forcing_computes_what_streaming_computes(window: int, sink: int) -> None:
    """One pass over [clean | noisy] chunks against one chunk after another, the clean ones refreshed into the ring."""
    settings = replace(MICRO, stream=StreamConfig(window=window, sink=sink, height=32, width=48))
    torch.manual_seed(5)
    model = flow.FlowModel(settings).requires_grad_(False)
    torch.nn.init.normal_(model.transformer.head.linear.weight)
    chunks, chunk, grid = 5, settings.stream.chunk, Grid.of(settings.transformer, settings.stream)
    shape = (2, chunks, chunk * grid.tokens, settings.transformer.token_dim)
    clean, noisy = torch.randn(shape), torch.randn(shape)
    timesteps = 1000 * torch.rand(2, chunks)
    clips = Clips(clean, torch.randint(3, 300, (2, 2, 24)), torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]]))
    whole = flow.TeacherForcing.of(settings, chunks, "cpu").flow(model, clean, noisy, timesteps, clips)

    net, ring = model.transformer, ring_for(settings.stream)
    for clip in range(2):
        text = model.text_kv(clips.ids[clip : clip + 1], clips.prompt[clip : clip + 1])
        cache = KVCache(settings.transformer, ring, grid.tokens, torch.device("cpu"), torch.float32)
        for i in range(chunks):
            plan = ring.plan(i * chunk, chunk)
            cache.place(plan)
            rotary = rotary_phases(settings.transformer, plan.frames, grid.rows, grid.columns, torch.device("cpu"))
            own = TextKV(text.k[:, 0, i], text.v[:, 0, i])
            streamed = net(noisy[clip, i], net.modulation(timesteps[clip, i]), rotary, own, cache.attend)
            net.refresh(clean[clip, i], net.modulation(torch.tensor(0.0)), rotary, own, cache.attend, cache.write)
            torch.testing.assert_close(whole[clip, i], streamed, rtol=1e-5, atol=1e-5)


def test_the_bundle_streams_and_is_evaluated(trained: Path, tmp_path: Path) -> None:
    bundle = export.export(MICRO, trained, tmp_path / "shapes")
    assert export.export(MICRO, trained, tmp_path / "shapes").manifest == bundle.manifest  # replaces the one before
    report = tmp_path / "report.json"
    table = evaluate.evaluate(MICRO, bundle.path, "cpu", prompts=3, skip=1, report=report)
    assert table.splitlines()[2].startswith("| all | 3 |")
    results = json.loads(report.read_text())
    assert results["prompts"] == len(results["results"]) == 3
    assert results["share_right"]["all"].keys() == evaluate.COLUMNS.keys()


def test_only_a_bundle_is_replaced(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "precious").touch()
    with pytest.raises(BundleError, match="is no bundle, so it is not replaced"):
        export.export(MICRO, trained, tmp_path / "models")
    assert (tmp_path / "models" / "precious").exists()


def test_the_table_counts_what_is_right() -> None:
    asked = Scene("red", "circle", "left", "white")
    seen = [asked, replace(asked, colour="blue"), replace(asked, shape="?"), replace(asked, motion="up")]
    results = [evaluate.Result("a prompt", i, asked, scene) for i, scene in enumerate(seen)]
    assert "| all | 4 | 75.0 | 75.0 | 75.0 | 25.0 |" in evaluate.table(results)
