"""Who runs next and who comes in, by a clock that only the tests move."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import count, pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfrt.errors import AdmissionError, ConfigError
from sfrt.scheduler import Averages, Demand, Lane, Policy, Scheduler, Tally, load, utilisation

SECOND = Demand(fps=12, frames=12, chunk_ms=100, memory=100)
"""A chunk a second, a tenth of a second's work."""

demands = st.builds(
    Demand,
    fps=st.sampled_from([4, 8, 16, 24]),
    frames=st.sampled_from([4, 12]),
    chunk_ms=st.integers(1, 400),
    memory=st.integers(0, 100),
)
policies = st.sampled_from(["block", "drop"])


def scheduler_of(*lanes: Lane[int], capacity: float = 0.9, most: int | None = None) -> Scheduler[int]:
    scheduler: Scheduler[int] = Scheduler(capacity, most)
    for lane in lanes:
        scheduler.add(lane)
    return scheduler


def run(scheduler: Scheduler[int], until: float, now: float = 0.0) -> list[tuple[float, Lane[int]]]:
    """Make chunks one after another, each in just its own time; viewers take them at once. When each one began."""
    began = []
    while now < until:
        lane = scheduler.pick(now)
        if lane is None:
            opens = scheduler.opens()
            if opens is None:
                break
            now = max(now, opens)
            continue
        began.append((now, lane))
        now += lane.demand.chunk_ms / 1e3
        lane.put(len(began), lane.demand.frames, now)
        lane.take(now)
    return began


# Deadlines


def test_a_chunk_is_due_when_those_before_it_have_been_shown() -> None:
    lane: Lane[int] = Lane(SECOND, now=10.0, room=3)
    assert lane.due == 11.0, "the first: a period after the session came"
    lane.put(0, 9, now=10.5)
    assert lane.due == 10.5 + 9 / 12, "shown from when it was there"
    lane.put(1, 12, now=11.0)
    assert lane.due == 10.5 + 21 / 12, "being early changes nothing"
    lane.put(2, 12, now=20.0)
    assert lane.due == 21.0, "a late one stops the picture, and what follows is due that much later"
    assert lane.tally == Tally(met=2, late=1) and lane.tally.attainment == 2 / 3


def test_a_viewer_who_takes_chunks_at_once_gets_them_at_the_frame_rate() -> None:
    lane: Lane[int] = Lane(SECOND, now=0.0, room=2)
    began = [time for time, _ in run(scheduler_of(lane), until=20.0)]
    ahead, steady = began[:3], began[3:]
    assert ahead[-1] < 0.5, "as many as there is room for, and the one being shown"
    assert all(later - earlier == pytest.approx(1.0) for earlier, later in pairwise(steady))
    assert lane.tally.late == 0


def test_the_earliest_deadline_is_first() -> None:
    slow, fast = Lane[int](replace(SECOND, fps=6), 0.0), Lane[int](SECOND, 0.0)
    scheduler = scheduler_of(slow, fast)
    assert scheduler.pick(0.0) is fast
    fast.put(0, 12, 0.1)
    assert fast.due == 1.1 and scheduler.pick(0.1) is fast
    fast.put(1, 12, 0.2)
    assert fast.due > slow.due and scheduler.pick(0.2) is slow


@given(st.lists(st.tuples(demands, st.integers(0, 50), policies), min_size=1, max_size=6), st.integers(0, 60))
def test_what_is_picked_is_due_first_of_all_that_could_run(
    given_lanes: list[tuple[Demand, int, Policy]], now: int
) -> None:
    lanes = [Lane[int](demand, float(came), policy=policy) for demand, came, policy in given_lanes]
    picked = scheduler_of(*lanes).pick(float(now))
    able = [lane for lane in lanes if not lane.blocked and lane.opens <= now]
    assert (picked is None) == (not able)
    assert picked is None or picked.due == min(lane.due for lane in able)


