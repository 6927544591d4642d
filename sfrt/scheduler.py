"""Several sessions on one device: whose chunk is made next, and who may come in.

Earliest deadline first at chunk granularity (Liu and Layland 1973; a chunk that has begun is never interrupted, so the
admission test counts its blocking as Baker 1991 does). No torch, no threads and no clock: times are seconds of whatever
clock the caller keeps, and go in as arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Generic, Literal, TypeVar, get_args

from sfrt.errors import AdmissionError, ConfigError

Policy = Literal["block", "drop"]
"""What a full queue does: "block" has its session wait until there is room, "drop" lets the oldest chunk go."""
Hold = Literal["paused", "not ready"]
"""Why a session is not run: its viewer's picture stands still by wish, or the next chunk cannot be made yet."""

_ROUNDING = 1e-9
"""Tenths add up to a little more than they should."""

T = TypeVar("T")


@dataclass(frozen=True)
class Demand:
    """What one session asks of the device: chunks of so many pixel frames at fps, each chunk_ms of work, and bytes."""

    fps: float
    frames: int
    chunk_ms: float
    memory: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.fps < inf:
            raise ConfigError(f"fps is {self.fps}; it must be positive and finite")

    @property
    def period_ms(self) -> float:
        """How long a chunk is shown."""
        return 1e3 * self.frames / self.fps

    @property
    def share(self) -> float:
        """The part of the device's time that it takes."""
        return self.chunk_ms / self.period_ms


def utilisation(demands: Iterable[Demand]) -> float:
    """The part of the device's time that these take together: the sum of chunk time over chunk period."""
    return sum((demand.share for demand in demands), 0.0)


def load(demands: Iterable[Demand]) -> float:
    """The part of the tightest stretch of time that is taken; up to 1, every deadline can be kept.

    For each period: the shares of all sessions with no longer one, and the longest chunk among the others, which may
    just have begun. With equal periods, and never below, it is the utilisation.
    """
    ordered = sorted(demands, key=lambda demand: demand.period_ms)
    fullest = 0.0
    for demand in ordered:
        urgent = utilisation(other for other in ordered if other.period_ms <= demand.period_ms)
        blocking = max((other.chunk_ms for other in ordered if other.period_ms > demand.period_ms), default=0.0)
        fullest = max(fullest, urgent + blocking / demand.period_ms)
    return fullest


class Averages:
    """Exponential averages of milliseconds, one for each kind of work."""

    def __init__(self, weight: float = 0.2) -> None:
        """weight is that of the newest sample."""
        self._weight = weight
        self._known: dict[Hashable, float] = {}

    def add(self, kind: Hashable, ms: float) -> float:
        """Count a sample; the average with it."""
        before = self._known.get(kind, ms)
        self._known[kind] = after = before + self._weight * (ms - before)
        return after

    def get(self, kind: Hashable) -> float | None:
        return self._known.get(kind)


@dataclass
class Tally:
    """Chunks that came by their deadline, chunks that came later, and chunks that nobody took in time."""

    met: int = 0
    late: int = 0
    dropped: int = 0

    def __add__(self, other: Tally) -> Tally:
        return Tally(self.met + other.met, self.late + other.late, self.dropped + other.dropped)

    @property
    def made(self) -> int:
        return self.met + self.late

    @property
    def attainment(self) -> float:
        """The part of the chunks that came by their deadline; 1 before there are any."""
        return self.met / self.made if self.made else 1.0


