"""The ring's integers against a naive model: a list of frames from which the oldest non-sink ones are dropped."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfrt.config import StreamConfig
from sfrt.errors import ConfigError
from sfrt.ring import BlockRing, ChunkSizes, Ring, chunk_sizes, ring_for


@st.composite
def rollouts(draw: st.DrawFn) -> tuple[Ring, list[int]]:
    """A ring and the sizes of the chunks written to it, never larger than fits beside the sink."""
    sink = draw(st.integers(0, 5))
    largest = draw(st.integers(1, 5))
    slots = sink + largest + draw(st.integers(0, 9))
    sizes = draw(st.lists(st.integers(1, largest), min_size=1, max_size=30))
    return Ring(slots, sink), sizes


@given(rollouts())
def test_ring_holds_what_a_list_would(rollout: tuple[Ring, list[int]]) -> None:
    ring, sizes = rollout
    kept: list[int] = []
    in_slot: dict[int, int] = {}
    start = 0
    for size in sizes:
        plan = ring.plan(start, size)
        kept += range(start, start + size)
        while len(kept) > ring.slots:
            kept.pop(ring.sink)
        written = dict(zip(plan.slots, plan.frames, strict=True))
        assert sorted(written.values()) == list(range(start, start + size))
        in_slot.update(written)
        assert sorted(in_slot) == list(range(plan.visible)), "the visible slots are the first ones, without holes"
        assert [in_slot[slot] for slot in range(plan.visible)] == ring.visible_frames(plan)
        assert sorted(in_slot.values()) == kept
        start += size


@given(rollouts())
def test_no_live_frame_is_overwritten(rollout: tuple[Ring, list[int]]) -> None:
    ring, sizes = rollout
    start = 0
    for size in sizes:
        plan = ring.plan(start, size)
        slots = list(plan.slots)
        assert len(set(slots)) == size and max(slots) < ring.slots
        assert start < ring.sink or min(slots) >= ring.sink, "a sink slot is never written again"
        start += size


@pytest.mark.parametrize(("slots", "sink"), [(3, 3), (2, 5), (0, 0), (4, -1)])
def test_impossible_rings_are_refused(slots: int, sink: int) -> None:
    with pytest.raises(ConfigError, match="widen the window"):
        Ring(slots, sink)


def test_a_chunk_that_would_overwrite_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not fit"):
        Ring(6, 2).plan(10, 5)


def test_ring_size_follows_window_and_limit() -> None:
    rolling = StreamConfig(chunk=3, window=9, sink=3)
    assert ring_for(rolling) == Ring(9, 3)
    assert ring_for(rolling, 300) == Ring(9, 3)
    assert ring_for(rolling, 6) == Ring(6), "a short stream evicts nothing and needs no more than its own frames"
    assert ring_for(StreamConfig(window=None), 30) == Ring(30)
    with pytest.raises(ConfigError, match="limit"):
        ring_for(StreamConfig(window=None))


@st.composite
def block_rings(draw: st.DrawFn) -> BlockRing:
    later = draw(st.integers(1, 5))
    first = draw(st.integers(1, later))
    sink = draw(st.integers(0, 7))
    return BlockRing(Ring(sink + later + draw(st.integers(0, 9)), sink), ChunkSizes(first, later))


@given(block_rings(), st.integers(1, 30))
def test_blocks_show_what_the_ring_shows_with_one_write_a_chunk(blocks: BlockRing, chunks: int) -> None:
    ring, sizes = blocks.ring, blocks.sizes
    in_slot: dict[int, int] = {}
    for number in range(chunks):
        count = sizes.later if number else sizes.first
        plan = ring.plan(sizes.start(number), count)
        place = blocks.plan(plan)
        in_slot.update({place.slot + i: frame for i, frame in enumerate(plan.frames)})
        assert max(in_slot) < blocks.slots
        assert sorted(in_slot[slot] for slot in place.visible) == sorted(ring.visible_frames(plan))
        if not blocks.has_holes:
            assert sorted(place.visible) == list(range(plan.visible)), "the first slots"
            own = tuple(range(place.slot, place.slot + len(plan.frames)))
            assert plan.slots == own and blocks.slots == ring.slots


def test_chunk_sizes_of_a_stream() -> None:
    stream = StreamConfig(chunk=3, first_chunk=1)
    assert chunk_sizes(stream) == ChunkSizes(1, 3)
    assert chunk_sizes(stream, initial=6) == ChunkSizes(3, 3)
    assert chunk_sizes(stream, initial=7) == ChunkSizes(1, 3), "given frames are taken in with the odd ones first"
    sizes = ChunkSizes(2, 3)
    assert [sizes.holding(frame) for frame in range(9)] == [0, 0, 1, 1, 1, 2, 2, 2, 3]
    assert [sizes.start(number) for number in range(4)] == [0, 2, 5, 8]