@given(st.lists(demands, min_size=1, max_size=6), st.data())
def test_nobody_is_late_whom_the_load_allows_for(wanted: list[Demand], data: st.DataObject) -> None:
    """Sessions that come at any time, each let in only where there is a place."""
    scheduler: Scheduler[int] = Scheduler(capacity=1.0)
    now = 0.0
    for demand in wanted:
        try:
            scheduler.admit(demand)
        except AdmissionError:
            continue
        scheduler.add(Lane(demand, now, room=data.draw(st.integers(1, 3))))
        until = now + data.draw(st.integers(1, 3000)) / 1e3
        now = max([until, *(time + lane.demand.chunk_ms / 1e3 for time, lane in run(scheduler, until, now)[-1:])])
    run(scheduler, now + 20.0, now)
    late = {lane.demand: lane.due for lane in scheduler.lanes if lane.tally.late}
    assert not late


@given(st.lists(demands, min_size=2, max_size=6))
def test_nobody_starves_however_much_is_asked_for(wanted: list[Demand]) -> None:
    """All at once, let in by nobody: between two chunks of one session, others get at most their own rate's worth."""
    lanes = [Lane[int](replace(demand, chunk_ms=demand.chunk_ms * 10), 0.0) for demand in wanted]
    made = Counter(lane for _, lane in run(scheduler_of(*lanes), until=120.0))
    assert all(made[lane] >= 2 for lane in lanes)
    same = [lane for lane in lanes if lane.demand.period_ms == lanes[0].demand.period_ms]
    if utilisation(lane.demand for lane in lanes) > 2:
        assert max(made[lane] for lane in same) - min(made[lane] for lane in same) <= 2, "equal rates, equal parts"


# Queues


@given(policies, st.integers(1, 4), st.lists(st.sampled_from(["run", "take", "wait"]), max_size=60))
def test_a_full_queue_never_grows(policy: Policy, room: int, acts: list[str]) -> None:
    """Whatever the viewer does: chunks come in order, what is dropped is the oldest, and all are accounted for."""
    lane: Lane[int] = Lane(SECOND, 0.0, room=room, policy=policy)
    scheduler, numbers, now = scheduler_of(lane), count(), 0.0
    waiting: list[int] = []
    taken = 0
    for act in acts:
        now += 0.3
        if act == "take":
            taken += bool(waiting)
            assert lane.take(now) == (waiting.pop(0) if waiting else None)
        elif act == "run" and scheduler.pick(now) is lane:
            assert policy == "drop" or len(waiting) < room, "a session that blocks is not run"
            lane.put(number := next(numbers), 12, now)
            waiting = [*waiting, number][-room:]
        assert len(lane) == len(waiting) <= room
    assert lane.tally.made == taken + lane.tally.dropped + len(lane)
    assert policy == "drop" or lane.tally.dropped == 0


def test_dropping_keeps_the_newest() -> None:
    lane: Lane[int] = Lane(SECOND, 0.0, room=2, policy="drop")
    for number in range(5):
        lane.put(number, 12, float(number))
    assert lane.tally.dropped == 3
    assert [lane.take(5.0), lane.take(5.0), lane.take(5.0)] == [3, 4, None]


def test_a_viewer_who_stays_away_makes_nobody_late() -> None:
    lane: Lane[int] = Lane(SECOND, 0.0, room=2)
    scheduler = scheduler_of(lane)
    lane.put(0, 12, 0.1)
    lane.put(1, 12, 0.2)
    assert scheduler.pick(0.3) is None and scheduler.opens() is None, "only the viewer can end this"
    assert lane.take(60.0) == 0
    assert lane.due == 62.0, "busy with the one taken, then with the one that waits"
    assert scheduler.pick(60.0) is lane
    lane.put(2, 12, 60.1)
    assert lane.tally == Tally(met=3)


def test_a_pause_makes_nobody_late() -> None:
    lane: Lane[int] = Lane(SECOND, 0.0)
    scheduler = scheduler_of(lane)
    lane.put(0, 12, 0.1)
    lane.hold("paused", 0.2)
    lane.hold("not ready", 0.3)
    assert scheduler.pick(5.0) is None
    lane.release("paused", 50.0)
    assert scheduler.pick(50.0) is None, "there is another reason"
    lane.release("not ready", 60.0)
    assert scheduler.pick(60.0) is lane and lane.due == 61.0
    lane.release("paused", 99.0)
    assert lane.due == 61.0, "what was not held cannot be released"


