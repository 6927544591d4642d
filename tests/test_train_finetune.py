"""Fine-tuning from bundles and a folder of data: it trains, goes on, exports what streams, and says what is wrong."""

from __future__ import annotations

import copy
import csv
import json
import shutil
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfrt import Runtime
from sfrt.bundle import Bundle, resolve_model
from sfrt.bundle.quantization import Quality, Quantization
from sfrt.config import ModelConfig, StreamConfig
from sfrt.decoders import load_decoder
from sfrt.errors import BundleError, ConfigError
from sfrt.text import load_text_encoder
from sfrt.video import open_writer, read_frames
from sfrt_train import __main__, commands
from sfrt_train.clips import Prompts
from sfrt_train.finetune import PUBLISHED, Embedded, FinetuneSettings, Finetuning, RealPool, read_settings
from sfrt_train.forcing import ClipPass
from sfrt_train.judging import Rolled, judging_for
from sfrt_train.loop import weights_of
from sfrt_train.memory import Pass, memory, table
from sfrt_train.model import VideoModel
from sfrt_train.published import empty_network, trainable
from sfrt_train.rollout import Rollout, Trained
from sfrt_train.settings import Loss
from sfrt_train.shards import DataError, DataFolder
from tests.recipe import MICRO

MODEL = Bundle.open(resolve_model(), verify=False)
"""The built-in model stands for a published one, and for its teacher."""
PROMPTS = ("a red circle moves left on blue", "a green square moves up on white", "a blue star bounces on black")
CONFIG = """
chunks = 3
[stream]
window = 6
sampler = "renoise"
steps = [1000, 750, 500, 250]
[self_forcing]
steps = 3
batch = 2
critic_updates = 1
learning_rate = 1e-4
switch_share = 0.5
ema = 0.5
ema_from = 0
log_every = 1
"""


def run(verb: str, **options: Any) -> None:
    arguments = [verb]
    for name, value in options.items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    commands.main(arguments)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n\n".join(PROMPTS))
    return path


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of 40 frames, a square that moves."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("one", "two"):
        frames = np.full((40, 64, 64, 3), 255, np.uint8)
        for number, frame in enumerate(frames):
            frame[20:40, number : number + 20] = (200, 0, 0)
        with open_writer(str(folder / f"{name}.gif"), width=64, height=64, fps=16) as writer:
            writer.write(frames)
        (folder / f"{name}.txt").write_text("a red square moves right on white\n")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, prompts: Path, clips: Path) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    run("prepare", model="shapes", prompts=prompts, clips=clips, data=folder, device="cpu", chunks=3, per_shard=2)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, data: Path, config: Path) -> Path:
    folder = tmp_path_factory.mktemp("tuned") / "run"
    finetune(folder, data, config)
    return folder


def finetune(folder: Path, data: Path, config: Path, **more: Any) -> None:
    options = {"model": "shapes", "judge": "shapes", "data": data, "folder": folder, "config": config, "device": "cpu"}
    run("finetune", **{**options, **more})


def test_the_data_is_what_the_models_own_encoders_make(data: Path, clips: Path) -> None:
    folder, text = DataFolder(data, MODEL.manifest), load_text_encoder(MODEL, torch.device("cpu"))
    assert (folder.origin.prompts, folder.origin.clips, folder.origin.frames) == (3, 2, 9)
    for number, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(folder.prompt(number), text.encode(prompt).float())
    assert not folder.nothing().any()
    latents, told = folder.clip(1)
    torch.testing.assert_close(told, text.encode("a red square moves right on white").float())
    pixels = read_frames(clips / "two.gif", height=64, width=64, fps=16, max_frames=33)
    assert MODEL.manifest.decoder is not None
    config, weights = MODEL.manifest.decoder.config, MODEL.load("decoder")
    decoder = load_decoder(config, weights, torch.device("cpu"), torch.float32)
    torch.testing.assert_close(latents, decoder.encode(pixels[None])[0][0], rtol=1e-2, atol=1e-2)


