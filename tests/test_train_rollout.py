"""The rollout in training is the rollout in inference, and its gradient goes where it should and nowhere else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfrt import Runtime
from sfrt.bundle.writer import BundleWriter
from sfrt.config import StreamConfig
from sfrt.errors import ConfigError
from sfrt.ops.layout import tokens_from_latents
from sfrt_train import export
from sfrt_train.clips import Prompts
from sfrt_train.model import VideoModel
from sfrt_train.rollout import Rollout, Trained
from tests.recipe import MICRO

FEW = StreamConfig(window=9, steps=(1000.0, 750.0, 500.0, 250.0), shift=3.0, height=32, width=48)
STREAMS = {
    "few steps": FEW,
    "Euler": replace(FEW, sampler="euler"),
    "a window of odd size with sinks": replace(FEW, window=8, sink=2),
    "sinks that follow": replace(FEW, window=8, sink=2, positions="window"),
    "no window": replace(FEW, window=None),
    "a short first chunk, other steps, noise on the context": replace(
        FEW, first_chunk=1, first_steps=(1000.0, 500.0), context_noise=60.0
    ),
}
SEEDS = [3, 2**63 + 5]


@pytest.fixture(scope="module")
def model() -> VideoModel:
    torch.manual_seed(5)
    model = VideoModel(MICRO)
    torch.nn.init.normal_(model.transformer.head.linear.weight, std=0.1)
    return model


def prompts(chunks: int) -> Prompts:
    """The second one's changes at its third chunk."""
    ids = torch.randint(3, 300, (2, 2, 24), generator=torch.Generator().manual_seed(1))
    return Prompts(ids, torch.stack([torch.zeros(chunks).long(), (torch.arange(chunks) >= 2).long()]))


def streamed(model: VideoModel, stream: StreamConfig, prompts: Prompts, folder: Path) -> list[list[Tensor]]:
    """Every chunk of every video, as the runtime makes it; its prompt changes between two chunks."""
    manifest = replace(
        export.manifest(MICRO, "self_forcing"),
        stream=stream,
        dtype="float32",
        decoder=None,
        text_encoder=None,
        graphs=(),
    )
    with BundleWriter(folder) as writer:
        writer.add_tensors("transformer", model.transformer.state_dict())
        writer.finish(manifest)
    runtime, videos = Runtime(folder, device="cpu", backend="torch"), []
    for video, seed in enumerate(SEEDS):
        with torch.no_grad():
            embeds = model.text_encoder(prompts.ids[video], prompts.ids[video] != 0)
        which = prompts.chunks[video]
        session = runtime.session(embeds[which[0]], seed=seed, limit=len(which))
        chunks: list[Tensor] = []
        for number in range(len(which)):
            if number and which[number] != which[number - 1]:
                session.refresh()  # behind the chunk before, still in its own words
                assert session._stage is not None
                session._stage.rollout.set_text(embeds[which[number]])
            chunks.append(tokens_from_latents(next(session).latents, MICRO.transformer))
        videos.append(chunks)
    return videos


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_it_rolls_out_what_the_runtime_streams(model: VideoModel, stream: StreamConfig, tmp_path: Path) -> None:
    told = prompts(chunks=5)
    with torch.no_grad():
        rolled = [chunk.tokens for chunk in Rollout(model, stream, told, SEEDS).run()]
    for video, chunks in enumerate(streamed(model, stream, told, tmp_path / "bundle")):
        for number, chunk in enumerate(chunks):
            torch.testing.assert_close(rolled[number][video], chunk, rtol=1e-5, atol=1e-5)


def test_a_trained_rollout_that_ends_at_the_last_step_is_that_of_inference(model: VideoModel) -> None:
    told = prompts(chunks=5)
    with torch.no_grad():
        inferred = Rollout(model, FEW, told, SEEDS).video()
    trained = Rollout(model, FEW, told, SEEDS).video(Trained([3, 3], gradient=5))
    torch.testing.assert_close(trained.detach(), inferred, rtol=1e-5, atol=1e-5)