@given(st.lists(st.tuples(st.floats(0, 3), st.floats(0, 3)), max_size=20), st.integers(1, 3))
def test_a_viewer_who_pauses_all_the_time_gets_no_further_ahead(pauses: list[tuple[float, float]], room: int) -> None:
    """What it has of video that it has not shown yet: no more than one who never pauses."""
    lane: Lane[int] = Lane(SECOND, 0.0, room=room)
    scheduler, now, unpaused = scheduler_of(lane), 0.0, 0.0
    for playing, paused in pauses:
        played = run(scheduler, now + playing, now)
        now = max(now + playing, *(time + 0.1 for time, _ in played)) if played else now + playing
        lane.hold("paused", now)
        assert scheduler.pick(now + paused) is None
        unpaused += paused
        now += paused
        lane.release("paused", now)
    assert lane.tally.made <= now - unpaused + room + 1
    assert lane.tally.late == 0


def test_a_source_that_was_not_ready_stops_the_picture() -> None:
    lane: Lane[int] = Lane(SECOND, 0.0, room=1)
    lane.put(0, 12, 0.1)
    lane.take(0.1)
    lane.hold("not ready", 0.2)
    lane.release("not ready", 60.0)
    assert lane.due == 61.0, "time enough to make it"
    lane.put(1, 12, 60.3)
    assert lane.due == 61.3, "shown as soon as it was there"


def test_after_a_rewind_the_picture_begins_anew() -> None:
    lane: Lane[int] = Lane(SECOND, 0.0, room=2)
    lane.put(0, 12, 0.1)
    lane.put(1, 12, 0.2)
    lane.take(0.2)
    lane.clear(0.3)
    assert (len(lane), lane.due) == (0, 1.3)
    assert scheduler_of(lane).pick(0.3) is lane, "at once"
    lane.put(2, 12, 0.4)
    assert lane.due == 1.4, "shown as soon as it was there"


def test_a_rewind_in_a_pause_does_not_count_the_pause_twice() -> None:
    lane: Lane[int] = Lane(SECOND, 0.0, room=1)
    lane.put(0, 12, 0.1)
    lane.hold("paused", 0.2)
    lane.clear(30.0)
    lane.release("paused", 40.0)
    lane.put(1, 12, 40.1)
    assert lane.due == 41.1


# Admission


def test_utilisation_is_chunk_time_over_chunk_period() -> None:
    three = [SECOND, replace(SECOND, fps=24), replace(SECOND, frames=24, chunk_ms=500)]
    assert utilisation(three) == pytest.approx(0.1 + 0.2 + 0.25)
    assert load([SECOND] * 4) == pytest.approx(0.4), "with equal periods there is nothing else"
    assert load(three) == pytest.approx(max(0.2 + 1.0, 0.3 + 0.5, 0.55)), "half a second's work, for one due every half"


@given(st.lists(demands, max_size=8), demands)
def test_load_grows_with_every_session(present: list[Demand], one: Demand) -> None:
    assert load([*present, one]) >= load(present) - 1e-9
    assert load(present) >= utilisation(present) - 1e-9


@given(st.lists(demands, max_size=12), st.floats(0.1, 1.0), st.integers(0, 500), st.integers(1, 8))
def test_admission_never_exceeds_what_there_is(wanted: list[Demand], capacity: float, free: int, most: int) -> None:
    scheduler = scheduler_of(capacity=capacity, most=most)
    for demand in wanted:
        before = list(scheduler.demands)
        fits = (
            load([*before, demand]) <= capacity + 1e-9
            and sum(one.memory for one in [*before, demand]) <= free
            and len(before) < most
        )
        try:
            scheduler.admit(demand, free)
        except AdmissionError:
            assert not fits, "refused without a reason"
            with pytest.raises(AdmissionError):  # one that asks for more is refused too
                scheduler.admit(replace(demand, chunk_ms=demand.chunk_ms * 2, memory=demand.memory + 1), free)
        else:
            assert fits
            scheduler.add(Lane(demand, 0.0))
    assert utilisation(scheduler.demands) <= load(scheduler.demands) + 1e-9 <= capacity + 2e-9


