"""The recipe: the clips say what they show, training learns, resumes exactly, and sees what streaming sees."""

from __future__ import annotations

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfrt.backends import Grid
from sfrt.bundle import Bundle
from sfrt.cache import KVCache
from sfrt.config import StreamConfig
from sfrt.errors import BundleError, ConfigError
from sfrt.ops.choice import torch_ops
from sfrt.ops.layout import latents_from_tokens, tokens_from_latents
from sfrt.ring import ring_for
from sfrt.text import Tokenizer
from sfrt.transformer import TextKV, rotary_phases
from sfrt_train import __main__, autoencoder, evaluate, export, pairs, self_forcing
from sfrt_train.clips import Prompts
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
from sfrt_train.forcing import ClipPass
from sfrt_train.loop import weights_of
from sfrt_train.material import MadeUp
from sfrt_train.model import VideoModel, trained_model
from sfrt_train.reader import motion_of, read_scene
from sfrt_train.settings import Loss, Settings
from sfrt_train.stages import COMPARED, STAGES
from sfrt_train.vocabulary import make_tokenizer
from tests.recipe import MICRO, train


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the micro recipe ran through, the baselines too."""
    folder = tmp_path_factory.mktemp("micro")
    train(folder, *STAGES)
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


def test_a_late_clip_begins_where_a_longer_one_is_by_then() -> None:
    scene = [Scene("red", "circle", "circling", "white")]
    whole, late = make_clip(rng(5), scene, chunks=4), make_clip(rng(5), scene, chunks=2, skip=24)
    torch.testing.assert_close(late.pixels, whole.pixels[24 : 24 + len(late.pixels)])


FALLING = {
    "self_forcing": "critic loss",  # the value of the generator's own loss says nothing: see tests/test_train_judging
    "naive_rolling": "critic loss",
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_loss_falls(trained: Path, stage: str) -> None:
    model = weights_of(trained, stage)
    assert all(value.isfinite().all() for value in model.values())
    with (trained / f"{stage}.csv").open() as file:
        losses = [float(row[FALLING.get(stage, "loss")]) for row in csv.DictReader(file)]
    assert losses[-1] < losses[0]
    assert (trained / f"{stage}.png").stat().st_size > 0


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "naive_rolling"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(trained: Path, tmp_path: Path, stage: str) -> None:
    for earlier in trained.glob("*.*"):
        if earlier.stem != stage:
            shutil.copy(earlier, tmp_path)
    shutil.copytree(trained / "pairs", tmp_path / "pairs")
    half = 4 if stage == "self_forcing" else 27
    STAGES[stage](MICRO, tmp_path, "cpu", until=half)
    STAGES[stage](MICRO, tmp_path, "cpu")
    unbroken, resumed = weights_of(trained, stage), weights_of(tmp_path, stage)
    for key, value in unbroken.items():
        torch.testing.assert_close(resumed[key], value, rtol=0, atol=0)


def test_sharpening_leaves_the_latents_and_is_what_is_exported(trained: Path, tmp_path: Path) -> None:
    """Every other stage learned from those latents."""
    before, after = weights_of(trained, "autoencoder"), weights_of(trained, "sharpening")
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"decoder"}
    bundle = export.export(MICRO, trained, tmp_path / "shapes")
    for key, value in bundle.load("decoder").items():
        torch.testing.assert_close(value, after[key].to(value.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(("window", "sink"), [(9, 0), (6, 0), (6, 3), (7, 1)])
def test_teacher_forcing_computes_what_streaming_computes(window: int, sink: int) -> None:
    """One pass over [clean | noisy] chunks against one chunk after another, the clean ones refreshed into the ring."""
    settings = replace(MICRO, stream=StreamConfig(window=window, sink=sink, height=32, width=48))
    model, prompts = _random_model_and_prompts(settings)
    chunks, chunk, grid = 5, settings.stream.chunk, Grid.of(settings.transformer, settings.stream)
    shape = (2, chunks, chunk * grid.tokens, settings.transformer.token_dim)
    clean, noisy = torch.randn(shape), torch.randn(shape)
    timesteps = 1000 * torch.rand(2, chunks)
    net, every_text = model.transformer, model.text_kv(prompts)
    clip_pass = ClipPass.of("teacher", settings, chunks, "cpu")
    whole = clip_pass.flow(net, noisy, timesteps, every_text, clean)

    ring = ring_for(settings.stream)
    for clip in range(2):
        cache = KVCache(settings.transformer, ring, grid.tokens, torch.device("cpu"), torch.float32, torch_ops())
        for i in range(chunks):
            plan = ring.plan(i * chunk, chunk)
            cache.place(plan)
            rotary = rotary_phases(settings.transformer, plan.frames, grid.rows, grid.columns, torch.device("cpu"))
            own = TextKV(every_text.k[:, clip, i], every_text.v[:, clip, i])
            streamed = net(noisy[clip, i], net.modulation(timesteps[clip, i]), rotary, own, cache.attend)
            net.refresh(clean[clip, i], net.modulation(torch.tensor(0.0)), rotary, own, cache.attend, cache.write)
            torch.testing.assert_close(whole[clip, i], streamed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("forcing", "heard"),
    [("diffusion", {1: [1, 2, 3], 3: [3]}), ("none", {1: [0, 1, 2, 3], 3: [0, 1, 2, 3]})],
    ids=["diffusion forcing looks back a window", "the judge sees all"],
)
def test_a_pass_lets_a_chunk_be_heard_where_it_is_seen(forcing: str, heard: dict[int, list[int]]) -> None:
    settings = replace(MICRO, stream=StreamConfig(window=9, height=32, width=32))
    model, prompts = _random_model_and_prompts(settings, chunks=4)
    net, text = model.transformer, model.text_kv(prompts)
    clip_pass = ClipPass.of(forcing, settings, 4, "cpu")  # type: ignore[arg-type]
    noisy, timesteps = torch.randn(2, 4, 12, settings.transformer.token_dim), 1000 * torch.rand(2, 4)
    before = clip_pass.flow(net, noisy, timesteps, text)
    for changed, where in heard.items():
        other = noisy.clone()
        other[:, changed] += 1
        after = clip_pass.flow(net, other, timesteps, text)
        differs = [i for i in range(4) if not torch.allclose(before[:, i], after[:, i], atol=1e-6)]
        assert differs == where


def _random_model_and_prompts(settings: Settings, chunks: int = 5) -> tuple[VideoModel, Prompts]:
    torch.manual_seed(5)
    model = VideoModel(settings).requires_grad_(False)
    torch.nn.init.normal_(model.transformer.head.linear.weight)
    which = torch.tensor([[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]])[:, :chunks]
    return model, Prompts(torch.randint(3, 300, (2, 2, 24)), which)


def test_pairs_are_made_once_and_go_from_noise_to_the_end(trained: Path, tmp_path: Path) -> None:
    ways, prompts = pairs.make_pairs(MICRO, trained, "cpu")
    assert ways.shape[:3] == (6, 3, 5) and len(prompts.ids) == 6
    files = sorted((trained / "pairs").iterdir())
    made = [file.stat().st_mtime_ns for file in files]
    files[1].unlink()
    again, _ = pairs.make_pairs(MICRO, trained, "cpu")
    torch.testing.assert_close(again, ways, rtol=0, atol=0)  # the missing batch came back the same
    assert files[0].stat().st_mtime_ns == made[0]
    assert ways[:, :, 0].float().std() == pytest.approx(1, abs=0.02)  # pure noise
    with pytest.raises(ConfigError, match="2 Euler steps do not pass the timesteps"):
        settings = replace(MICRO, pairs=replace(MICRO.pairs, teacher_steps=2))
        pairs.trajectories(settings, _random_model_and_prompts(MICRO)[0], prompts, [1] * 6)


@pytest.mark.parametrize("loss", ["sid", "gan"])
def test_self_forcing_trains_by_the_other_losses(trained: Path, tmp_path: Path, loss: Loss) -> None:
    for earlier in trained.glob("*.*"):
        if earlier.stem not in self_forcing.STAGES:
            shutil.copy(earlier, tmp_path)
    settings = replace(MICRO, self_forcing=replace(MICRO.self_forcing, loss=loss, steps=2))
    self_forcing.train(settings, tmp_path, "cpu")
    before, after = weights_of(trained, pairs.NAME), weights_of(tmp_path, "self_forcing")
    changed = {key.split(".")[0] for key, value in after.items() if not torch.equal(value, before[key])}
    assert changed == {"transformer"} and all(value.isfinite().all() for value in after.values())


def test_a_long_rollout_is_judged_from_a_picture_on(trained: Path) -> None:
    settings = replace(MICRO, self_forcing=replace(MICRO.self_forcing, long_share=1.0))
    roller = self_forcing.Roller(settings, MadeUp(settings, trained, "cpu"), "cpu")
    model = trained_model(MICRO, trained, pairs.NAME, "cpu")
    model.transformer.requires_grad_(True)
    rolled = roller.roll(model, rng(8), trained=True)
    assert rolled.given and rolled.video.shape[:3] == (4, 3, 48)
    weight = model.transformer.patch_embedding.weight
    (of_given,) = torch.autograd.grad(rolled.video[:, 0].sum(), weight, retain_graph=True, allow_unused=True)
    (of_rest,) = torch.autograd.grad(rolled.video[:, 1:].sum(), weight)
    assert (of_given is None or not of_given.any()) and of_rest.any()

    video = torch.randn(1, 5, 48, MICRO.transformer.token_dim)
    begun = roller._begun_anew(video, chunks=3)
    torch.testing.assert_close(begun[:, 1:], video[:, 3:])
    torch.testing.assert_close(begun[:, 0, 16:], video[:, 2, 16:])
    taehv = autoencoder.load(MICRO, trained, "cpu")
    latents = latents_from_tokens(video.flatten(0, 2), MICRO.transformer, 4, 4)
    with torch.no_grad():
        picture = taehv.encode(taehv.decode(latents[None, :7])[0][:, -1:])[0]
    torch.testing.assert_close(
        begun[0, 0, :16], tokens_from_latents(picture[0], MICRO.transformer), rtol=1e-4, atol=1e-4
    )


def test_the_bundle_streams_and_is_evaluated(trained: Path, tmp_path: Path) -> None:
    bundle = export.export(MICRO, trained, tmp_path / "shapes")
    assert export.export(MICRO, trained, tmp_path / "shapes").manifest == bundle.manifest  # replaces the one before
    report = tmp_path / "report.json"
    table = evaluate.evaluate(MICRO, bundle.path, "cpu", prompts=3, skip=1, report=report)
    assert table.splitlines()[2].startswith("| all | 3 |")
    results = json.loads(report.read_text())
    assert results["prompts"] == len(results["results"]) == 3
    assert results["share_right"]["all"].keys() == evaluate.COLUMNS.keys()


def test_one_command_makes_the_model(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is done stays, what is missing is trained, but for what the model is only compared with."""
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    for stage in ("sharpening", "self_forcing", *COMPARED):
        (folder / f"{stage}.pt").unlink()
    kept = weights_of(folder, "regression")
    monkeypatch.setattr(__main__, "Settings", lambda: MICRO)
    __main__.recipe(["all", "--folder", str(folder), "--device", "cpu", "--prompts", "2"])
    assert not any((folder / f"{stage}.pt").exists() for stage in COMPARED)
    torch.testing.assert_close(weights_of(folder, "regression"), kept, rtol=0, atol=0)
    told = capsys.readouterr().out
    assert told.count("reconstructions read right: colour") == 2 and "| all | 2 |" in told
    made = Bundle.open(folder / export.NAME).load("transformer")
    own = weights_of(folder, "self_forcing")["transformer.head.linear.weight"]
    assert torch.equal(made["head.linear.weight"], own.to(made["head.linear.weight"].dtype))


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
