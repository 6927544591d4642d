"""Where a chunk is written in the key/value ring, what it sees, which frames those are, at which positions: integers.

Softmax over keys does not depend on their order, so a latent frame may lie in any slot. The first `sink` frames own the
first slots for good; the others share the rest in turn, so that a new frame overwrites exactly the one that leaves the
window (arXiv 2506.08009, section 3.5, without its moves: nothing is ever shifted or copied).

    slot   0 … sink-1    sink … window-1
           sink frames   frame f at sink + (f - sink) mod (window - sink)

Frames are numbered here from when the ring was last empty. That is their number in the video, until a ring is filled
anew with the frames that are in view and goes on from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from sfrt.config import Positions, RingDType, StreamConfig
from sfrt.errors import ConfigError


@dataclass(frozen=True)
class ChunkPlan:
    """One chunk's place: its latent frames, the slot of each, and how many slots hold visible frames.

    The visible slots are always the first ones: the ring fills from slot 0 on, and once full it stays full. positions
    are the frames' own on the frame axis; sink_shift is how far beyond the positions that they were written at the
    sinks are to be seen.
    """

    frames: range
    slots: tuple[int, ...]
    visible: int
    positions: Sequence[int]
    sink_shift: int


@dataclass(frozen=True)
class Ring:
    """A sink and a rolling region of slots, each one latent frame wide; the rest is as StreamConfig has it."""

    slots: int
    sink: int = 0
    positions: Positions = "absolute"
    dtype: RingDType = "model"

    def __post_init__(self) -> None:
        if not 0 <= self.sink < self.slots:
            raise ConfigError(
                f"a ring of {self.slots} slots cannot keep {self.sink} sink frames and roll; widen the window"
            )

    def slot(self, frame: int) -> int:
        """The slot of an absolute latent frame."""
        if frame < self.sink:
            return frame
        return self.sink + (frame - self.sink) % (self.slots - self.sink)

    def plan(self, start: int, count: int, video_frames: Sequence[int] | None = None) -> ChunkPlan:
        """The place of frames [start, start + count).

        video_frames are their numbers in the video, where those are others. Raises ConfigError where the chunk would
        overwrite itself.

        What attention depends on is how far a query and a key lie apart. Seen from their places in the window, frames
        beside each other in the rolling region stay so, and only the sinks come nearer: by one for each frame that
        has left from in between. So the chunk keeps its own numbers, and the sinks follow.
        """
        if count < 1 or count > self.slots - min(start, self.sink):
            raise ConfigError(
                f"a chunk of {count} frames does not fit a ring of {self.slots} slots with {self.sink} sinks"
            )
        frames = range(start, start + count)
        slots = tuple(map(self.slot, frames))
        visible = min(frames.stop, self.slots)
        if self.positions == "window":
            return ChunkPlan(frames, slots, visible, frames, sink_shift=frames.stop - visible)
        return ChunkPlan(frames, slots, visible, frames if video_frames is None else video_frames, sink_shift=0)

    def visible_frames(self, plan: ChunkPlan) -> list[int]:
        """The frames in the visible slots once the plan's chunk is written, by slot."""
        frames = [*self.context(plan.frames.start, len(plan.frames)), *plan.frames]
        return sorted(frames, key=self.slot)

    def context(self, start: int, count: int) -> list[int]:
        """The frames before `start` that a chunk of `count` frames from there on sees, in order."""
        rolling = self.slots - self.sink
        return [*range(min(self.sink, start)), *range(max(self.sink, start + count - rolling), start)]


def ring_for(config: StreamConfig, frames: int | None = None) -> Ring:
    """The smallest ring for a stream: its window, or all `frames` of a limited stream where those are fewer.

    Raises ConfigError for a stream without window and without limit.
    """
    if frames is not None and (config.window is None or frames <= config.window):
        # Nothing is ever evicted, so no sink is needed.
        return Ring(max(frames, config.chunk), dtype=config.ring_dtype)
    if config.window is None:
        raise ConfigError("a stream without a window keeps every frame; give it a limit, or a window to roll in")
    return Ring(config.window, config.sink, config.positions, config.ring_dtype)