def test_preparing_goes_on_where_it_was(data: Path, prompts: Path, clips: Path, tmp_path: Path) -> None:
    begun = tmp_path / "data"
    shutil.copytree(data, begun)
    index = json.loads((begun / "index.json").read_text())
    (begun / "index.json").write_text(json.dumps({**index, "prompts": index["prompts"][:1], "clips": []}))
    for name in ("prompts-00001.safetensors", "clips-00000.safetensors"):
        (begun / name).unlink()
    with pytest.raises(DataError, match="is not finished; run the same `prepare` again"):
        DataFolder(begun, MODEL.manifest)
    first = (begun / "prompts-00000.safetensors").stat()
    given = {"model": "shapes", "prompts": prompts, "data": begun, "device": "cpu", "chunks": 3, "per_shard": 2}
    run("prepare", clips=clips, **given)
    assert json.loads((begun / "index.json").read_text()) == index
    assert (begun / "prompts-00000.safetensors").stat().st_mtime_ns == first.st_mtime_ns
    with pytest.raises(DataError, match="was begun from other prompts, clips or encoders"):
        run("prepare", **given)  # without the clips


def test_what_a_video_without_a_prompt_is_told(prompts: Path, tmp_path: Path) -> None:
    given = {"model": "shapes", "prompts": prompts, "device": "cpu"}
    run("prepare", data=tmp_path / "data", unprompted="a white circle", **given)
    text = load_text_encoder(MODEL, torch.device("cpu"))
    nothing = DataFolder(tmp_path / "data", MODEL.manifest).nothing()
    torch.testing.assert_close(nothing, text.encode("a white circle").float())
    told = Embedded(torch.randn(2, 2, *nothing.shape), torch.zeros(2, 3, dtype=torch.int64), nothing)
    assert torch.equal(told.unprompted().embeds(None)[1, 0], nothing)


def test_it_trains_and_its_bundle_streams(tuned: Path) -> None:
    with (tuned / "finetune.csv").open() as file:
        losses = [float(value) for row in csv.DictReader(file) for name, value in row.items() if "loss" in name]
    assert len(losses) == 6 and np.isfinite(losses).all()
    bundle = Bundle.open(tuned / "bundle")
    before, after = MODEL.load("transformer"), bundle.load("transformer")
    assert before.keys() == after.keys()
    changed = sum(not torch.equal(before[name], after[name]) for name in before)
    assert changed > 0.9 * len(before) and all(value.isfinite().all() for value in after.values())
    for part in ("decoder", "text_encoder"):
        name = f"{part}.safetensors"
        assert bundle.manifest.files[name] == MODEL.manifest.files[name]
    stream = bundle.manifest.stream
    assert (stream.window, stream.sampler, len(stream.steps)) == (6, "renoise", 4)
    with Runtime(bundle.path, device="cpu").session(PROMPTS[0], seed=1, limit=3) as session:
        assert sum(len(chunk.frames) for chunk in session) == 33


def test_a_resumed_run_ends_where_an_unbroken_one_does(tuned: Path, data: Path, config: Path, tmp_path: Path) -> None:
    finetune(tmp_path, data, config, until=1)
    finetune(tmp_path, data, config)
    unbroken, resumed = weights_of(tuned, "finetune"), weights_of(tmp_path, "finetune")
    for name, value in unbroken.items():
        torch.testing.assert_close(resumed[name], value, rtol=0, atol=0)
    other = tmp_path / "other.toml"
    other.write_text(CONFIG.replace("1e-4", "1e-3"))
    with pytest.raises(ConfigError, match="has other settings; go on with its own, or choose a folder"):
        finetune(tmp_path, data, other)


@pytest.mark.parametrize(("loss", "precision"), [("sid", "float32"), ("gan", "bfloat16")])
def test_the_other_losses_and_longer_rollouts(loss: str, precision: str, data: Path, tmp_path: Path) -> None:
    more = f'steps = 1\nloss = "{loss}"\nprecision = "{precision}"\nlong_share = 1.0\nlongest = 4'
    changed = CONFIG.replace("steps = 3", more)
    (tmp_path / "run.toml").write_text(changed)
    finetune(tmp_path / "run", data, tmp_path / "run.toml")
    after = weights_of(tmp_path / "run", "finetune")
    before = MODEL.load("transformer", dtype=torch.float32)
    assert all(value.isfinite().all() for value in after.values())
    assert any(not torch.equal(after[f"transformer.{name}"], value) for name, value in before.items())


