"""The server over real sockets, with the built-in model: what it is for, and what it allows."""

from __future__ import annotations

import asyncio
import io
import json
import re
import signal
import socket
import subprocess
import sys
from copy import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfrt import Runtime
from sfrt.errors import BundleError, ProtocolError
from sfrt.server.access import Access
from sfrt.server.client import Client
from sfrt.server.protocol import (
    H264,
    Bye,
    ChunkNews,
    Frame,
    Keyframe,
    Pause,
    Prompt,
    Queued,
    Record,
    Recording,
    Refused,
    Resume,
    Rewind,
    Rewound,
    Start,
    Started,
    State,
    Stop,
)
from sfrt.server.service import model_of
from tests.command_line import Run
from tests.servers import (
    BLUE,
    RED,
    SMALL,
    Listener,
    Running,
    finish,
    mean_colour,
    serving,
    upgrade,
)
from tests.waiting import wait_until


def test_a_stream_arrives_in_order(server: Running) -> None:
    async def test() -> None:
        async with server.watching(RED) as viewer:
            for _ in range(24):
                await viewer.next(Frame)
            assert viewer.client.welcome.model.name == "shapes"
            frames = [one for one in viewer.heard if isinstance(one, Frame)]
            assert [frame.number for frame in frames] == list(range(len(frames)))
            news = [one for one in viewer.heard if isinstance(one, ChunkNews)]
            assert [one.index for one in news] == list(range(len(news)))
            assert [len(one.slots) for one in news] == [9] * len(news)
            assert [slot.frame for slot in news[1].slots if slot.written] == [3, 4, 5]
            assert [news[0].frames, news[1].frames] == [9, 12]
            red, green, _ = mean_colour(frames[-1])
            assert red > green  # a red circle on white

    finish(test())


def test_a_prompt_is_switched_and_the_receipt_comes_with_its_chunk(server: Running) -> None:
    async def test() -> None:
        async with server.watching(RED) as viewer:
            await viewer.client.say(Prompt(BLUE))
            assert (await viewer.next(Queued)).prompt == BLUE
            while (news := await viewer.next(ChunkNews)).receipt is None:
                assert news.index < 6
            assert (news.receipt.prompt, news.receipt.how) == (BLUE, "recache")
            while (await viewer.next(Frame)).chunk < news.index + 2:
                pass
            assert max(mean_colour(await viewer.next(Frame))) < 100  # on black, no more on white

    finish(test())


def test_h264_begins_with_a_key_frame_and_gives_one_when_asked(server: Running) -> None:
    async def test() -> None:
        async with server.watching(codec="h264") as viewer:
            first = next(one for one in viewer.heard if isinstance(one, Frame))
            assert (first.kind, first.key) == (H264, True)
            assert first.data.startswith(b"\0\0\0\1\x67")
            await viewer.next(ChunkNews)
            await viewer.client.say(Keyframe())
            while not (await viewer.next(Frame)).key:
                pass

    finish(test())


