"""A cache rebuilt from clean latents before every chunk: what is replayed, in which pieces, where, and as what."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sfrt import Chunk, ConfigError, Runtime, Session
from sfrt.backends import Rollout
from sfrt.capture import Eager
from sfrt.config import StreamConfig
from sfrt.ops.layout import tokens_from_latents
from sfrt.ring import ChunkPlan

PROMPT = "a red circle moving left"


@dataclass
class Watched(Eager):
    """A rollout, and what it was asked for: (ring frames, positions) placed, tokens refreshed, timesteps of flows."""

    rollout: Rollout
    asked: list[tuple[str, Any]] = field(default_factory=list)

    def set_text(self, embeds: Tensor) -> None:
        self.rollout.set_text(embeds)

    def place(self, plan: ChunkPlan) -> None:
        self.asked.append(("place", (list(plan.frames), list(plan.positions))))
        self.rollout.place(plan)

    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        self.asked.append(("flow", timestep))
        return self.rollout.flow(tokens, timestep)

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        self.asked.append(("refresh", (tokens, timestep)))
        self.rollout.refresh(tokens, timestep)

    def of(self, kind: str) -> list[Any]:
        return [what for name, what in self.asked if name == kind]


def watched(runtime: Runtime, stream: StreamConfig, **settings: Any) -> tuple[Session, Watched]:
    """A session that is watched from its first chunk on."""
    session = runtime.session(PROMPT, stream=stream, **settings)
    assert session._stage is not None
    rollout = Watched(session._stage.rollout)
    session._stage = session._context._stage = replace(session._stage, rollout=rollout)
    return session, rollout


def krea(runtime: Runtime, **settings: Any) -> StreamConfig:
    """Krea realtime's way, at this model's size."""
    settings = {"window": 6, "sink": 0, "positions": "window", "refresh": "reencode", **settings}
    return replace(runtime.stream, steps=(1000.0, 500.0), **settings)


def tokens_of(runtime: Runtime, chunks: list[Chunk]) -> list[Tensor]:
    """The clean tokens of every latent frame of these chunks."""
    latents = torch.cat([chunk.latents for chunk in chunks])
    return [tokens_from_latents(frame[None], runtime.manifest.model) for frame in latents]


def test_before_every_chunk_the_frames_in_view_alone_are_replayed(runtime: Runtime) -> None:
    session, rollout = watched(runtime, krea(runtime, refresh="rebuild"))
    chunks = list(itertools.islice(session, 4))
    clean = tokens_of(runtime, chunks)
    one_chunk = [([3, 4, 5], [3, 4, 5])]
    assert rollout.of("place") == [([0, 1, 2], [0, 1, 2])] + 3 * [([0, 1, 2], [0, 1, 2]), *one_chunk]
    refreshed = rollout.of("refresh")
    assert [timestep for _, timestep in refreshed] == [0.0] * 3, "and no other pass is run for the cache"
    for number, (tokens, _) in enumerate(refreshed):
        assert torch.equal(tokens, torch.cat(clean[3 * number : 3 * number + 3]))


def test_pieces_and_positions_of_what_is_replayed(runtime: Runtime) -> None:
    """A window of no whole chunks: odd frames first, sinks as they are; positions as the setting says."""
    stream = krea(runtime, window=8, sink=2, refresh="rebuild")
    session, rollout = watched(runtime, stream)
    list(itertools.islice(session, 4))
    assert rollout.of("place")[-3:] == [([0, 1], [0, 1]), ([2, 3, 4], [2, 3, 4]), ([5, 6, 7], [5, 6, 7])]
    session, rollout = watched(runtime, replace(stream, positions="absolute"))
    list(itertools.islice(session, 4))
    assert rollout.of("place")[-3:] == [([0, 1], [0, 1]), ([2, 3, 4], [6, 7, 8]), ([5, 6, 7], [9, 10, 11])]


def test_the_first_frame_in_view_is_encoded_anew_as_a_picture(runtime: Runtime) -> None:
    session, rollout = watched(runtime, krea(runtime))
    chunks = []
    for chunk in itertools.islice(session, 4):
        chunks.append(replace(chunk, frames=chunk.frames.copy()))
        chunk.frames[:] = 0  # a chunk is its owner's to change
    clean, (first, *later) = tokens_of(runtime, chunks), [tokens for tokens, _ in rollout.of("refresh")]
    assert torch.equal(first, torch.cat(clean[:3])), "the video's own first frame is a picture already"
    shown = np.concatenate([chunk.frames for chunk in chunks])
    assert runtime._decoder is not None
    for oldest, tokens in zip((3, 6), later, strict=True):
        picture = torch.from_numpy(shown[4 * oldest]).permute(2, 0, 1).float() / 255
        latents, _ = runtime._decoder.encode(picture[None, None])
        anew = tokens_from_latents(latents[0], runtime.manifest.model)
        assert torch.allclose(tokens, torch.cat([anew, *clean[oldest + 1 : oldest + 3]]), atol=1e-6)
        assert not torch.allclose(anew, clean[oldest], atol=1e-2)


def test_a_sink_is_never_encoded_anew(runtime: Runtime) -> None:
    session, rollout = watched(runtime, krea(runtime, sink=1))
    clean = tokens_of(runtime, list(itertools.islice(session, 4)))
    tokens, _ = rollout.of("refresh")[-1]
    assert torch.equal(tokens, torch.cat([clean[frame] for frame in (0, 7, 8)]))


@pytest.mark.parametrize("refresh", ["rebuild", "reencode"])
def test_a_clip_to_go_on_from_is_replayed_like_any_frames(runtime: Runtime, refresh: str) -> None:
    clip = torch.rand(17, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    stream = krea(runtime, refresh=refresh)
    session, rollout = watched(runtime, stream, initial=clip, limit=2)
    assert session.initial_frames is not None
    next(session)
    assert rollout.of("place") == [([0, 1, 2], [0, 1, 2]), ([3, 4, 5], [3, 4, 5])], "the last 3 of its 5 latent frames"
    assert runtime._decoder is not None
    whole, _ = runtime._decoder.encode(clip[None])
    kept, _ = rollout.of("refresh")[0]
    last_two = tokens_from_latents(whole[0, 3:], runtime.manifest.model)
    assert torch.allclose(kept[len(kept) // 3 :], last_two, atol=1e-6)


def test_a_window_of_one_chunk_has_nothing_to_replay(runtime: Runtime) -> None:
    session, rollout = watched(runtime, krea(runtime, window=3))
    assert len(list(itertools.islice(session, 3))) == 3 and rollout.of("refresh") == []


def test_rebuilding_is_refreshing_while_nothing_was_evicted(runtime: Runtime) -> None:
    """Each piece sees those before it: the very passes that left the cache as it was."""
    made = []
    for refresh in ("rolling", "rebuild"):
        with runtime.session(PROMPT, seed=2, stream=krea(runtime, window=9, refresh=refresh)) as session:
            made.append([chunk.latents for chunk in itertools.islice(session, 4)])
    for rolled, rebuilt in zip(made[0][:3], made[1][:3], strict=True):
        assert torch.allclose(rolled, rebuilt, atol=1e-5)
    assert not torch.allclose(made[0][3], made[1][3], atol=1e-3), "the fourth sees nothing of the first any more"


def failing(times: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, interrupted once, when it was made so many times."""
    calls = itertools.count()

    def made(*arguments: Any) -> Any:
        if next(calls) == times:
            raise KeyboardInterrupt
        return call(*arguments)

    return made