def test_it_is_the_recipes_loop_with_the_prompts_read_before() -> None:
    """A rollout told embeddings is the one told ids, and checkpointed blocks give the gradient that others give."""
    torch.manual_seed(3)
    recipe = VideoModel(MICRO)
    torch.nn.init.normal_(recipe.transformer.head.linear.weight, std=0.1)
    ids = torch.randint(3, 300, (2, 2, 24))
    which = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1]])
    told = Prompts(ids, which)
    embedded = Embedded(told.embeds(recipe.text_encoder), which, torch.zeros(24, 32))
    stream = StreamConfig(window=6, steps=(1000.0, 500.0), height=32, width=32)
    videos, gradients = [], []
    for model, prompts in ((recipe, told), (_network(recipe, False), embedded), (_network(recipe, True), embedded)):
        video = Rollout(model, stream, prompts, [1, 2]).video(Trained([0, 1], gradient=3))
        video.square().sum().backward()
        videos.append(video.detach())
        gradients.append([parameter.grad for parameter in model.transformer.parameters() if parameter.grad is not None])
    for video, gradient in zip(videos[1:], gradients[1:], strict=True):
        torch.testing.assert_close(video, videos[0])
        assert len(gradient) == len(gradients[0]) > 20
        for own, other in zip(gradient, gradients[0], strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def _network(recipe: VideoModel, checkpointing: bool) -> Any:
    network = empty_network(MICRO.transformer, checkpointing=checkpointing)
    network.transformer.load_state_dict(copy.deepcopy(recipe.transformer.state_dict()), assign=True)
    return network.requires_grad_(True)


@pytest.mark.parametrize("loss", ["sid", "gan"])
def test_a_score_that_is_made_again_for_its_gradient_stays_out_of_it(loss: Loss) -> None:
    """The generator's gradient goes through the critic, which is frozen in the pass and no longer behind it."""
    torch.manual_seed(6)
    recipe = VideoModel(MICRO)
    torch.nn.init.normal_(recipe.transformer.head.linear.weight, std=0.1)
    settings = replace(MICRO, self_forcing=replace(MICRO.self_forcing, loss=loss))
    noise, embeds = torch.randn(4, 3, 48, MICRO.transformer.token_dim), torch.randn(4, 2, 24, 32)
    told = Embedded(embeds, torch.zeros(4, 3, dtype=torch.int64), torch.zeros(24, 32))
    pool = Clips(noise.flip(0), told)
    gradients = []
    for checkpointing in (False, True):
        judge, critic = (_network(recipe, checkpointing) for _ in range(2))
        for parameter in critic.parameters():  # apart from the judge, or there is no gradient
            parameter.data *= 1.05
        torch.manual_seed(7)
        judging = judging_for(settings, judge.requires_grad_(False), lambda late: pool, "cpu", critic)
        video = noise.clone().requires_grad_()
        judging.generator_losses(Rolled(video, told), np.random.default_rng(8))["loss"].backward()
        assert video.grad is not None and all(parameter.grad is None for parameter in judging.critic.parameters())
        gradients.append(video.grad)
    assert gradients[0].any()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)


@dataclass(frozen=True)
class Clips:
    """Always the same ones."""

    tokens: Tensor
    prompts: Embedded

    def __len__(self) -> int:
        return len(self.tokens)

    def pick(self, index: Tensor, length: int, device: str) -> Clips:
        return self


def test_fused_attention_sees_what_the_plain_formula_sees() -> None:
    torch.manual_seed(4)
    model = VideoModel(MICRO).requires_grad_(False)
    torch.nn.init.normal_(model.transformer.head.linear.weight)
    plain = ClipPass.of("none", MICRO, 3, "cpu")
    assert not plain.fused and ClipPass.of("none", MICRO, 3, "meta").fused
    assert not ClipPass.of("teacher", MICRO, 3, "meta").fused
    told = Prompts(torch.randint(3, 300, (2, 2, 24)), torch.zeros(2, 3, dtype=torch.int64))
    text = model.text_kv(told)
    noisy, when = torch.randn(2, 3, 48, MICRO.transformer.token_dim), torch.full((2, 3), 400.0)
    flows = [clip_pass.flow(model.transformer, noisy, when, text) for clip_pass in (plain, replace(plain, fused=True))]
    torch.testing.assert_close(*flows, rtol=1e-4, atol=1e-5)


