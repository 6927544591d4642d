"""`python -m bench.soak --json FILE`: does `sfrt serve` keep its memory and its deadlines while viewers come and go?

A server of the built-in model, in a process of its own, is watched over real WebSockets by several viewers at once.
They switch prompts, pause and rewind; the first of them leaves every minute or so and comes back. Beside them the
server's own figures are read every few seconds. There are two counts of what came in time: the server's is of chunks
made by their deadline, the viewers' of chunks whose last frame came before the picture would have stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import sys
import time
import urllib.request
from asyncio.subprocess import PIPE
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from math import inf
from pathlib import Path
from typing import Any

import numpy as np

from sfrt.benchmark.protocol import Figure, case_of, environment
from sfrt.bundle import Bundle, resolve_model
from sfrt.metrics import percentiles
from sfrt.server.client import Client
from sfrt.server.protocol import ChunkNews, Frame, Model, Pause, Prompt, Refused, Resume, Rewind, Rewound, Start
from sfrt.switching import How
from sfrt_train.data import plain, split_scenes
from sfrt_train.settings import Settings

FLAT = 0.5
"""MiB per minute: memory is flat where the line through it rises by no more."""
SETTLED_S = 180.0
"""What a server takes until then, or in the first half of a shorter run, is not counted.

Each kind of work leaves its own high-water mark: an engine by itself, switched and rewound, stops growing after some
700 chunks, which four viewers at 16 frames per second have seen by now.
"""
SAMPLE_S = 2.0

Range = tuple[float, float]
VISIT_S: Range = (45.0, 75.0)
"""How long the viewer who leaves has stayed."""
AWAY_S: Range = (1.0, 5.0)
BETWEEN_S: Range = (3.0, 8.0)
"""From one wish of a viewer to the next."""
PAUSE_S: Range = (0.5, 3.0)
WAYS: tuple[tuple[How, int], ...] = (("recache", 1), ("cross", 1), ("blend", 2))


class Playback:
    """A picture as its viewer sees it: a chunk is shown when it is there and the one before it has come to its end.

    Attributes: late_ms (of each chunk that the picture stood still for), awaited (how many it could have stood still
    for), shown_s.
    """

    def __init__(self) -> None:
        self.late_ms: list[float] = []
        self.awaited = 0
        self.shown_s = 0.0
        self._ends: float | None = None
        self._held_at = inf

    def begin(self) -> None:
        """What comes next is shown whenever it comes: after a start, or a rewind."""
        self._ends, self._held_at = None, inf

    def hold(self, now: float) -> None:
        """Let the picture stand still, until `go_on`."""
        self._held_at = now

    def go_on(self, now: float) -> None:
        if self._ends is not None:
            self._ends += now - self._held_at
        self._held_at = inf

    def show(self, seconds: float, now: float) -> None:
        """A chunk that lasts so long is there."""
        now = min(now, self._held_at)
        if self._ends is not None:
            self.awaited += 1
            if now > self._ends:
                self.late_ms.append((now - self._ends) * 1e3)
        self._ends = seconds + max(now, self._ends or now)
        self.shown_s += seconds

    @property
    def moved(self) -> float:
        """The part of the time in which the picture moved, of that in which it should have."""
        return self.shown_s / (self.shown_s + sum(self.late_ms) / 1e3) if self.shown_s else 0.0


@dataclass
class Log:
    """What one viewer wished for and got, over all its visits.

    made_in_time is a count, the server's; refusal is why it was last told to come back later.
    """

    playback: Playback = field(default_factory=Playback)
    counts: Counter[str] = field(default_factory=Counter)
    waiting: Counter[int] = field(default_factory=Counter)
    made_in_time: float = 0.0
    refusal: str | None = None
    chunk_ms: list[float] = field(default_factory=list)
    start_ms: list[float] = field(default_factory=list)
    switch_ms: list[float] = field(default_factory=list)

    def summary(self, model: Model) -> dict[str, Any]:
        played = self.playback
        return {
            **{
                name.replace(" ", "_"): self.counts[name]
                for name in ("visits", "not admitted", "switches", "pauses", "rewinds", "chunks", "frames")
            },
            "fps": {"asked": model.fps, "got": model.fps * played.moved},
            "deadline_ms": 1e3 * model.chunk_frames / model.fps,
            "chunk_ms": percentiles(self.chunk_ms),
            "made_in_time": self.made_in_time / self.counts["chunks"],
            "shown_in_time": 1 - len(played.late_ms) / max(1, played.awaited),
            "late_ms": played.late_ms,
            "dropped_frames": self.counts["dropped frames"],
            "chunks_by_queue": {str(waiting): count for waiting, count in sorted(self.waiting.items())},
            "start_ms": Figure("start_ms", tuple(self.start_ms)).as_json(),
            "switch_ms": Figure("switch_ms", tuple(self.switch_ms)).as_json() if self.switch_ms else None,
            "refusal": self.refusal,
        }


@dataclass
class Visit:
    """Where a viewer stands in its stream: the last chunk it was told of, and how much of it has come.

    switched is when it last asked for another prompt; None where that has been answered. furthest is the latest chunk
    it has been at: the server goes back from there by so many chunks and no more, in however many rewinds.
    """

    began: float
    news: ChunkNews | None = None
    chunks: int = 0
    frames: int = 0
    furthest: int = 0
    switched: float | None = None


class Viewer:
    """Watches one stream after the other, and wants something else of it every few seconds."""

    def __init__(self, url: str, number: int, *, leaves: bool) -> None:
        """leaves: now and then, and comes back; else it stays to the end."""
        self.log = Log()
        self._url = url
        self._leaves = leaves
        self._rng = np.random.default_rng((7, number))
        settings = Settings()
        _, self._scenes = split_scenes(settings.held_out, settings.seed)

    async def watch(self, seconds: float) -> Model:
        """Of so long. Raises ProtocolError or RuntimeError where the server will not have it so."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            async with Client.connect(self._url) as client:
                model = client.welcome.model
                self.log.counts["visits"] += 1
                await self._visit(client, min(left, self._any(VISIT_S)) if self._leaves else left)
            await asyncio.sleep(self._any(AWAY_S))
        if not self.log.start_ms:
            raise RuntimeError(f"one viewer saw nothing in {seconds:g} s ({self.log.refusal or 'too short'})")
        return model

    async def _visit(self, client: Client, seconds: float) -> None:
        self._at = visit = Visit(time.monotonic())
        self.log.playback.begin()
        await client.say(Start(self._scene(), seed=int(self._rng.integers(2**31))))
        tasks = {asyncio.ensure_future(work) for work in (self._listen(client), self._wish(client))}
        done, _ = await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # raises what went wrong
        if visit.news is not None:
            self.log.made_in_time += visit.news.attained * visit.chunks

    async def _listen(self, client: Client) -> None:
        async for message in client:
            if isinstance(message, Frame):
                self._see(message)
            elif isinstance(message, ChunkNews):
                self._hear(message)
            elif isinstance(message, Rewound):
                self.log.playback.begin()
            elif isinstance(message, Refused) and message.about == "stream" and self._at.news is None:
                self.log.counts["not admitted"] += 1
                self.log.refusal = message.message
                return
            elif isinstance(message, Refused):
                raise RuntimeError(f"the server refused: {message.message}")
        raise RuntimeError(f"the server hung up: {client.farewell}")

    def _hear(self, news: ChunkNews) -> None:
        """Its frames follow."""
        log, at = self.log, self._at
        log.counts["dropped frames"] += 0 if at.news is None else at.news.frames - at.frames
        log.counts["chunks"] += 1
        log.counts["switches"] += news.receipt is not None
        log.waiting[news.waiting] += 1
        log.chunk_ms.append(news.chunk_ms)
        at.news, at.frames, at.chunks = news, 0, at.chunks + 1
        at.furthest = max(at.furthest, news.index)

    def _see(self, frame: Frame) -> None:
        log, at, now = self.log, self._at, time.monotonic()
        assert at.news is not None and at.news.index == frame.chunk
        log.counts["frames"] += 1
        at.frames += 1
        if at.chunks == at.frames == 1:
            log.start_ms.append((now - at.began) * 1e3)
        if at.frames < at.news.frames:
            return
        log.playback.show(at.news.deadline_ms / 1e3, now)
        if at.news.receipt is not None and at.switched is not None:
            log.switch_ms.append((now - at.switched) * 1e3)
            at.switched = None

    async def _wish(self, client: Client) -> None:
        wishes = self._switch, self._switch, self._pause, self._rewind
        while True:
            await asyncio.sleep(self._any(BETWEEN_S))
            await wishes[int(self._rng.integers(len(wishes)))](client)

    async def _switch(self, client: Client) -> None:
        self._at.switched = time.monotonic()
        await client.say(Prompt(self._scene(), *WAYS[int(self._rng.integers(len(WAYS)))]))

    async def _pause(self, client: Client) -> None:
        self.log.counts["pauses"] += 1
        self.log.playback.hold(time.monotonic())
        await client.say(Pause())
        await asyncio.sleep(self._any(PAUSE_S))
        await client.say(Resume())
        self.log.playback.go_on(time.monotonic())

    async def _rewind(self, client: Client) -> None:
        if self._at.news is None:
            return
        last = self._at.news.index
        first = max(0, self._at.furthest + 3 - client.welcome.bounds.rewind_chunks)  # others are on their way meanwhile
        if first <= last:
            self.log.counts["rewinds"] += 1
            await client.say(Rewind(int(self._rng.integers(first, last + 1))))

    def _scene(self) -> str:
        return plain(self._scenes[int(self._rng.integers(len(self._scenes)))])

    def _any(self, among: Range) -> float:
        return float(self._rng.uniform(*among))


