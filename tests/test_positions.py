"""Positions relative to the window: against a model that keeps keys without rotary phases and turns them when read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sfrt.backends import Backend, Grid, Rollout
from sfrt.cache import KVCache, SinkKeys
from sfrt.capture import Eager
from sfrt.config import ModelConfig, Positions, StreamConfig
from sfrt.ops.choice import torch_ops
from sfrt.ops.rolling_kv import QKV
from sfrt.ops.shift_keys import shift_keys
from sfrt.ring import BlockRing, ChunkPlan, ChunkSizes, Ring, chunk_sizes, ring_for
from sfrt.session import Session
from sfrt.stage import Stage, philox_noise
from sfrt.timesteps import timesteps_of
from sfrt.transformer import Transformer, rotary_phases

CPU = torch.device("cpu")
MODEL = ModelConfig(
    dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16, text_dim=24, text_len=8, latent_channels=4
)
GRID = Grid(2, 2)
STREAM = StreamConfig(steps=(1000.0, 500.0), height=32, width=32, positions="window")


@pytest.fixture(scope="module")
def model() -> Transformer:
    torch.manual_seed(0)
    model = Transformer(MODEL).requires_grad_(False)
    for weight in model.parameters():
        if weight.ndim > 1:  # lively enough for positions to matter
            torch.nn.init.normal_(weight, std=1.4 / weight[0].numel() ** 0.5)
    return model


def turned(x: Tensor, phases: Tensor) -> Tensor:
    """Neighbouring pairs of features of x, [L, H, d]."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * phases).flatten(-2)


class NaiveRollout(Eager):
    """Keys as they are made, in a list; phases are those of the places in that list, given anew at every read."""

    def __init__(self, model: Transformer, stream: StreamConfig) -> None:
        self.model, self.stream = model, stream
        self.in_view: list[int] = []
        self.position: dict[int, int] = {}
        self.kept: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def set_text(self, embeds: Tensor) -> None:
        self.text = self.model.text_kv(embeds)

    def place(self, plan: ChunkPlan) -> None:
        before = [] if plan.frames.start == 0 else [frame for frame in self.in_view if frame not in plan.frames]
        self.in_view, self.chunk = [*before, *plan.frames], plan.frames
        while self.stream.window is not None and len(self.in_view) > self.stream.window:
            self.in_view.pop(self.stream.sink)
        self.position.update(zip(plan.frames, plan.positions, strict=True))

    def flow(self, tokens: Tensor, timestep: float) -> Tensor:
        unturned = torch.ones(1, 1, 1, dtype=torch.complex64)
        flow: Tensor = self.model(
            tokens, self.model.modulation(torch.tensor(timestep)), unturned, self.text, self.attend
        )
        return flow

    def refresh(self, tokens: Tensor, timestep: float) -> None:
        self.flow(tokens, timestep)

    def attend(self, layer: int, qkv: QKV) -> Tensor:
        q, k, v = qkv.split()
        parts = zip(self.chunk, k.split(GRID.tokens), v.split(GRID.tokens), strict=True)
        self.kept.update({(layer, frame): (key, value) for frame, key, value in parts})
        seen = [self.kept[layer, frame] for frame in self.in_view]
        relative = self.stream.positions == "window"
        positions = range(len(seen)) if relative else [self.position[frame] for frame in self.in_view]
        phases = rotary_phases(MODEL, positions, GRID.rows, GRID.columns, CPU)
        keys = turned(torch.cat([key for key, _ in seen]), phases)
        queries = turned(q, phases[-len(q) :])
        scores = torch.einsum("qhd,khd->hqk", queries, keys) * q.shape[-1] ** -0.5
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), torch.cat([value for _, value in seen]))


@contextmanager
def running(backend: str, model: Transformer, device: torch.device = CPU) -> Iterator[Backend]:
    if backend == "onnx":
        pytest.importorskip("onnx_ir")
        pytest.importorskip("onnxruntime", minversion="1.25")
    from sfrt_export.parts_on import transformer_on

    with transformer_on(backend, MODEL, dict(model.state_dict()), device, torch.float32, StreamConfig()) as there:
        yield there


