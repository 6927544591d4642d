"""The losses of Self Forcing against what they are by hand, and what their gradients lead to."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sfrt_train.clips import Clips, Prompts
from sfrt_train.judging import Dmd, Gan, Judging, Rolled, Sid, dmd_loss, judging_for, noised, sid_loss
from sfrt_train.model import VideoModel
from sfrt_train.settings import Loss, Settings
from tests.recipe import MICRO

CHUNKS = MICRO.clips.chunks
SHAPE = (4, CHUNKS, 48, MICRO.transformer.token_dim)


def rng(number: int = 0) -> np.random.Generator:
    return np.random.default_rng((98, number))


@pytest.fixture
def judge() -> VideoModel:
    torch.manual_seed(5)
    model = VideoModel(MICRO)
    torch.nn.init.normal_(model.transformer.head.linear.weight, std=0.1)
    return model.requires_grad_(False)


def rolled(given: bool = False) -> Rolled:
    torch.manual_seed(6)
    told = Prompts(torch.randint(3, 300, (4, 2, 24)), torch.zeros(4, CHUNKS, dtype=torch.int64))
    return Rolled(torch.randn(SHAPE).requires_grad_(), told, given)


def judging(loss: Loss, judge: VideoModel, settings: Settings = MICRO) -> Judging:
    own = replace(settings, self_forcing=replace(settings.self_forcing, loss=loss))
    clips = Clips(torch.randn(8, *SHAPE[1:]), Prompts(torch.randint(3, 300, (8, 2, 24)), torch.zeros(8, CHUNKS).long()))
    return judging_for(own, judge, lambda late: clips, "cpu")


def test_dmd_by_hand() -> None:
    """Two videos of two numbers: (fake - real) / mean |video - real|, over the four numbers there are."""
    video = torch.tensor([[1.0, 2.0], [0.0, 4.0]], requires_grad=True)
    real = torch.tensor([[0.0, 1.0], [2.0, 0.0]])  # |video - real|: means 1 and 3
    fake = torch.tensor([[0.5, 3.0], [-1.0, 3.0]])
    loss, apart = dmd_loss(video, real, fake)
    loss.backward()
    gradient = torch.tensor([[0.5 / 1, 2.0 / 1], [-3.0 / 3, 3.0 / 3]])
    torch.testing.assert_close(video.grad, gradient / 4)
    assert float(loss.detach()) == pytest.approx(0.5 * (0.25 + 4 + 1 + 1) / 4)
    assert float(apart) == pytest.approx((0.5 + 2 + 1 + 1) / 4)


def test_sid_by_hand() -> None:
    """One video of two numbers, of which the scores depend on the first: its gradient goes through them."""
    video = torch.tensor([[1.0, 2.0]], requires_grad=True)
    real, fake = 0.5 * video, torch.stack([video[:, 0] ** 2, torch.tensor([3.0])], dim=1)
    loss, _ = sid_loss(video, real, fake, alpha=1.0)
    # between = (-0.5, -2), real - video = (-0.5, -1), scale = 0.75
    assert float(loss.detach()) == pytest.approx((-0.5 * (-0.5 + 0.5) - 2 * (-1 + 2)) / 0.75 / 2)
    loss.backward()
    # b·(r - v - b) = b·(f - v): d/dv0 = (0.5 - 2·v0)·(f0 - v0) + b0·(2·v0 - 1), d/dv1 = 0.5·(3 - v1) - b1
    by_hand = torch.tensor([[-0.5 * 1.0, 0.5 * 1.0 + 2.0]]) / 0.75 / 2
    torch.testing.assert_close(video.grad, by_hand)


@pytest.mark.parametrize("loss", ["dmd", "sid"])
def test_descent_carries_one_distribution_to_the_other(loss: Loss) -> None:
    """Numbers drawn from N(m, 1), m trained, the real ones from N(3, 1): with the true scores of both, m becomes 3."""
    mean = torch.tensor(0.0, requires_grad=True)
    optimizer = torch.optim.Adam([mean], lr=0.1)
    torch.manual_seed(0)
    for _ in range(150):
        video = mean + torch.randn(256, 1)
        sigma = 0.05 + 0.9 * torch.rand(256, 1)
        at = torch.lerp(video, torch.randn(256, 1), sigma)

        def seen(middle: torch.Tensor, at: torch.Tensor = at, sigma: torch.Tensor = sigma) -> torch.Tensor:
            """E[video | at] where videos are N(middle, 1)."""
            gain = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)
            return middle + gain * (at - (1 - sigma) * middle)

        real, fake = seen(torch.tensor(3.0)), seen(mean.detach())
        value = dmd_loss(video, real, fake)[0] if loss == "dmd" else sid_loss(video, real, fake, 1.0)[0]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    assert float(mean.detach()) == pytest.approx(3, abs=0.3)


@pytest.mark.parametrize("loss", ["dmd", "sid", "gan"])
def test_the_generators_loss_reaches_the_video_and_no_score(loss: Loss, judge: VideoModel) -> None:
    by_name = judging(loss, judge)
    video = rolled(given=True)
    torch.manual_seed(1)
    for parameter in by_name.critic.parameters():  # apart from the judge, or all losses are at rest
        parameter.data += 0.02 * torch.randn_like(parameter)
    by_name.generator_losses(video, rng())["loss"].backward()
    gradient = video.video.grad
    assert gradient is not None and gradient.shape == SHAPE and gradient[:, 1:].abs().sum() > 0
    if loss == "dmd":
        assert not gradient[:, 0].any()  # a chunk that is given is not trained
    assert all(parameter.grad is None for parameter in (*by_name.critic.parameters(), *judge.parameters()))
    assert any(parameter.requires_grad for parameter in by_name.critic.parameters())  # thawed again


@pytest.mark.parametrize("loss", ["dmd", "sid", "gan"])
def test_the_critic_learns_from_the_generators_videos_and_leaves_them_alone(loss: Loss, judge: VideoModel) -> None:
    by_name, video = judging(loss, judge), rolled()
    before = copy.deepcopy(judge.state_dict())
    optimizer = torch.optim.Adam([p for p in by_name.critic.parameters() if p.requires_grad], lr=3e-3)
    values = []
    for number in range(12):
        value = by_name.critic_losses(video, rng(number % 3))["loss"]
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(float(value.detach()))
    assert sum(values[-3:]) < sum(values[:3])
    assert video.video.grad is None
    assert all(torch.equal(judge.state_dict()[key], value) for key, value in before.items())


def test_the_fake_score_is_no_part_of_the_generator(judge: VideoModel) -> None:
    kinds = {"dmd": Dmd, "sid": Sid, "gan": Gan}
    for name, kind in kinds.items():
        by_name = judging(name, judge)  # type: ignore[arg-type]
        assert isinstance(by_name, kind)
        own = {parameter.data_ptr() for parameter in judge.parameters()}
        assert own.isdisjoint(parameter.data_ptr() for parameter in by_name.critic.parameters())


def test_a_given_chunk_is_seen_as_it_is() -> None:
    video = rolled(given=True)
    at = noised(video, torch.tensor([0.2, 0.4, 0.6, 0.8]), torch.ones(SHAPE))
    assert torch.equal(at.tokens[:, 0], video.video[:, 0]) and not at.sigma[:, 0].any()
    torch.testing.assert_close(at.tokens[3, 1:], 0.2 * video.video[3, 1:] + 0.8)


def test_guidance_moves_the_real_score_away_from_the_unprompted_one(judge: VideoModel) -> None:
    own = replace(MICRO.self_forcing, guidance=3.0)
    plain, guided = (judging("dmd", judge, settings) for settings in (MICRO, replace(MICRO, self_forcing=own)))
    assert isinstance(plain, Dmd) and isinstance(guided, Dmd)
    video = rolled()
    at = noised(video, torch.full((4,), 0.5), torch.ones(SHAPE))
    nothing = Prompts(torch.zeros_like(video.prompts.ids), video.prompts.chunks)
    with torch.no_grad():
        conditional, unprompted = plain._real(at, video.prompts), plain._real(at, nothing)
        torch.testing.assert_close(guided._real(at, video.prompts), conditional + 3 * (conditional - unprompted))
    assert not torch.allclose(conditional, unprompted, atol=1e-4)