def test_a_sample_that_ends_early_is_a_rollout_of_fewer_steps(model: VideoModel) -> None:
    """Ending at step s is to stream with the first s + 1 steps and take the last one's prediction."""
    told = prompts(chunks=3)
    trained = Rollout(model, FEW, told, SEEDS).video(Trained([0, 2], gradient=0))
    for video, end in enumerate([0, 2]):
        with torch.no_grad():
            shorter = Rollout(model, replace(FEW, steps=FEW.steps[: end + 1]), told, SEEDS).video()
        torch.testing.assert_close(trained[video], shorter[video], rtol=1e-5, atol=1e-5)


def test_the_gradient_is_that_of_each_chunks_last_step_alone(model: VideoModel) -> None:
    """By hand: the chunk's own last pass on a past that is only numbers. What is cached carries none."""
    told = prompts(chunks=3)
    weight = model.transformer.blocks[0].ffn[0].weight
    video = Rollout(model, FEW, told, SEEDS).video(Trained([1, 3], gradient=3))
    target = torch.randn(video.shape, generator=torch.Generator().manual_seed(2))
    whole = torch.autograd.grad((video * target).sum(), weight)[0]
    by_chunk = torch.zeros_like(weight)
    for number in range(3):
        alone = Rollout(model, FEW, told, SEEDS).video(Trained([1, 3], gradient=3))[:, number]
        by_chunk += torch.autograd.grad((alone * target[:, number]).sum(), weight)[0]
    torch.testing.assert_close(whole, by_chunk, rtol=1e-4, atol=1e-5)

    def loss(number: int) -> float:
        with torch.no_grad():
            rolled = Rollout(model, FEW, told, SEEDS).video(Trained([0, 0], gradient=0))
        return float((rolled[:, number] * target[:, number]).sum())

    # With one step and one chunk nothing is cut off: the truncated gradient is the true slope.
    first = Rollout(model, FEW, told, SEEDS).video(Trained([0, 0], gradient=3))[:, 0]
    slope = torch.autograd.grad((first * target[:, 0]).sum(), weight)[0]
    nudge = slope / slope.norm()
    with torch.no_grad():
        weight += 1e-2 * nudge
        above = loss(0)
        weight -= 2e-2 * nudge
        below = loss(0)
        weight += 1e-2 * nudge
    assert (above - below) / 2e-2 == pytest.approx(float(slope.norm()), rel=1e-2)


def test_only_the_last_chunks_carry_a_gradient_where_others_are_not_judged(model: VideoModel) -> None:
    video = Rollout(model, FEW, prompts(chunks=4), SEEDS).video(Trained([1, 2], gradient=2))
    weight = model.transformer.patch_embedding.weight
    earlier = torch.autograd.grad(video[:, :2].sum(), weight, retain_graph=True, allow_unused=True)[0]
    later = torch.autograd.grad(video[:, 2:].sum(), weight)[0]
    assert earlier is None or not earlier.any()
    assert later.abs().sum() > 0


def test_the_past_is_what_the_refresh_pass_left(model: VideoModel) -> None:
    """Were the context pass discarded, its level would not matter."""
    told = prompts(chunks=2)
    with torch.no_grad():
        clean, marked = (
            Rollout(model, replace(FEW, context_noise=noise), told, SEEDS).video() for noise in (0.0, 400.0)
        )
    assert torch.equal(clean[:, 0], marked[:, 0])
    assert not torch.allclose(clean[:, 1], marked[:, 1], atol=1e-4)


def test_a_stream_that_is_rebuilt_is_not_trained(model: VideoModel) -> None:
    with pytest.raises(ConfigError, match="refresh 'rebuild' is inference's"):
        Rollout(model, replace(FEW, refresh="rebuild"), prompts(2), SEEDS)