@dataclass(frozen=True)
class Sample:
    """The server's own figures at a moment."""

    seconds: float
    rss_mib: float
    chunks: float
    late: float
    load: float


class Watch:
    """Reads /metrics for as long as it runs."""

    def __init__(self, address: str) -> None:
        self.samples: list[Sample] = []
        self._address = address
        self._began = time.monotonic()

    async def run(self) -> None:
        while True:
            await self.look()
            await asyncio.sleep(SAMPLE_S)

    async def look(self) -> None:
        text = await asyncio.to_thread(self._read)
        told = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        names = ("process_resident_bytes", "chunks_total", "late_chunks_total", "load")
        rss, *rest = (float(told[f"sfrt_{name}"]) for name in names)
        self.samples.append(Sample(time.monotonic() - self._began, rss / 2**20, *rest))

    def _read(self) -> str:
        with urllib.request.urlopen(f"http://{self._address}/metrics", timeout=30) as answer:
            text: str = answer.read().decode()
            return text


def memory(samples: Sequence[Sample]) -> dict[str, Any]:
    """Whether it is flat, by a straight line through all that came after the server had settled."""
    settled_s = min(SETTLED_S, samples[-1].seconds / 2)
    settled = [sample for sample in samples if sample.seconds >= settled_s]
    slope, _ = np.polyfit([one.seconds / 60 for one in settled], [one.rss_mib for one in settled], 1)
    return {
        "flat": bool(slope <= FLAT),
        "mib_per_minute": float(slope),
        "flat_is_up_to": FLAT,
        "settled_s": settled_s,
        "largest_mib": max(one.rss_mib for one in samples),
        "seconds": [round(one.seconds, 1) for one in samples],
        "rss_mib": [round(one.rss_mib, 2) for one in samples],
    }


