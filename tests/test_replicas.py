"""`sfrt serve --ray`: what Ray is asked for, and two replicas of the built-in model on a cluster of this machine."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from sfrt.errors import ConfigError, ProtocolError
from sfrt.server.limits import Limits
from sfrt.server.protocol import Bye, ChunkNews, Frame, Prompt, Record, Recording
from sfrt.server.serving import Address, ModelChoice
from sfrt.server.telemetry import Telemetry, told_apart
from tests.command_line import Run
from tests.servers import BLUE, RED, WAIT_S, Listener, Site, finish
from tests.waiting import wait_until

START_S = 180.0
"""For a busy machine: the cluster, its proxy and two replicas take 10 s of two idle cores."""


def test_figures_are_told_apart() -> None:
    one, other = Telemetry(), Telemetry()
    one.chunks.inc(3)
    one.switches.labels("recache").inc()
    other.chunks.inc(5)
    text = told_apart("replica", [("a", one.figures()), ("b", other.figures())]).decode()
    assert text.count("# TYPE sfrt_chunks_total counter") == 1
    assert 'sfrt_chunks_total{replica="a"} 3.0' in text
    assert 'sfrt_chunks_total{replica="b"} 5.0' in text
    assert 'sfrt_prompt_switches_total{how="recache",replica="a"} 1.0' in text
    assert {family.type for family in text_string_to_metric_families(text)} == {"gauge", "counter", "histogram"}


# The command line


def test_without_ray_it_is_told_how_to_get_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "sfrt.server.replicas", raising=False)
    assert run("serve", "--ray").complaint == "serving needs ray; install it with: pip install 'sfrt[ray]'"


def test_replicas_are_for_ray(run: Run) -> None:
    assert run("serve", "--replicas", "2").complaint.startswith("--replicas is for --ray")


def test_serving_alone_does_not_import_ray() -> None:
    source = "import sys, sfrt.cli.serving, sfrt.server.serving; print('ray' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "False", done.stderr


# What Ray is asked for


@pytest.mark.parametrize(
    ("device", "replicas", "cluster", "asked"),
    [
        ("auto", None, {"CPU": 64.0, "GPU": 4.0}, (4, {"num_cpus": 0, "num_gpus": 1})),
        ("cuda", 2, {"CPU": 64.0, "GPU": 4.0}, (2, {"num_cpus": 0, "num_gpus": 1})),
        ("cpu", 3, {"CPU": 64.0, "GPU": 4.0}, (3, {"num_cpus": 1, "num_gpus": 0})),
        ("auto", None, {"CPU": 2.0}, (1, {"num_cpus": 1, "num_gpus": 0})),
    ],
)
def test_each_replica_has_a_gpu_where_there_are_some(
    device: str, replicas: int | None, cluster: dict[str, float], asked: tuple[int, dict[str, int]]
) -> None:
    pytest.importorskip("ray.serve", reason="Ray is not installed")
    from sfrt.server.replicas import deployment_of

    deployment = deployment_of(fleet(device, replicas), cluster)
    assert (deployment.num_replicas, deployment.ray_actor_options) == asked
    assert deployment.max_ongoing_requests > Limits().sessions, "the page gets through when all places are taken"


@pytest.mark.parametrize(
    ("device", "replicas", "complaint"),
    [
        ("cuda", None, "GPUs for 0 replicas, not for 1"),
        ("cpu", 3, "CPU cores for 2 replicas, not for 3"),
        ("cuda:1", None, "--device is cuda, not cuda:1"),
    ],
)
def test_what_the_cluster_cannot_run_is_refused(device: str, replicas: int | None, complaint: str) -> None:
    pytest.importorskip("ray.serve", reason="Ray is not installed")
    from sfrt.server.replicas import deployment_of

    with pytest.raises(ConfigError, match=complaint):
        deployment_of(fleet(device, replicas), {"CPU": 2.0})


def fleet(device: str, replicas: int | None) -> Any:
    from sfrt.server.replicas import Fleet

    return Fleet(ModelChoice(device=device), Address(), replicas)


# A cluster


@dataclass(frozen=True)
class Cluster(Site):
    """The command on two replicas with a place each, and all processes that came of it."""

    process: subprocess.Popen[str]
    folder: Path

    def figure(self, name: str) -> dict[str, float]:
        """Of every replica that answers."""
        status, text = self.get("metrics")
        assert status == 200
        found = re.findall(rf'^{name}{{replica="(\w+)"}} (\S+)$', text.decode(), re.MULTILINE)
        return {replica: float(value) for replica, value in found}

    def processes(self) -> dict[int, str]:
        """Their titles by number: all that have the cluster's folder in their environment."""
        mark, found = f"RAY_TMPDIR={self.folder}".encode(), {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has ended, or is not ours
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
        return found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray.serve", reason="Ray is not installed")
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("two replicas take two cores")
    folder = Path(tempfile.mkdtemp(prefix="sfrt-", dir="/tmp"))  # the path of a socket may have 107 characters
    in_folder = {"RAY_TMPDIR": str(folder), "TMPDIR": str(folder)}  # a replica that is killed leaves its recordings
    options = ["--port", "0", "--device", "cpu", "--replicas", "2", "--sessions", "1", "--record-seconds", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "sfrt", "serve", "--ray", *options],
        env={**os.environ, **in_folder, "RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://(\S+)/", line)
        cluster = Cluster(found[1] if found else "", process, folder)
        try:
            assert found is not None, line + process.stderr.read()
            yield cluster
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(WAIT_S)
            for number in cluster.processes():
                os.kill(number, signal.SIGKILL)
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty(cluster: Cluster) -> Cluster:
    """Two replicas, with nobody there."""
    wait_until(lambda: list(cluster.figure("sfrt_viewers").values()) == [0, 0], START_S)
    return cluster


@pytest.mark.slow
def test_viewers_are_spread_and_the_last_is_told_that_all_is_full(empty: Cluster) -> None:
    async def test() -> None:
        async with empty.watching(RED) as one, empty.watching(RED) as other:
            assert list(empty.figure("sfrt_free_places").values()) == [0, 0]
            for viewer in (one, other):
                await viewer.client.say(Prompt(BLUE))
                while (news := await viewer.next(ChunkNews)).receipt is None:
                    pass
                assert news.receipt.prompt == BLUE
                await viewer.next(Frame)
            with pytest.raises(ProtocolError, match="all 1 places of this server are taken"):
                async with empty.client():
                    pass
            assert b"<canvas" in empty.get("")[1], "the page comes where no place is free"
            assert empty.health()["status"] == "ok"

    finish(test())


@pytest.mark.slow
def test_a_recording_is_fetched_whoever_keeps_it(empty: Cluster) -> None:
    async def test() -> None:
        async with empty.watching(RED) as viewer:
            await viewer.client.say(Record(on=True))
            while (recording := await viewer.next(Recording)).path is None:
                pass
            # The other replica has nothing else to do, and so it is the one that is asked.
            answers = [empty.get(recording.path) for _ in range(4)]
            assert {status for status, _ in answers} == {200}
            assert len({body for _, body in answers}) == 1 and answers[0][1][4:8] == b"ftyp"
            assert empty.get("recordings/nothing.mp4")[0] == 404

    finish(test())


@pytest.mark.slow
def test_a_replica_that_dies_takes_only_its_own_viewers_along(empty: Cluster) -> None:
    async def test() -> None:
        async with empty.watching(RED) as one, empty.watching(RED) as other:
            before = set(empty.figure("sfrt_viewers"))
            number, *_ = [number for number, title in empty.processes().items() if "ServeReplica" in title]
            os.kill(number, signal.SIGKILL)
            ends = await asyncio.gather(*(seconds_of(viewer, 3.0) for viewer in (one, other)), return_exceptions=True)
            assert sum(isinstance(end, ProtocolError) for end in ends) == 1, ends
            ((survivor, frames),) = [
                (viewer, end) for viewer, end in zip((one, other), ends, strict=True) if isinstance(end, int)
            ]
            assert frames > 10
            # Whoever does not read is let go, as it answers no pings.
            reading = asyncio.create_task(seconds_of(survivor, START_S))
            await asyncio.to_thread(
                wait_until, lambda: len(set(empty.figure("sfrt_viewers")) - before) == 1, seconds=START_S
            )
            async with empty.watching(RED):
                figures = await asyncio.to_thread(empty.figure, "sfrt_viewers")
                assert list(figures.values()) == [1, 1]
            assert not reading.done()
            reading.cancel()

    finish(test())


@pytest.mark.slow
def test_an_interrupt_says_goodbye_and_leaves_nothing(empty: Cluster) -> None:
    async def test() -> None:
        async with empty.watching(RED) as one, empty.watching(RED) as other:
            os.killpg(empty.process.pid, signal.SIGINT)  # as a terminal does it
            for viewer in (one, other):
                assert any(isinstance(last, Bye) and last.why == "shutdown" for last in await viewer.rest())

    finish(test())
    out, err = empty.process.communicate(timeout=START_S)
    assert (empty.process.returncode, err) == (0, "")
    assert "ServeController" not in out, "nothing is said of Ray's own end; of a replica that was killed there may be"
    wait_until(lambda: not empty.processes())


async def seconds_of(viewer: Listener, seconds: float) -> int:
    """How many frames come in so long a time."""
    end, frames = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        await viewer.next(Frame)
        frames += 1
    return frames