def session_of(stream: StreamConfig, rollout: Rollout, device: torch.device = CPU) -> Session:
    noise = philox_noise(3, GRID, MODEL, device)
    stage = Stage(MODEL, stream, GRID, device, rollout, ring_for(stream), noise, decoder=None)
    return Session(stage, torch.randn(MODEL.text_len, MODEL.text_dim, generator=torch.Generator().manual_seed(1)))


def rollout_of(there: Backend, stream: StreamConfig) -> Rollout:
    return there.rollout(GRID, ring_for(stream), chunk_sizes(stream), timesteps_of(stream))


def latents(session: Session, chunks: int, anew_before: int | None = None) -> list[Tensor]:
    """The latents of so many chunks; before one of them the cache is filled anew, where that is asked for."""
    made = []
    for number in range(chunks):
        if number == anew_before:
            session.refresh()
            with torch.no_grad():
                session._context._replay(session._at)
        made.append(next(session).latents)
    return made


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return max(float((one - other).norm() / other.norm()) for one, other in zip(ours, theirs, strict=True))


STREAMS = {
    "whole chunks": replace(STREAM, chunk=2, window=6, sink=2),
    "infinite forcing": replace(STREAM, chunk=3, window=6, sink=1),
    "odd window": replace(STREAM, chunk=3, window=8, sink=2),
    "short first chunk": replace(STREAM, chunk=3, first_chunk=1, window=8, sink=2),
    "no sinks": replace(STREAM, chunk=2, window=5),
    "rebuilt": replace(STREAM, chunk=3, window=6, sink=1, refresh="rebuild"),
    "rebuilt in odd pieces": replace(STREAM, chunk=3, first_chunk=2, window=8, sink=2, refresh="rebuild"),
    "rebuilt, absolute": replace(STREAM, chunk=3, window=8, sink=1, refresh="rebuild", positions="absolute"),
}


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_is_that_of_keys_turned_when_they_are_read(name: str, backend: str, model: Transformer) -> None:
    stream = STREAMS[name]
    expected = latents(session_of(stream, NaiveRollout(model, stream)), 7)
    with running(backend, model) as there:
        assert worst(latents(session_of(stream, rollout_of(there, stream)), 7), expected) <= 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("name", STREAMS)
def test_every_stream_on_the_gpu(name: str, model: Transformer) -> None:
    stream, there = STREAMS[name], torch.device("cuda")
    expected = latents(session_of(stream, NaiveRollout(model, stream)), 7)
    with running("torch", model, there) as backend:
        made = latents(session_of(stream, rollout_of(backend, stream), there), 7)
    assert worst([one.cpu() for one in made], expected) <= 1e-4


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("positions", ["absolute", "window"])
@pytest.mark.parametrize("sizes", [(3, 9, 3), (3, 8, 1)], ids=["whole chunks", "odd"])
def test_a_stream_goes_on_behind_a_cache_filled_anew(
    sizes: tuple[int, int, int], positions: Positions, backend: str, model: Transformer
) -> None:
    """As a recache does it: what is in view replayed, sinks too, and then the ring rolls on as ever."""
    chunk, window, sink = sizes
    stream = replace(STREAM, chunk=chunk, window=window, sink=sink, positions=positions)
    expected = latents(session_of(stream, NaiveRollout(model, stream)), 10, anew_before=5)
    with running(backend, model) as there:
        ours = latents(session_of(stream, rollout_of(there, stream)), 10, anew_before=5)
        untouched = latents(session_of(stream, rollout_of(there, stream)), 10)
    assert worst(ours, expected) <= 1e-5
    assert worst(ours[:5], untouched[:5]) <= 1e-6 and worst(ours, untouched) > 1e-3


def test_filling_the_cache_anew_with_all_there_was_changes_nothing(model: Transformer) -> None:
    stream = replace(STREAM, chunk=3, window=9, sink=1)
    with running("torch", model) as there:
        as_ever, anew = (latents(session_of(stream, rollout_of(there, stream)), 3, at) for at in (None, 2))
    assert worst(anew, as_ever) <= 1e-6