@asynccontextmanager
async def served(sessions: int, *options: str) -> AsyncIterator[str]:
    """host:port of an `sfrt serve` of the built-in model. Raises RuntimeError where it ends in any way but in order."""
    command = [sys.executable, "-m", "sfrt", "serve", "--port", "0", "--device", "cpu", "--sessions", str(sessions)]
    process = await asyncio.create_subprocess_exec(*command, *options, stderr=PIPE)
    assert process.stderr is not None
    try:
        line = (await process.stderr.readline()).decode()
        found = re.search(r"http://(\S+)/", line)
        if found is None:
            raise RuntimeError(f"sfrt serve did not begin: {line}{(await process.stderr.read()).decode()}")
        complaints = asyncio.ensure_future(process.stderr.read())
        yield found[1]
        process.terminate()
        said = (await complaints).decode()
        if await process.wait() or said:
            raise RuntimeError(f"sfrt serve ended with status {process.returncode}: {said}")
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def soak(address: str, seconds: float, sessions: int) -> dict[str, Any]:
    """So many viewers of the server there for so long. Raises where anything goes wrong at all."""
    viewers = [Viewer(f"ws://{address}/stream", number, leaves=number == 0) for number in range(sessions)]
    watch = Watch(address)
    watching = asyncio.ensure_future(watch.run())
    try:
        model, *_ = await asyncio.gather(*(viewer.watch(seconds) for viewer in viewers))
    finally:
        watching.cancel()
    await watch.look()
    last = watch.samples[-1]
    return {
        "minutes": seconds / 60,
        "sessions": [viewer.log.summary(model) for viewer in viewers],
        "server": {
            "chunks": last.chunks,
            "made_late": last.late,
            "made_in_time": 1 - last.late / last.chunks,
            "largest_load": max(sample.load for sample in watch.samples),
        },
        "memory": memory(watch.samples),
    }