def test_a_pause_holds_everything(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client.say(Pause())
            assert (await viewer.next(State)).playing == "paused"
            with pytest.raises(asyncio.TimeoutError):
                while True:  # of the chunk that was on its way
                    await viewer.next(Frame, timeout=1.0)

    finish(test())


def test_a_paused_stream_goes_on_where_it_stood(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client.say(Pause())
            await viewer.client.say(Resume())
            for _ in range(3):
                await viewer.next(ChunkNews)
            indices = [one.index for one in viewer.heard if isinstance(one, ChunkNews)]
            assert indices == list(range(len(indices)))

    finish(test())


def test_a_rewound_stream_shows_the_same_again(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            while (await viewer.next(ChunkNews)).index < 2:
                pass
            await viewer.client.say(Rewind(7))
            assert "cannot go back to chunk 7" in (await viewer.next(Refused)).message
            await viewer.client.say(Rewind(1))
            target = (await viewer.next(Rewound)).chunk
            while (await viewer.next(ChunkNews)).index != target:
                pass
            again = await viewer.next(Frame)
            before = next(one for one in viewer.heard if isinstance(one, Frame) and one.chunk == target)
            assert again.chunk == target and again.number > before.number
            assert np.abs(np.subtract(mean_colour(again), mean_colour(before))).max() < 1
            assert (await viewer.next(ChunkNews)).index == target + 1

    finish(test())


def test_a_stream_begins_from_a_picture(server: Running) -> None:
    picture = io.BytesIO()
    Image.new("RGB", (128, 128), (20, 160, 60)).save(picture, "PNG")

    async def test() -> None:
        async with server.client() as viewer:
            await viewer.client.say(Start(RED, picture=True))
            assert (await viewer.next(Refused)).about == "picture"
            await viewer.client.send_picture(b"no picture")
            await viewer.client.say(Start(RED, picture=True))
            assert (await viewer.next(Refused)).about == "picture"
            await viewer.client.send_picture(picture.getvalue())
            await viewer.client.say(Start("a green square moving left on a green background", picture=True))
            red, green, blue = mean_colour(await viewer.next(Frame))
            assert green > 1.5 * max(red, blue)

    finish(test())


def test_a_recording_can_be_fetched_and_is_no_longer_than_allowed(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client.say(Record(on=True))
            assert (await viewer.next(Recording)).on
            while (done := await viewer.next(Recording)).on:
                pass
            assert done.reason == "a recording may take 1 s"
            assert done.path is not None
            status, video = await asyncio.to_thread(server.get, done.path)
            assert status == 200
            import av

            with av.open(io.BytesIO(video)) as container:
                assert sum(1 for _ in container.decode(video=0)) == 32  # at that many a second

    finish(test())


def test_one_stream_follows_another(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client.say(Start(BLUE, seed=9))
            assert (await viewer.next(Started)).stream == 2
            while (await viewer.next(Frame)).stream != 2:
                pass
            await viewer.client.say(Stop())
            assert (await viewer.next(State)).playing == "stopped"
            await viewer.client.say(Prompt(RED))
            assert "send start first" in (await viewer.next(Refused)).message
            assert await asyncio.to_thread(lambda: len(server.service.engine.stats().streams)) <= 1

    finish(test())


def test_what_watches_over_it(server: Running) -> None:
    assert server.health() == {"status": "ok", "model": "shapes", "viewers": 0, "places": 3}
    status, page = server.get("")
    assert (status, b"<title>sfrt" in page) == (200, True)
    assert server.get("main.js")[0] == 200
    assert server.get("recordings/nothing.mp4")[0] == 404
    assert server.get("../server/app.py")[0] == 404

    async def test() -> None:
        async with server.watching():
            status, text = await asyncio.to_thread(server.get, "metrics")
            figures = dict(line.rsplit(" ", 1) for line in text.decode().splitlines() if not line.startswith("#"))
            assert status == 200
            assert float(figures["sfrt_viewers"]) == 1
            assert float(figures["sfrt_frames_total"]) >= 1
            assert float(figures["sfrt_chunk_seconds_count"]) >= 1
            assert float(figures["sfrt_chunk_period_seconds"]) == 12 / 32
            assert float(figures["sfrt_waiting_chunks"]) in (0, 1)

    finish(test())


def test_the_page_asks_nobody_else_for_anything() -> None:
    page = Path(__file__).parent.parent / "sfrt/server/page"
    for path in page.iterdir():
        text = path.read_text("utf-8").replace("http://www.w3.org/2000/svg", "")
        assert re.search(r"https?://", text) is None, path


def test_what_is_told_of_the_ring_is_what_is_in_it(tiny_bundle: Path) -> None:
    """Sinks stay, frames leave in turn, and a recache fills the ring anew behind the sinks."""
    with Runtime(tiny_bundle, device="cpu").session("a red circle") as session:
        chunks = [next(session) for _ in range(5)]
        assert chunks[0].slots == (0, 1, 2, *[None] * 6)
        assert chunks[2].slots == (0, 1, 2, 3, 4, 5, 6, 7, 8)
        assert chunks[3].slots == (0, 1, 2, 9, 10, 11, 6, 7, 8)
        assert chunks[4].slots == (0, 1, 2, 9, 10, 11, 12, 13, 14)
        assert session.index == 5
        session.switch("a blue square")
        assert next(session).slots == (0, 1, 2, 12, 13, 14, 15, 16, 17)
        assert next(session).slots == (0, 1, 2, 18, 19, 20, 15, 16, 17)


# Limits


def test_there_are_so_many_places_and_no_more(server: Running) -> None:
    async def test() -> None:
        async with server.client(), server.client(), server.client():
            with pytest.raises(ProtocolError, match=r"bye \(full\): all 3 places"):
                async with server.client():
                    pass
        wait_until(lambda: not server.service.viewers)
        async with server.watching():
            pass

    finish(test())


def test_the_idle_and_the_lingering_are_sent_away(quick_runtime: Runtime, tmp_path: Path) -> None:
    async def talk(client: Client) -> None:
        while True:
            await client.say(Keyframe())
            await asyncio.sleep(0.3)

    async def bye(server: Running, talking: bool) -> Bye:
        async with server.client() as viewer:
            chatter = asyncio.ensure_future(talk(viewer.client)) if talking else None
            said = await viewer.next(Bye)
            if chatter is not None:
                chatter.cancel()
            return said

    async def test() -> None:
        with serving(quick_runtime, tmp_path, replace(SMALL, idle_s=0.8, longest_s=2.0)) as server:
            assert (await bye(server, talking=False)).why == "idle"
            assert (await bye(server, talking=True)).why == "over"

    finish(test())


def test_who_says_nothing_at_all_is_sent_away(quick_runtime: Runtime, tmp_path: Path) -> None:
    from websockets.asyncio.client import connect

    async def test() -> None:
        with serving(quick_runtime, tmp_path, replace(SMALL, hello_s=0.3)) as server:
            async with connect(f"ws://{server.host}/stream") as raw:
                assert json.loads(await raw.recv())["why"] == "protocol"

    finish(test())


def test_the_token_opens_the_stream_and_the_figures(quick_runtime: Runtime, tmp_path: Path) -> None:
    async def test() -> None:
        with serving(quick_runtime, tmp_path, SMALL, Access("sesame")) as server:
            with pytest.raises(ProtocolError, match=r"bye \(token\)"):
                async with server.client(token="guess"):
                    pass
            async with server.client(token="sesame") as viewer:
                await viewer.client.say(Start(RED))
                await viewer.next(Frame)
            get = asyncio.to_thread
            assert (await get(server.get, "metrics"))[0] == 401
            assert (await get(server.get, "metrics", Authorization="Bearer sesame"))[0] == 200

    finish(test())


@pytest.mark.parametrize("headers", [{"Origin": "http://evil.example"}, {"Host": "evil.example"}])
def test_other_pages_are_turned_away(server: Running, headers: dict[str, str]) -> None:
    host, port = server.host.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as raw:
        raw.sendall(upgrade(headers.pop("Host", server.host), **headers))
        assert b" 403 " in raw.recv(4096)
    assert server.get("", Host="evil.example")[0] == 403


# The command


def test_sigterm_says_goodbye_and_ends_in_good_order(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sfrt", "serve", "--port", "0", "--device", "cpu", "--record-to", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.search(r"http://(\S+)/", line)
        assert found is not None, line

        async def test() -> None:
            async with Client.connect(f"ws://{found[1]}/stream") as client:
                viewer = Listener(client)
                await client.say(Start(RED))
                await viewer.next(Frame)
                await client.say(Record(on=True))
                await viewer.next(Recording)
                await viewer.next(ChunkNews)
                await viewer.next(ChunkNews)
                process.send_signal(signal.SIGTERM)
                rest = await viewer.rest()
                assert any(isinstance(one, Bye) and one.why == "shutdown" for one in rest)
                assert client._socket.close_code == 1001

        finish(test())
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
    (recorded,) = tmp_path.iterdir()
    import av

    with av.open(str(recorded)) as container:
        assert sum(1 for _ in container.decode(video=0)) >= 12


def test_the_network_without_a_token_is_warned_of(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfrt.server.serving.serve", lambda runtime, address, ready: ready(address.url(8000)))
    warning = "sfrt: warning: anyone who can reach 0.0.0.0 may use this server; give it a token with --token"
    assert warning in run("serve", "--host", "0.0.0.0").err
    assert "warning" not in run("serve", "--host", "0.0.0.0", "--token", "sesame").err
    assert run("serve").err == "shapes is at http://127.0.0.1:8000/\n"


def test_the_frame_rate_is_the_models_unless_told_otherwise(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr("sfrt.server.serving.serve", lambda runtime, address, ready: asked.append(runtime.stream.fps))
    assert run("serve").code == run("serve", "--fps", "4").code == 0
    assert asked == [16, 4]


def test_a_taken_port_is_told_of(run: Run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        complaint = run("serve", "--port", str(port)).complaint
    assert complaint.startswith(f"cannot listen on 127.0.0.1 port {port}")


def test_a_model_without_a_decoder_is_refused(quick_runtime: Runtime) -> None:
    blind = copy(quick_runtime)
    blind.manifest = replace(blind.manifest, decoder=None)
    with pytest.raises(BundleError, match="has no decoder"):
        model_of(blind)