def test_positions_matter_once_a_sink_comes_nearer(model: Transformer) -> None:
    stream = replace(STREAM, chunk=3, window=6, sink=1)
    with running("torch", model) as there:
        near, far = (
            latents(session_of(one, rollout_of(there, one)), 4)
            for one in (stream, replace(stream, positions="absolute"))
        )
    assert worst(near[:2], far[:2]) == 0, "nothing has left the window"
    assert worst(near[2:], far[2:]) > 1e-3


def test_many_shifts_leave_no_trace(model: Transformer) -> None:
    """Frame by frame, 60 evictions: as exact at the end as at the beginning."""
    stream = replace(STREAM, chunk=1, window=4, sink=2, steps=(1000.0,))
    expected = latents(session_of(stream, NaiveRollout(model, stream)), 64)
    with running("torch", model) as there:
        assert worst(latents(session_of(stream, rollout_of(there, stream)), 64)[-4:], expected[-4:]) <= 1e-5


def test_a_chunk_made_twice_shifts_once(model: Transformer) -> None:
    stream = replace(STREAM, chunk=3, window=6, sink=1)
    with running("torch", model) as there:
        expected = latents(session_of(stream, rollout_of(there, stream)), 5)
        session = session_of(stream, rollout_of(there, stream))
        ours = latents(session, 3)
        session.refresh()
        session._context.place(range(9, 12))  # and then it was interrupted
        assert worst([*ours, *latents(session, 2)], expected) == 0


# Integers


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Ring, ChunkSizes, int]:
    later = draw(st.integers(1, 5))
    sizes = ChunkSizes(draw(st.integers(1, later)), later)
    sink = draw(st.integers(0, 5))
    return Ring(sink + later + draw(st.integers(0, 9)), sink, "window"), sizes, draw(st.integers(1, 40))


@given(rollouts())
def test_distances_are_those_of_places_in_the_window(rollout: tuple[Ring, ChunkSizes, int]) -> None:
    ring, sizes, chunks = rollout
    window: list[int] = []
    written_at: dict[int, int] = {}
    for number in range(chunks):
        plan = ring.plan(sizes.start(number), sizes.later if number else sizes.first)
        window += plan.frames
        while len(window) > ring.slots:
            window.pop(ring.sink)
        written_at.update(zip(plan.frames, plan.positions, strict=True))
        for query in plan.frames:
            for place, key in enumerate(window):
                position = written_at[key] + (plan.sink_shift if key < ring.sink else 0)
                assert plan.positions[query - plan.frames.start] - position == window.index(query) - place
                assert abs(written_at[query] - position) < ring.slots, "never farther than the window is long"
        assert ring.context(plan.frames.start, len(plan.frames)) == [f for f in window if f not in plan.frames]
        assert plan.sink_shift == 0 or plan.frames.start >= ring.sink, "a sink is written before it is shifted"


@given(rollouts(), st.integers(0, 30))
def test_absolute_positions_are_the_videos_own(rollout: tuple[Ring, ChunkSizes, int], left_out: int) -> None:
    ring, sizes, chunks = rollout
    ring = replace(ring, positions="absolute")
    start = sizes.start(chunks)
    frames = range(start + left_out, start + left_out + sizes.later)
    assert (ring.plan(start, sizes.later).positions, ring.plan(start, sizes.later).sink_shift) == (
        range(start, start + sizes.later),
        0,
    )
    assert ring.plan(start, sizes.later, frames) == replace(ring.plan(start, sizes.later), positions=frames)