def test_weights_and_optimizers_take_what_was_counted(tuned: Path, config: Path) -> None:
    said = memory(read_settings(config, MODEL.manifest), MODEL.manifest.model, MODEL.manifest.model)
    state = torch.load(tuned / "finetune.pt", weights_only=True)
    for name, own in (("generator", state), ("critic", state["beside"]["critic"])):
        moments = [value for each in own["optimizer"]["state"].values() for value in each.values()]
        assert said[f"{name}: weights"] == _bytes(own["module"].values())
        assert said[f"{name}: AdamW"] == _bytes(moments)
    assert said["generator: averaged weights"] == _bytes(state["averaged"].values())
    assert said["peak"] > sum(said[name] for name in said if "generator:" in name or "critic:" in name)


def _bytes(tensors: Any) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("width", [64, 128])
def test_activations_take_about_what_was_counted(width: int) -> None:
    """All that autograd keeps of a pass over a whole clip, but for the weights."""
    model = ModelConfig(
        dim=width, ffn_dim=4 * width, num_heads=2, num_layers=3, freq_dim=32, text_dim=16, text_len=4, latent_channels=4
    )
    settings = Finetuning(FinetuneSettings(StreamConfig(height=128, width=128), chunks=2), model)
    network = empty_network(model, checkpointing=False).to_empty(device="cpu")
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    clip_pass = replace(ClipPass.of("none", settings, 2, "cpu"), fused=True)
    told = Embedded(torch.randn(1, 2, 4, 16), torch.zeros(1, 2, dtype=torch.int64), torch.zeros(4, 16))
    kept: dict[int, Tensor] = {parameter.data_ptr(): parameter[:0] for parameter in network.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    noisy, when = torch.randn(1, 2, 192, model.token_dim), torch.full((1, 2), 400.0)
    with torch.autocast("cpu", torch.bfloat16), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        clip_pass.flow(network.transformer, noisy, when, network.text_kv(told))
    found = sum(tensor.untyped_storage().nbytes() for tensor in kept.values() if tensor.numel())
    halves = 2 * sum(p.numel() for p in network.transformer.blocks.parameters() if p.ndim > 1)
    counted = Pass(model, 384, 384, half=2).activations(checkpointing=False) + halves
    assert counted == pytest.approx(found, rel=0.12)


def test_checkpointing_and_a_window_take_less() -> None:
    settings, model = FinetuneSettings(StreamConfig()), ModelConfig()
    whole = memory(settings, model, model)
    assert whole["generator: weights"] == 4 * 1_418_996_800
    without = memory(replace(settings, checkpointing=False), model, model)
    rolling = memory(replace(settings, stream=StreamConfig(window=9)), model, model)
    judged_by_gan = memory(replace(settings, self_forcing=replace(PUBLISHED, loss="gan")), model, model)
    assert rolling["peak"] < whole["peak"] < judged_by_gan["peak"] < without["peak"]
    assert judged_by_gan["critic: weights"] > whole["critic: weights"]
    assert f"| peak | {whole['peak'] / 2**30:.2f} |" in table(whole)


def test_a_dry_run_trains_nothing(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "shapes", "--judge", "shapes", "--folder", str(tmp_path / "run"), "--config", str(config)]
    commands.main(["finetune", *arguments, "--dry-run"])
    assert "| generator: AdamW | 0.0" in capsys.readouterr().out and not (tmp_path / "run").exists()


def test_settings_are_the_papers_where_a_file_says_nothing_else(tmp_path: Path) -> None:
    manifest = replace(MODEL.manifest, stream=replace(MODEL.manifest.stream, sampler="renoise"))
    assert read_settings(None, manifest) == FinetuneSettings(manifest.stream)
    path = tmp_path / "run.toml"
    path.write_text("seed = 3\n[stream]\nsink = 1\n[self_forcing]\nbetas = [0.5, 0.9]\n")
    settings = read_settings(path, manifest)
    assert settings.stream == replace(manifest.stream, sink=1)
    assert settings.self_forcing == replace(PUBLISHED, betas=(0.5, 0.9)) and settings.seed == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[self_forcing]\nbacth = 2", r"run\.toml: self_forcing\.bacth is not a known key"),
        ("transformer = 1", "transformer is not a known key"),
        ("[self_forcing]\nbatch = 0", "batch is 0; it must be positive"),
        ("[self_forcing]\nbatch = 1.5", "self_forcing.batch is 1.5, not a whole number"),
        ("[self_forcing]\nloss = 'mse'", "self_forcing.loss is 'mse', not one of 'dmd', 'sid', 'gan'"),
        ("[self_forcing]\nlevels = [0.9, 0.1]", "must ascend between 0 and 1"),
        ("[stream]\nsampler = 'euler'", "sampler 'euler' is of many steps"),
        ("[stream]\nwindow = 2", "window 2 is smaller than chunk 3"),
        ("[stream]\nfirst_chunk = 1", "a first chunk of another size"),
        ("chunks = ", "cannot be read as TOML"),
    ],
)
def test_a_config_says_what_is_wrong_with_it(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(line)
    manifest = replace(MODEL.manifest, stream=replace(MODEL.manifest.stream, sampler="renoise"))
    with pytest.raises(ConfigError, match=message):
        read_settings(path, manifest)


def test_a_damaged_shard_is_found(data: Path, config: Path, tmp_path: Path) -> None:
    shutil.copytree(data, tmp_path / "data")
    shard = tmp_path / "data" / "prompts-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"prompts-00001\.safetensors is damaged: its sha256 is not the index's"):
        finetune(tmp_path / "run", tmp_path / "data", config)
    shard.unlink()
    with pytest.raises(DataError, match=r"prompts-00001\.safetensors is missing"):
        finetune(tmp_path / "run", tmp_path / "data", config)


def test_another_models_data_is_refused(data: Path, tiny_bundle: Path) -> None:
    with pytest.raises(DataError, match="was prepared with 'shapes', whose encoders are not those of 'tiny'"):
        DataFolder(data, Bundle.open(tiny_bundle).manifest)


def test_a_teacher_of_another_family_is_refused(data: Path, config: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="its latent_channels is 4, the model's 12; take a teacher of the same family"
    ):
        finetune(tmp_path / "run", data, config, judge=tiny_bundle)


def test_what_else_does_not_fit(data: Path, prompts: Path, clips: Path, config: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="there is no model at"):
        finetune(tmp_path / "run", data, config, judge=tmp_path / "teacher")
    with pytest.raises(DataError, match=r"has no index\.json; make one with"):
        finetune(tmp_path / "run", tmp_path, config)
    longer = Finetuning(FinetuneSettings(replace(MODEL.manifest.stream, sampler="renoise")), MODEL.manifest.model)
    with pytest.raises(ConfigError, match="clips are 9 latent frames of 64×64, the stream's videos 21 latent frames"):
        RealPool(DataFolder(data, MODEL.manifest), longer)
    with pytest.raises(ConfigError, match="has 9 latent frames at 16 frames a second and 21 are taken; leave it out"):
        run("prepare", model="shapes", prompts=prompts, clips=clips, data=tmp_path / "data", device="cpu")
    quantised = Bundle(
        MODEL.path,
        replace(MODEL.manifest, quantization=Quantization("int8", Quality(1.0, 0.0, None), {"head.linear": 0.0})),
    )
    with pytest.raises(ConfigError, match="is quantised, which can neither be trained nor judge"):
        trainable(quantised, "cpu", checkpointing=True)


def test_an_error_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prepare", "--model", str(tmp_path / "none"), "--prompts", "p.txt", "--data", str(tmp_path / "data")]
    monkeypatch.setattr(sys, "argv", ["sfrt_train", *arguments])
    with pytest.raises(SystemExit) as left:
        __main__.main()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("sfrt_train: there is no model at")
    with pytest.raises(SystemExit):
        commands.main(["finetune", "--model", "shapes", "--data", "d", "--folder", "f"])
    assert "the following arguments are required: --judge" in capsys.readouterr().err