async def serve_and_soak(seconds: float, sessions: int, *options: str) -> dict[str, Any]:
    """The same with a server of its own; options are those of `sfrt serve`."""
    async with served(sessions, *options) as address:
        return await soak(address, seconds, sessions)


def main() -> None:
    """Run, write the figures, and say whether memory was flat."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--fps", type=int, help="of each session (default: the model's own)")
    parser.add_argument("--backend", default="auto")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"environment": environment("cpu")}
    manifest = Bundle.open(resolve_model(), verify=False).manifest
    decoder = manifest.decoder.kind if manifest.decoder else None
    case = case_of("soak", manifest.name, manifest.stream, arguments.backend, "float32", "cpu", decoder)
    options = ["--backend", arguments.backend, *(["--fps", str(arguments.fps)] if arguments.fps else [])]
    report |= {
        "case": asdict(case),
        **asyncio.run(serve_and_soak(60 * arguments.minutes, arguments.sessions, *options)),
    }
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(told(report)))


def told(report: dict[str, Any]) -> list[str]:
    """What a person wants to know of it, line by line."""
    lines = [
        f"session {number}: {one['fps']['got']:.2f} of {one['fps']['asked']} FPS, a chunk in "
        f"{one['chunk_ms']['p50']:.0f} ms (p99 {one['chunk_ms']['p99']:.0f}) of {one['deadline_ms']:.0f}, "
        f"{one['chunks']} chunks, {one['shown_in_time']:.2%} shown in time, {one['dropped_frames']} frames dropped"
        for number, one in enumerate(report["sessions"], 1)
    ]
    server, held = report["server"], report["memory"]
    verdict = "flat" if held["flat"] else "NOT flat"
    return [
        *lines,
        f"server: {server['chunks']:.0f} chunks, {server['made_in_time']:.2%} made in time",
        f"memory: {verdict}, {held['mib_per_minute']:+.2f} MiB per minute after {held['settled_s']:.0f} s "
        f"(up to {held['flat_is_up_to']} is flat), {held['largest_mib']:.0f} MiB at most",
    ]


if __name__ == "__main__":
    main()
