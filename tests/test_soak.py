"""The soak's own arithmetic, and a short one of a real server."""

from __future__ import annotations

import asyncio

import pytest

import bench.soak
from bench.soak import SETTLED_S, Playback, Sample, memory, soak, told
from tests.servers import Running


def samples(*rss_mib: float) -> list[Sample]:
    """One every ten seconds."""
    return [Sample(10.0 * number, mib, 0, 0, 0) for number, mib in enumerate(rss_mib)]


def test_a_chunk_is_late_where_the_picture_has_stopped() -> None:
    played = Playback()
    played.begin()
    played.show(1.0, now=5.0)  # to 6
    played.show(1.0, now=5.5)  # to 7
    played.show(1.0, now=7.25)  # to 8.25
    played.show(1.0, now=8.25)
    assert (played.awaited, played.late_ms, played.shown_s) == (3, [250.0], 4.0)
    assert played.moved == 4 / 4.25


def test_a_pause_is_not_waited_through_and_a_rewind_begins_anew() -> None:
    played = Playback()
    played.show(1.0, now=0.0)  # to 1
    played.hold(now=0.75)
    played.show(1.0, now=5.0)  # it was on its way; there are 1.25 s to show
    played.go_on(now=10.0)  # to 11.25
    played.show(1.0, now=11.5)
    assert played.late_ms == [250.0]
    played.begin()
    played.show(1.0, now=99.0)
    assert (played.awaited, played.late_ms) == (2, [250.0])


@pytest.mark.parametrize(("per_minute", "flat"), [(0.0, True), (0.4, True), (0.6, False), (-3.0, True)])
def test_memory_is_flat_or_it_is_not(per_minute: float, flat: bool) -> None:
    """Whatever it does before it has settled."""
    settled = [400.0 + per_minute * number / 6 for number in range(6, 61)]
    found = memory(samples(*range(300, 306), *settled))
    assert (found["flat"], found["settled_s"]) == (flat, SETTLED_S)
    assert found["mib_per_minute"] == pytest.approx(per_minute, abs=1e-6)
    assert found["largest_mib"] == max(settled)


def test_of_a_short_run_the_second_half_counts() -> None:
    found = memory(samples(1, 2, 5, 5, 5))
    assert found["flat"] and found["settled_s"] == 20.0


def test_viewers_watch_and_wish_and_one_comes_back(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, range_s in {"VISIT_S": (1.5, 1.6), "AWAY_S": (0.1, 0.2), "BETWEEN_S": (0.4, 0.7)}.items():
        monkeypatch.setattr(bench.soak, name, range_s)
    monkeypatch.setattr(bench.soak, "PAUSE_S", (0.1, 0.2))
    monkeypatch.setattr(bench.soak, "SAMPLE_S", 0.1)
    running.service.engine.measure(history=running.service.limits.history)  # as `sfrt serve` does before it opens
    report = asyncio.run(soak(running.host, seconds=3.5, sessions=2))
    leaver, stayer = report["sessions"]
    assert (leaver["visits"] > 1, stayer["visits"]) == (True, 1)
    for one in report["sessions"]:
        assert one["fps"]["asked"] == 32 and 0 < one["fps"]["got"] <= 32
        assert one["deadline_ms"] == 375 and 0 < one["chunk_ms"]["p50"] <= one["chunk_ms"]["p99"]
        assert 0 <= one["shown_in_time"] <= 1 and 0 <= one["made_in_time"] <= 1
        assert one["dropped_frames"] == one["not_admitted"] == 0 < one["frames"]
        assert sum(one["chunks_by_queue"].values()) == one["chunks"] > 3
        assert one["switches"] + one["pauses"] + one["rewinds"] > 0
    assert report["server"]["chunks"] >= sum(one["chunks"] for one in report["sessions"]) - 2
    assert len(report["memory"]["rss_mib"]) == len(report["memory"]["seconds"]) > 5
    assert len(told(report)) == 4