def test_refusals_say_why_with_the_numbers() -> None:
    scheduler = scheduler_of(*[Lane[int](SECOND, 0.0) for _ in range(3)], capacity=0.35)
    with pytest.raises(AdmissionError, match=r"holds 3 such streams at 12 FPS.*12 frames takes 100 ms.*the 3 .* 40%"):
        scheduler.admit(SECOND)
    scheduler.admit(replace(SECOND, chunk_ms=50))
    huge = replace(SECOND, chunk_ms=1, memory=3 << 30)
    with pytest.raises(AdmissionError, match=r"needs 3\.00 GiB and 2\.00 GiB are free"):
        scheduler.admit(huge, free=(2 << 30) + 300)
    with pytest.raises(AdmissionError, match="3 streams are all"):
        scheduler_of(*scheduler.lanes, most=3).admit(SECOND)


def test_memory_is_counted_once_a_session_has_taken_it() -> None:
    lane: Lane[int] = Lane(SECOND, 0.0)
    scheduler = scheduler_of(lane)
    with pytest.raises(AdmissionError, match="GiB"):
        scheduler.admit(SECOND, free=150)
    lane.put(0, 12, 0.1)  # what it takes is no longer free
    scheduler.admit(SECOND, free=150)


def test_how_many_the_device_holds() -> None:
    scheduler = scheduler_of(capacity=0.9)
    for share in (20, 90, 300, 450, 451, 901):
        demand = replace(SECOND, chunk_ms=share)
        holds = scheduler.holds(demand)
        assert holds is not None and load([demand] * holds) <= 0.9 + 1e-9 < load([demand] * (holds + 1)) + 1e-6
    assert scheduler.holds(replace(SECOND, chunk_ms=0)) is scheduler_of(capacity=inf).holds(SECOND) is None


@pytest.mark.parametrize(
    "make",
    [
        lambda: Demand(fps=0, frames=12, chunk_ms=1),
        lambda: Demand(fps=float("nan"), frames=12, chunk_ms=1),
        lambda: Lane(SECOND, 0.0, room=0),
        lambda: Lane(SECOND, 0.0, policy="wait"),  # type: ignore[arg-type]
        lambda: Scheduler(capacity=0),
        lambda: Scheduler(capacity=float("nan")),
    ],
)
def test_settings_are_checked(make: object) -> None:
    with pytest.raises(ConfigError):
        make()  # type: ignore[operator]


# Counting


@given(st.lists(demands, min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_attainment_adds_up(wanted: list[Demand], chance: random.Random) -> None:
    """Over all sessions, those that have left too."""
    scheduler: Scheduler[int] = scheduler_of(*[Lane[int](demand, 0.0, room=2, policy="drop") for demand in wanted])
    lanes, now, made = list(scheduler.lanes), 0.0, 0
    for _ in range(40):
        now += chance.random()
        lane = scheduler.pick(now)
        if lane is not None:
            lane.put(0, 12, now + chance.random())
            made += 1
        if chance.random() < 0.1 and scheduler.lanes:
            scheduler.remove(chance.choice(scheduler.lanes))
    total = scheduler.tally
    assert total.met + total.late == total.made == made
    assert total == sum((lane.tally for lane in lanes), Tally())
    assert 0 <= total.attainment <= 1
    scheduler.remove(lanes[0])
    scheduler.remove(lanes[0])
    assert scheduler.tally == total, "forgotten twice, counted once"


@given(st.lists(st.floats(1, 1000), min_size=1), st.floats(0.05, 1))
def test_an_average_stays_among_its_samples(samples: list[float], weight: float) -> None:
    averages = Averages(weight)
    assert averages.get("kind") is None
    for number, sample in enumerate(samples):
        now = averages.add("kind", sample)
        assert min(samples[: number + 1]) - 1e-6 <= now <= max(samples[: number + 1]) + 1e-6
        assert averages.get("kind") == now and averages.get("other") is None
    for _ in range(400):
        averages.add("kind", 5.0)
    assert averages.get("kind") == pytest.approx(5.0, rel=1e-3)
