"""What clients, disks and backends do to a server; one viewer's trouble is no other's."""

from __future__ import annotations

import gc
import json
import os
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from sfrt import Runtime
from sfrt.chunk import Chunk
from sfrt.engine import Stream
from sfrt.errors import ProtocolError
from sfrt.machine import resident_memory
from sfrt.server.encoding import JpegEncoder, Picture
from sfrt.server.protocol import (
    ChunkNews,
    Frame,
    Pause,
    Prompt,
    Queued,
    Record,
    Recording,
    Refused,
    Resume,
    Start,
    State,
)
from sfrt.session import Session
from tests.full_disk import file_size_limit
from tests.servers import (
    BLUE,
    RED,
    SMALL,
    Running,
    finish,
    masked,
    serving,
    upgrade,
)
from tests.waiting import wait_until


def test_a_client_that_vanishes_in_the_middle_of_a_chunk_leaves_nothing(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            viewer.client._socket.transport.abort()

    finish(test())
    wait_until(server.is_empty)


def test_fifty_visits_leave_nothing(server: Running) -> None:
    async def visits(count: int) -> None:
        for number in range(count):
            async with server.client(codec=("h264", "jpeg")[number % 2]) as viewer:
                await viewer.client.say(Start(RED))
                if number % 5 == 0:
                    await viewer.next(Frame)

    def left() -> tuple[int, int]:
        wait_until(server.is_empty)
        gc.collect()
        sessions = sum(type(one) in (Session, Chunk, Stream) for one in gc.get_objects())
        return sessions, len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0

    finish(visits(4))
    sessions, descriptors = left()
    memory = resident_memory() or 0
    finish(visits(50))
    after_sessions, after_descriptors = left()
    assert after_sessions <= sessions
    assert after_descriptors <= descriptors + 2
    assert (resident_memory() or 0) - memory < 60 * 2**20


def test_a_client_that_does_not_read_is_let_go_and_costs_no_memory(
    quick_runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = JpegEncoder.encode

    def large(self: JpegEncoder, frames: NDArray[np.uint8]) -> list[Picture]:
        return [Picture(picture.data + bytes(2**20), True) for picture in encode(self, frames)]

    monkeypatch.setattr(JpegEncoder, "encode", large)
    with serving(quick_runtime, tmp_path, replace(SMALL, slow_s=1.5)) as server, socket.socket() as raw:
        host, port = server.host.split(":")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((host, int(port)))
        raw.sendall(upgrade(server.host))
        assert b" 101 " in raw.recv(4096)
        raw.sendall(masked(b'{"kind":"hello","version":1,"codec":"jpeg"}'))
        wait_until(lambda: len(server.service.viewers) == 1)
        before = resident_memory() or 0
        raw.sendall(masked(json.dumps({"kind": "start", "prompt": RED}).encode()))
        wait_until(lambda: bool(server.service.engine.stats().streams))
        highest = 0
        while server.service.viewers:  # nothing is read from here on
            highest = max(highest, resident_memory() or 0)
            time.sleep(0.02)
        assert 'sfrt_turned_away_total{why="slow"} 1.0' in server.get("metrics")[1].decode()
        assert highest - before < 120 * 2**20
        wait_until(lambda: not server.service.engine.stats().streams)


def test_others_go_on_while_one_does_not_read(server: Running) -> None:
    async def test() -> None:
        async with server.watching(RED), server.watching(BLUE) as other:  # the first is not read any more
            for _ in range(3):
                await other.next(ChunkNews)

    finish(test())


@pytest.mark.parametrize(
    "message", ["", "}{", "[]", '{"kind":"hello"}', '{"kind":"dance"}', b"", b"\x01\x03\x01", b"\xff" * 50]
)
def test_garbage_is_refused_and_the_stream_goes_on(server: Running, message: str | bytes) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client._socket.send(message)
            assert (await viewer.next(Refused)).about == "message"
            await viewer.next(ChunkNews)

    finish(test())


@pytest.mark.parametrize("first", ["", "x" * 1000, '{"kind":"pause"}', '{"kind":"hello","version":2}', b"\0" * 20])
def test_who_does_not_say_hello_is_sent_away(server: Running, first: str | bytes) -> None:
    from websockets.asyncio.client import connect

    async def test() -> None:
        async with connect(f"ws://{server.host}/stream") as raw:
            await raw.send(first)
            said = json.loads(await raw.recv())
            assert (said["kind"], said["why"]) == ("bye", "protocol")
            await raw.wait_closed()
            assert raw.close_code == 1008

    finish(test())


def test_oversized_messages_are_refused_and_larger_ones_not_even_read(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client._socket.send('{"kind":"prompt","prompt":"' + "x" * 300_000 + '"}')
            assert "characters" in (await viewer.next(Refused)).message
            await viewer.client.send_picture(bytes(250_000))
            assert (await viewer.next(Refused)).about == "picture"
            await viewer.next(ChunkNews)
            await viewer.client.send_picture(bytes(2**20))
            with pytest.raises(ProtocolError, match=r"broke off .*1009"):
                await viewer.rest()
        assert server.health()["status"] == "ok"

    finish(test())


def test_a_flood_of_messages_is_answered_slowly(server: Running) -> None:
    async def test() -> None:
        async with server.client() as viewer:
            began = time.monotonic()
            for _ in range(60):
                await viewer.client.say(Pause())
            for _ in range(60):
                await viewer.next(Refused)
            assert time.monotonic() - began > 0.7  # 40 at once, then 20 a second

    finish(test())


def test_of_two_switches_in_one_chunk_the_last_wins(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client.say(Pause())
            await viewer.next(State)
            await viewer.client.say(Prompt("a green triangle rising on a white background"))
            await viewer.client.say(Prompt(BLUE, how="cross"))
            await viewer.next(Queued)
            await viewer.next(Queued)
            await viewer.client.say(Resume())
            for _ in range(5):
                await viewer.next(ChunkNews)
            receipts = [one.receipt for one in viewer.heard if isinstance(one, ChunkNews) and one.receipt]
            assert [(receipt.prompt, receipt.how) for receipt in receipts] == [(BLUE, "cross")]

    finish(test())


@pytest.mark.parametrize(
    "prompt", ["", "   ", "a red\x00circle", "\x1b[2Ja circle", "x" * 100_000, "\ud800", "&#0;&#x110000;" * 2000]
)
def test_a_poisoned_prompt_is_refused_and_the_stream_goes_on(server: Running, prompt: str) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            for kind in ("prompt", "start"):
                await viewer.client._socket.send(json.dumps({"kind": kind, "prompt": prompt}))
                refused = await viewer.next(Refused)
                assert refused.about == "prompt"
                assert len(refused.message) < 200
            await viewer.next(ChunkNews)
            assert not any(isinstance(one, State) for one in viewer.heard)

    finish(test())


def test_a_full_disk_ends_the_recording_and_not_the_stream(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client.say(Record(on=True))
            assert (await viewer.next(Recording)).on
            with file_size_limit(600):
                told = await viewer.next(Recording)
            assert not told.on and told.path is None
            assert "full" in str(told.reason) or "large" in str(told.reason)
            await viewer.next(ChunkNews)
            await viewer.client.say(Record(on=True))
            assert (await viewer.next(Recording)).on

    finish(test())


def test_a_backend_that_fails_ends_one_stream_and_no_other(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Session.__next__

    def fail(session: Session) -> Chunk:
        if session.prompt == BLUE and session.index == 2:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return make(session)

    monkeypatch.setattr(Session, "__next__", fail)

    async def test() -> None:
        async with server.watching(RED) as one, server.watching(BLUE) as other:
            refused = await other.next(Refused)
            assert (refused.about, "CUDA" in refused.message) == ("stream", False)
            assert (await other.next(State)).playing == "stopped"
            for _ in range(3):
                await one.next(ChunkNews)
            await other.client.say(Start(RED))  # the connection is still good
            await other.next(Frame)

    finish(test())