@given(rollouts(), st.data())
def test_blocks_hold_a_ring_that_was_filled_anew(rollout: tuple[Ring, ChunkSizes, int], data: st.DataObject) -> None:
    """From any chunk on, what is in view taken in again by its own sizes: in the same slots, shown as the ring does."""
    ring, sizes, chunks = rollout
    blocks = BlockRing(ring, sizes)
    in_view = len(ring.context(sizes.start(chunks), sizes.later))
    later = sizes.later
    anew = replace(blocks, sizes=ChunkSizes(in_view % later or later, later) if in_view else ChunkSizes(later, later))
    in_slot: dict[int, int] = {}
    for frames in anew.sizes.pieces(in_view + data.draw(st.integers(1, 12)) * later):
        plan = ring.plan(frames.start, len(frames))
        place = anew.plan(plan)
        in_slot.update({place.slot + i: frame for i, frame in enumerate(frames)})
        assert max(in_slot) < blocks.slots, "there is room for it in the ring as it was made"
        assert sorted(in_slot[slot] for slot in place.visible) == sorted(ring.visible_frames(plan))
        if not blocks.has_holes:
            assert sorted(place.visible) == list(range(plan.visible))
        if plan.sink_shift:
            assert [in_slot[slot] for slot in anew.sinks] == list(range(ring.sink))


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 30))
def test_pieces_are_the_frames_in_order(first: int, more: int, frames: int) -> None:
    sizes = ChunkSizes(first, first + more)
    pieces = sizes.pieces(frames)
    assert list(itertools.chain(*pieces)) == list(range(frames)) and all(pieces)
    assert [piece.start for piece in pieces] == [sizes.start(number) for number in range(len(pieces))]


# Phases


@given(st.integers(0, 10**6), st.integers(-(10**6), 10**6))
def test_a_shift_is_what_other_positions_would_have_made(position: int, shift: int) -> None:
    position = max(position, -shift)
    key = torch.randn(GRID.tokens, MODEL.num_heads, MODEL.head_dim, generator=torch.Generator().manual_seed(0))
    here, there = (
        turned(key, rotary_phases(MODEL, range(at, at + 1), GRID.rows, GRID.columns, CPU))
        for at in (position, position + shift)
    )
    features = 2 * MODEL.rotary_pairs[0]
    assert torch.equal(here[..., features:], there[..., features:]), "the other axes know nothing of frames"
    moved = shift_keys(here[..., :features], shift, MODEL.rotary_base)
    assert torch.allclose(moved, there[..., :features], rtol=0, atol=2e-6)


@pytest.mark.parametrize("position", [1, 999_999, 10**6])
def test_phases_of_millions_of_frames_are_exact(position: int) -> None:
    model = ModelConfig()
    pairs = model.rotary_pairs[0]
    # An extended float64 of numpy: 11 more bits where the platform has them.
    angles = position * np.longdouble(model.rotary_base) ** (-np.arange(pairs, dtype=np.longdouble) / pairs)
    exact = torch.from_numpy(np.stack((np.cos(angles), np.sin(angles)), axis=-1).astype(np.float64))
    phases = torch.view_as_real(rotary_phases(model, range(position, position + 1), 1, 1, CPU)[0, 0, :pairs])
    assert (phases.double() - exact).abs().max() < 1e-6
    ones = torch.tensor([1.0, 0.0]).repeat(pairs)
    assert (shift_keys(ones, position, model.rotary_base).view(pairs, 2).double() - exact).abs().max() < 1e-6


def test_a_list_of_positions_is_as_good_as_a_range() -> None:
    assert torch.equal(rotary_phases(MODEL, [4, 5, 6], 2, 2, CPU), rotary_phases(MODEL, range(4, 7), 2, 2, CPU))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shifts_keep_dtype_and_length(dtype: torch.dtype) -> None:
    keys = torch.randn(3, 5, 8).to(dtype)
    moved = shift_keys(keys[:, 1:4], 7, 100.0)
    assert moved.dtype == dtype and moved.shape == (3, 3, 8)
    norms = moved.float().unflatten(-1, (4, 2)).norm(dim=-1), keys[:, 1:4].float().unflatten(-1, (4, 2)).norm(dim=-1)
    assert torch.allclose(*norms, atol=4 * torch.finfo(dtype).eps)


def test_a_cache_without_need_of_it_keeps_no_sinks_aside() -> None:
    for ring in (Ring(6, 1), Ring(6, 0, "window")):
        assert KVCache(MODEL, ring, 4, CPU, torch.float32, torch_ops())._sinks._written.numel() == 0
    keys = torch.zeros(2, 2, 24, MODEL.head_dim)
    assert SinkKeys(MODEL, Ring(6, 2, "window"), keys, 4)._written.shape == (2, 2, 2, 4, 2 * MODEL.rotary_pairs[0])