class Lane(Generic[T]):
    """One session as the scheduler sees it: when its viewer needs the next chunk, and the chunks not taken yet.

    The first chunk is due one period after the session came; it is shown as soon as it is there, and each chunk after
    it is due when those before it have been shown. A late one stops the picture, and what follows is due that much
    later. A chunk is begun at most `room` periods before it is due, so that a viewer who takes chunks at once does not
    get them faster than they are shown, however often it pauses.
    """

    def __init__(self, demand: Demand, now: float, *, room: int = 2, policy: Policy = "block") -> None:
        if room < 1:
            raise ConfigError(f"a queue of {room} holds nothing; give it room for at least one chunk")
        if policy not in get_args(Policy):
            raise ConfigError(f"policy cannot be {policy!r}; choose one of: {', '.join(get_args(Policy))}")
        self.demand = demand
        self.room = room
        self.policy = policy
        self.due = now + demand.period_ms / 1e3
        self.tally = Tally()
        self._queue: deque[tuple[T, int]] = deque()
        self._ends = now  # when all that was made has been shown
        self._held: dict[Hold, float] = {}  # since when

    def __len__(self) -> int:
        """How many chunks wait to be taken."""
        return len(self._queue)

    @property
    def begun(self) -> bool:
        """Whether a chunk has been made."""
        return self.tally.made > 0

    @property
    def opens(self) -> float:
        """From when on its next chunk may be made, if nothing else is in the way."""
        return self.due - self.room * self.demand.period_ms / 1e3

    @property
    def blocked(self) -> bool:
        """Whether it cannot be run, however late it is: held, or its queue full."""
        return bool(self._held) or (self.policy == "block" and len(self._queue) >= self.room)

    def held(self, why: Hold) -> bool:
        return why in self._held

    def hold(self, why: Hold, now: float) -> None:
        """Do not run it until this reason is released."""
        self._held.setdefault(why, now)

    def release(self, why: Hold, now: float) -> None:
        """Take a reason away. Time that it could not run in is not counted against it."""
        since = self._held.pop(why, None)
        if since is None:
            return
        if why == "paused":
            self._ends += now - since
        self.due = max(self._ends, now + self.demand.period_ms / 1e3)

    def put(self, chunk: T, frames: int, now: float) -> None:
        """A chunk of so many pixel frames is done."""
        if now <= self.due:
            self.tally.met += 1
        else:
            self.tally.late += 1
        self.due = self._ends = max(self._ends, now) + frames / self.demand.fps
        if len(self._queue) >= self.room:
            assert self.policy == "drop", "a session whose queue blocks is not run while it is full"
            self._queue.popleft()
            self.tally.dropped += 1
        self._queue.append((chunk, frames))

    def take(self, now: float) -> T | None:
        """The oldest chunk that waits; None where there is none.

        Its viewer is busy with it and with those that still wait for as long as they last: where a full queue had its
        session wait, that is what the next chunk is due by.
        """
        if not self._queue:
            return None
        chunk, frames = self._queue.popleft()
        if self.policy == "block":
            self._ends = max(self._ends, now + (frames + sum(count for _, count in self._queue)) / self.demand.fps)
            self.due = max(self.due, self._ends)
        return chunk

    def clear(self, now: float) -> None:
        """Let what waits go, and what is being shown: the next chunk is a first one again.

        It counts as neither taken nor dropped.
        """
        self._queue.clear()
        self._held = dict.fromkeys(self._held, now)
        self._ends = now
        self.due = now + self.demand.period_ms / 1e3


class Scheduler(Generic[T]):
    """Which of the lanes is run next, and what may be added to them."""

    def __init__(self, capacity: float = 0.9, most: int | None = None) -> None:
        """capacity is the load up to which sessions come in; the rest is for chunks that take longer than most.

        Above 1 it promises more than can be kept. most is how many sessions there may be at all.
        """
        if not capacity > 0:
            raise ConfigError(f"capacity is {capacity}; it must be above 0")
        self.capacity = capacity
        self.most = most
        self.lanes: list[Lane[T]] = []
        self._gone = Tally()

    @property
    def demands(self) -> list[Demand]:
        return [lane.demand for lane in self.lanes]

    @property
    def tally(self) -> Tally:
        """All chunks of all sessions, those that have left too."""
        return sum((lane.tally for lane in self.lanes), self._gone)

    def admit(self, demand: Demand, free: int | None = None) -> None:
        """Raise AdmissionError, with the numbers, where one more session with this demand has no place.

        free is the device's free memory in bytes, where it is known; sessions that have made no chunk yet are taken to
        be without their own.
        """
        count = len(self.lanes)
        if self.most is not None and count >= self.most:
            raise AdmissionError(f"{count} streams are all that may run here at once; try again when one has ended")
        coming = sum(lane.demand.memory for lane in self.lanes if not lane.begun)
        if free is not None and coming + demand.memory > free:
            raise AdmissionError(
                f"a stream needs {_gib(demand.memory)} and {_gib(max(0, free - coming))} are free on the device beside "
                f"the {count} that run; close one, or use a smaller resolution or window"
            )
        after = load([*self.demands, demand])
        if after > self.capacity + _ROUNDING:
            raise AdmissionError(
                f"the device holds {self.holds(demand)} such streams at {demand.fps:g} FPS, as a chunk of "
                f"{demand.frames} frames takes {demand.chunk_ms:.0f} ms: one more beside the {count} that run would "
                f"load it to {after:.0%}, above {self.capacity:.0%}; close one, or ask for fewer frames per second"
            )

    def holds(self, demand: Demand) -> int | None:
        """How many sessions with this demand the device's time is enough for; None where it sets no limit."""
        return int(self.capacity / demand.share + _ROUNDING) if demand.share and self.capacity < inf else None

    def add(self, lane: Lane[T]) -> None:
        self.lanes.append(lane)

    def remove(self, lane: Lane[T]) -> None:
        """Forget a lane, but not its tally. One that is not there is forgotten already."""
        if lane in self.lanes:
            self.lanes.remove(lane)
            self._gone += lane.tally

    def pick(self, now: float) -> Lane[T] | None:
        """The lane whose chunk is to be made now: of those that can be run, the one due first; None if there is none.

        A lane that waits keeps its deadline while that of each one run moves on, so none waits for ever.
        """
        ready = [lane for lane in self.lanes if not lane.blocked and lane.opens <= now]
        return min(ready, key=lambda lane: lane.due, default=None)

    def opens(self) -> float | None:
        """When the first lane can be run, if nothing happens until then; None where none will be."""
        return min((lane.opens for lane in self.lanes if not lane.blocked), default=None)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