@pytest.mark.parametrize(("method", "after"), [("refresh", 1), ("flow", 3)])
def test_an_interrupted_rebuild_is_done_again(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, method: str, after: int
) -> None:
    stream = krea(runtime, window=9)
    with runtime.session(PROMPT, stream=stream) as session:
        expected = list(itertools.islice(session, 5))
    with runtime.session(PROMPT, stream=stream) as session:
        made = list(itertools.islice(session, 3))
        assert session._stage is not None
        rollout = session._stage.rollout
        monkeypatch.setattr(rollout, method, failing(after, getattr(rollout, method)))
        with pytest.raises(KeyboardInterrupt):
            list(itertools.islice(session, 2))
        made += list(itertools.islice(session, 5 - session._at.index))
        assert session._at.index == 5
    for chunk in made:
        assert torch.equal(chunk.latents, expected[chunk.index].latents)


def test_a_stream_keeps_no_more_than_it_may_see_again(runtime: Runtime) -> None:
    with runtime.session(PROMPT, stream=krea(runtime, window=8, sink=2)) as session:
        for _ in itertools.islice(session, 12):
            pass
        assert list(session._at.past) == [0, 1, 33, 34, 35]
    assert not session._at.past, "a closed one keeps nothing"


def test_encoding_anew_needs_a_decoder(runtime: Runtime) -> None:
    with runtime.session(PROMPT, stream=krea(runtime)) as session:
        stage = session._stage
    assert stage is not None
    with pytest.raises(ConfigError, match=r"has no decoder .* or choose refresh 'rebuild'"):
        Session(replace(stage, decoder=None), torch.zeros(12, 24))