@dataclass(frozen=True)
class ChunkSizes:
    """How many latent frames a stream's first chunk has, and all later ones."""

    first: int
    later: int

    def start(self, number: int) -> int:
        """The first frame of a chunk, counted from 0."""
        return 0 if number == 0 else self.first + (number - 1) * self.later

    def holding(self, frame: int) -> int:
        """The number of the chunk that holds a frame."""
        return 0 if frame < self.first else 1 + (frame - self.first) // self.later

    def pieces(self, frames: int) -> list[range]:
        """The first so many frames, by chunk; the last may be cut off."""
        starts = (0, *range(self.first, frames, self.later))
        return [range(start, end) for start, end in pairwise((*starts, frames))] if frames else []


def chunk_sizes(config: StreamConfig, initial: int = 0) -> ChunkSizes:
    """The chunks of a stream, those included that its `initial` given frames are taken in by, odd ones first."""
    first = (initial % config.chunk or config.chunk) if initial else config.first_chunk or config.chunk
    return ChunkSizes(first, config.chunk)


@dataclass(frozen=True)
class BlockPlan:
    """A chunk's place in a BlockRing: the slot of its first frame, and the slots that are visible."""

    slot: int
    visible: tuple[int, ...]


@dataclass(frozen=True)
class BlockRing:
    """A ring for writers that put a chunk in neighbouring slots with one write: it shows what `ring` shows.

    Every chunk has a block of slots to itself; a block is used again once nothing in it is visible. Where the window,
    the sink and the first chunk are whole chunks, the slots are those of `ring`. Elsewhere a block may hold frames that
    have left the window beside others that have not, so that what is visible has holes.

    Where the ring is filled anew with what is in view, that is taken in by other sizes if it is no whole chunks. These
    writers are exported graphs, which know one dtype: ConfigError for a ring of another.
    """

    ring: Ring
    sizes: ChunkSizes

    def __post_init__(self) -> None:
        if self.ring.dtype != "model":
            raise ConfigError(
                f"a ring in {self.ring.dtype} runs on the torch backend alone; choose backend 'torch', "
                "or leave ring_dtype at 'model'"
            )

    @property
    def has_holes(self) -> bool:
        """Whether what is visible may be something else than the first so many slots."""
        sizes = self.sizes
        return sizes.first < sizes.later or any(n % sizes.later for n in (self.ring.slots, self.ring.sink))

    @property
    def slots(self) -> int:
        """How many slots it takes, also when it is filled anew."""
        later = self.sizes.later
        anew = replace(self, sizes=ChunkSizes(self.ring.slots % later or later, later))
        return (max(self._sink_blocks, anew._sink_blocks) + self._rolling_blocks) * later

    @property
    def sinks(self) -> tuple[int, ...]:
        """The slots of the sink frames."""
        return tuple(map(self._slot, range(self.ring.sink)))

    @property
    def _sink_blocks(self) -> int:
        return self.sizes.holding(self.ring.sink - 1) + 1 if self.ring.sink else 0

    @property
    def _rolling_blocks(self) -> int:
        return -(-(self.ring.slots - self.ring.sink) // self.sizes.later)

    def plan(self, plan: ChunkPlan) -> BlockPlan:
        """The place here of a chunk that `ring` planned."""
        return BlockPlan(self._slot(plan.frames.start), tuple(map(self._slot, self.ring.visible_frames(plan))))

    def _slot(self, frame: int) -> int:
        number = self.sizes.holding(frame)
        block, sink_blocks = number, self._sink_blocks
        if number >= sink_blocks:
            block = sink_blocks + (number - sink_blocks) % self._rolling_blocks
        return block * self.sizes.later + frame - self.sizes.start(number)
