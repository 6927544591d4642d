"""What a stream over the wire begins from and goes by: a camera, a clip, a stream that was kept; and its previews."""

from __future__ import annotations

import asyncio
import io
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from sfrt import Runtime
from sfrt.errors import MediaError, ProtocolError, SnapshotError
from sfrt.server.encoding import thumbnails
from sfrt.server.footage import Footage, play
from sfrt.server.limits import Limits
from sfrt.server.pictures import camera_picture
from sfrt.server.protocol import (
    CAMERA,
    CLIP,
    JPEG,
    PREVIEW,
    Bye,
    ChunkNews,
    Frame,
    Keep,
    Kept,
    Refused,
    Restore,
    Rewind,
    Start,
    Started,
    State,
    Stop,
    Wanted,
    Watch,
)
from sfrt.server.snapshots import Snapshots
from sfrt.server.uploads import Uploads
from sfrt.video import stream_frames
from tests.servers import BLUE, RED, Listener, Running, finish, mean_colour, serving
from tests.waiting import wait_until

GREEN = "a green square moving left on a green background"
CAMERA_START = Start(GREEN, source="camera", strength=0.5)


def picture(colour: tuple[int, int, int], size: tuple[int, int] = (64, 64), kind: str = "JPEG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, colour).save(data, kind)
    return data.getvalue()


def clip(path: Path, frames: int = 40, size: tuple[int, int] = (96, 64)) -> bytes:
    """Green, and what moves in it."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for number in range(frames):
            array = np.full((size[1], size[0], 3), (20, 160, 60), np.uint8)
            array[20:40, number : number + 20] = (230, 60, 20)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        container.mux(stream.encode(None))
    return path.read_bytes()


async def film(viewer: Listener, data: bytes, until: Callable[[], bool]) -> None:
    """Send this picture again and again, as fast as it is wanted, while the messages are listened to."""
    while not until():
        if not await viewer.client.send_camera(data):
            await asyncio.sleep(0.01)


# On the way to a stream


def numbered(number: int) -> NDArray[np.uint8]:
    return np.full((1, 1, 3), number, np.uint8)


@given(st.integers(1, 9), st.integers(1, 9), st.lists(st.booleans(), max_size=80))
def test_a_camera_is_never_more_than_a_chunk_behind(first: int, later: int, made: list[bool]) -> None:
    """made says for each frame that comes whether the engine asks for a chunk after it."""
    footage, taken = Footage(first, later), list[int]()
    for newest, asked in enumerate(made):
        footage.offer(numbered(newest))
        if asked and footage.ready():
            chunk = [int(next(footage)[0, 0, 0]) for _ in range(later if taken else first)]
            assert chunk == sorted(chunk) and newest - chunk[0] < max(first, later)
            assert not taken or chunk[0] > taken[-1]
            taken += chunk


def test_a_clip_waits_for_its_stream_and_ends_it() -> None:
    footage, woken, taken = Footage(1, 2), list[bool](), list[int]()
    play((numbered(number) for number in range(6)), footage, lambda: woken.append(True))
    for count in (1, 2, 2, 2):
        wait_until(footage.ready)
        taken += [int(frame[0, 0, 0]) for frame in islice(footage, count)]
    assert taken == list(range(6))
    assert footage.ready() and woken


def test_what_goes_wrong_in_a_clip_is_its_streams_end() -> None:
    def broken() -> Iterator[NDArray[np.uint8]]:
        yield numbered(0)
        raise MediaError("damaged")

    footage = Footage(1, 2)
    play(broken(), footage, lambda: None)
    wait_until(lambda: footage._over)
    next(footage)
    with pytest.raises(MediaError, match="damaged"):
        next(footage)


def test_a_clip_that_nobody_watches_any_more_is_not_read_on() -> None:
    footage, asked = Footage(1, 1), list[int]()

    def endless() -> Iterator[NDArray[np.uint8]]:
        while True:
            asked.append(1)
            yield numbered(0)

    play(endless(), footage, lambda: None)
    wait_until(lambda: len(asked) == 2)  # one is there, one waits for room
    footage.end()
    wait_until(lambda: not any(thread.name == "sfrt-clip" for thread in threading.enumerate()))
    assert len(asked) == 2


# What is sent


def test_a_cameras_frame_is_a_jpeg_of_the_models_size() -> None:
    assert camera_picture(picture((250, 10, 10)), height=64, width=64).shape == (64, 64, 3)
    for data, reason in (
        (b"", "no JPEG"),
        (picture((0, 0, 0))[:200], "no JPEG"),
        (picture((0, 0, 0), kind="PNG"), "no JPEG"),
        (picture((0, 0, 0), (640, 480)), "640×480 pixels; the model takes 64×64"),
    ):
        with pytest.raises(MediaError, match=reason):
            camera_picture(data, height=64, width=64)


def test_a_clip_comes_in_parts_that_are_kept_until_the_next_one() -> None:
    uploads = Uploads(Limits(clip_bytes=6))
    with pytest.raises(MediaError, match="no whole clip"):
        uploads.clip()
    with pytest.raises(ProtocolError, match="part 1 of a clip came out of order"):
        uploads.take(Frame(CLIP, b"abc", number=1))
    uploads.take(Frame(CLIP, b"abc", key=False))
    with pytest.raises(MediaError, match="no whole clip"):
        uploads.clip()
    uploads.take(Frame(CLIP, b"def", number=1))
    kept = uploads.clip()
    assert kept.read_bytes() == b"abcdef"
    with pytest.raises(ProtocolError, match="out of order"):
        uploads.take(Frame(CLIP, b"g", number=2))
    uploads.take(Frame(CLIP, b"xyz", key=False))
    assert not kept.exists()
    with pytest.raises(MediaError, match="too large"):
        uploads.take(Frame(CLIP, b"1234", number=1))
    with pytest.raises(MediaError, match="no whole clip"):
        uploads.clip()
    uploads.take(Frame(CLIP, b"end"))
    last = uploads.clip()
    uploads.close()
    assert not last.exists()
    uploads.take(Frame(CLIP, b"late"))


@pytest.mark.parametrize(
    "content", [b"#EXTM3U\n#EXTINF:1,\nreal.mp4\n#EXT-X-ENDLIST\n", b"ffconcat version 1.0\nfile real.mp4\n"]
)
def test_a_clip_from_elsewhere_reads_no_other_file(tmp_path: Path, content: bytes) -> None:
    clip(tmp_path / "real.mp4")
    list_of_files = tmp_path / "list.m3u8"
    list_of_files.write_bytes(content)
    with pytest.raises(MediaError):
        stream_frames(list_of_files, height=64, width=64, foreign=True)
    assert next(stream_frames(tmp_path / "real.mp4", height=64, width=64, foreign=True)).shape == (64, 64, 3)


def test_a_clip_from_elsewhere_has_pictures_of_a_size_that_fits_in_memory(tmp_path: Path) -> None:
    clip(tmp_path / "large.mp4", frames=1, size=(4800, 2400))
    with pytest.raises(MediaError):
        stream_frames(tmp_path / "large.mp4", height=64, width=64, foreign=True)


def test_previews_are_small() -> None:
    (data,) = thumbnails(np.zeros((1, 480, 832, 3), np.uint8))
    assert Image.open(io.BytesIO(data)).size == (128, 74)


# Over the wire


def test_a_stream_goes_by_a_camera(server: Running) -> None:
    async def test() -> None:
        async with server.client() as viewer:
            await viewer.client.say(CAMERA_START)
            assert (await viewer.next(Wanted)).until == 12
            sending = asyncio.ensure_future(film(viewer, picture((20, 160, 60)), lambda: False))
            while (await viewer.next(ChunkNews)).index < 2:
                pass
            red, green, blue = mean_colour(await viewer.next(Frame))
            assert green > 1.5 * max(red, blue)
            news = [one for one in viewer.heard if isinstance(one, ChunkNews)]
            assert [one.frames for one in news] == [9, 12, 12]
            assert news[2].times.encode > 0
            await viewer.client.say(Rewind(1))
            assert "goes by a source" in (await viewer.next(Refused)).message
            sending.cancel()

    finish(test())


def test_a_camera_sends_no_more_than_was_asked_for(server: Running) -> None:
    async def test() -> None:
        async with server.client() as viewer:
            await viewer.client.say(CAMERA_START)
            until = (await viewer.next(Wanted)).until
            data = picture((20, 160, 60))
            sent = [await viewer.client.send_camera(data) for _ in range(until + 3)]
            assert sent == [True] * until + [False] * 3
            await viewer.client._send(Frame(CAMERA, data, stream=1, number=1000).pack())
            refused = await viewer.next(Refused)
            assert (refused.about, "was not asked for" in refused.message) == ("message", True)
            await viewer.next(ChunkNews)

    finish(test())


def test_a_cameras_garbage_is_left_out_and_the_stream_goes_on(server: Running) -> None:
    async def test() -> None:
        async with server.client() as viewer:
            await viewer.client.say(CAMERA_START)
            await viewer.next(Wanted)
            for data in (b"no picture", picture((9, 9, 9), (32, 32))):
                await viewer.client.send_camera(data)
                assert (await viewer.next(Refused)).about == "picture"
            sending = asyncio.ensure_future(film(viewer, picture((20, 160, 60)), lambda: False))
            assert (await viewer.next(ChunkNews)).index == 0
            await viewer.next(ChunkNews)
            sending.cancel()

    finish(test())


def test_a_camera_that_stops_holds_up_nobody_and_idles_out(quick_runtime: Runtime, tmp_path: Path) -> None:
    async def test() -> None:
        with serving(quick_runtime, tmp_path, Limits(idle_s=2.0, rewind_chunks=1)) as server:
            server.service.engine.measure(history=server.service.limits.history)
            server.service.engine.measure(sourced=True, strength=0.5)
            async with server.client() as still, server.watching(RED) as other:
                await still.client.say(CAMERA_START)
                await still.next(Wanted)
                for _ in range(5):
                    await still.client.send_camera(picture((20, 160, 60)))
                for _ in range(3):
                    await other.next(ChunkNews)
                assert (await still.next(Bye)).why == "idle"
                assert not any(isinstance(one, ChunkNews) for one in still.heard)

    finish(test())


def test_a_client_that_vanishes_while_its_camera_is_waited_for_leaves_nothing(server: Running) -> None:
    async def test() -> None:
        async with server.client() as viewer:
            await viewer.client.say(CAMERA_START)
            await viewer.next(Wanted)
            await viewer.client.send_camera(picture((20, 160, 60)))
            viewer.client._socket.transport.abort()

    finish(test())
    wait_until(server.is_empty)


def test_a_stream_goes_by_a_clip_and_ends_with_it(server: Running, tmp_path: Path) -> None:
    data = clip(tmp_path / "clip.mp4", frames=80)  # 40 at this model's 32 a second would be 20

    async def test() -> None:
        async with server.client() as viewer:
            await viewer.client.send_clip(data)
            await viewer.client.say(Start(GREEN, source="clip", strength=0.4))
            red, green, blue = mean_colour(await viewer.next(Frame))
            assert green > 1.5 * max(red, blue)
            assert (await viewer.next(State)).playing == "stopped"
            news = [one.frames for one in viewer.heard if isinstance(one, ChunkNews)]
            assert news == [9] + [12] * ((160 - 9) // 12)
            await viewer.client.say(Start(GREEN, source="clip", strength=0.4))  # the clip is still there
            await viewer.next(Frame)

    finish(test())


def test_an_oversized_clip_and_one_that_is_none_are_refused_and_the_stream_goes_on(server: Running) -> None:
    async def test() -> None:
        async with server.watching() as viewer:
            await viewer.client.send_clip(bytes(server.service.limits.clip_bytes + 1))
            refused = await viewer.next(Refused)
            assert (refused.about, "too large" in refused.message) == ("picture", True)
            await viewer.client.send_clip(b"no video at all" * 100)
            await viewer.client.say(Start(GREEN, source="clip"))
            while "cannot read" not in refused.message:
                refused = await viewer.next(Refused)
            assert "/" not in refused.message  # no path of the server's
            await viewer.next(ChunkNews)
            assert not any(isinstance(one, State) for one in viewer.heard)

    finish(test())


@pytest.mark.parametrize("strength", [0.0, -1.0, 1.5])
def test_an_impossible_strength_is_refused(server: Running, strength: float) -> None:
    async def test() -> None:
        async with server.client() as viewer:
            await viewer.client.say(Start(GREEN, source="camera", strength=strength))
            assert "strength" in (await viewer.next(Refused)).message

    finish(test())


def test_previews_come_while_they_are_asked_for(server: Running) -> None:
    async def test() -> None:
        async with server.watching(RED) as viewer:
            assert not any(isinstance(one, Frame) and one.kind == PREVIEW for one in viewer.heard)
            await viewer.client.say(Watch(True))
            while (first := await viewer.next(Frame)).kind != PREVIEW:
                pass
            while (await viewer.next(Frame)).kind != JPEG:
                pass
            steps = [one for one in viewer.heard if isinstance(one, Frame) and one.kind == PREVIEW]
            count = len(viewer.client.welcome.model.sigmas)
            assert [(one.chunk, one.number) for one in steps] == [(first.chunk, step) for step in range(count)]
            assert Image.open(io.BytesIO(steps[-1].data)).size == (64, 64)
            await viewer.client.say(Start(BLUE))  # the wish outlives the stream
            while (frame := await viewer.next(Frame)).stream != 2 or frame.kind != PREVIEW:
                pass
            await viewer.client.say(Watch(False))
            heard = [one.kind for one in [await viewer.next(Frame) for _ in range(100)]]
            assert heard[-30:] == [JPEG] * 30

    finish(test())


def test_a_kept_stream_goes_on_and_shows_what_would_have_come(server: Running) -> None:
    async def test() -> None:
        async with server.watching(RED) as viewer:
            await viewer.client.say(Keep())
            kept = await viewer.next(Kept)
            assert kept.prompt == RED
            while (frame := await viewer.next(Frame)).chunk != kept.chunk:
                pass
        async with server.client() as later:  # another connection, and nothing else is known of the first
            await later.client.say(Restore(kept.name))
            assert (await later.next(Started)).seed == 3
            again = await later.next(Frame)
            assert again.chunk == kept.chunk
            assert again.data == frame.data
            assert (await later.next(ChunkNews)).index == kept.chunk + 1
            await later.client.say(Stop())

    finish(test())


def test_a_tampered_snapshot_is_refused_and_the_stream_goes_on(server: Running) -> None:
    async def test() -> None:
        async with server.watching(RED) as viewer:
            for name in ("", "../x", "x" * 16):
                await viewer.client.say(Restore(name))
                assert "nothing is kept" in (await viewer.next(Refused)).message
            await viewer.client.say(Keep())
            name = (await viewer.next(Kept)).name
            path = server.service.snapshots.find(name).path
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)
            await viewer.client.say(Restore(name))
            refused = await viewer.next(Refused)
            assert (refused.about, "damaged" in refused.message) == ("state", True)
            assert "/" not in refused.message
            await viewer.next(ChunkNews)
            assert not any(isinstance(one, State) for one in viewer.heard)

    finish(test())


def test_so_many_streams_are_kept_so_large_and_for_so_long(quick_runtime: Runtime, tmp_path: Path) -> None:
    now = 0.0
    with quick_runtime.session(RED) as session:
        next(session)
        kept = Snapshots(tmp_path, Limits(), lambda: now)
        each = kept.find(kept.keep(session, 1, 0)).size
        kept.clear()
        assert not list(tmp_path.iterdir())

        few = Snapshots(tmp_path, Limits(snapshots=2), lambda: now)
        names = [few.keep(session, 1, 0) for _ in range(3)]
        with pytest.raises(SnapshotError, match="nothing is kept"):
            few.find(names[0])
        assert few.find(names[2]).path.exists() and len(list(tmp_path.iterdir())) == 2
        now = 3601.0
        with pytest.raises(SnapshotError, match="nothing is kept"):
            few.find(names[2])
        assert not list(tmp_path.iterdir())

        small = Snapshots(tmp_path, Limits(snapshot_bytes=each * 3 // 2), lambda: now)
        names = [small.keep(session, 1, 0) for _ in range(2)]
        with pytest.raises(SnapshotError, match="nothing is kept"):
            small.find(names[0])
        small.clear()
        tiny = Snapshots(tmp_path, Limits(snapshot_bytes=each - 1), lambda: now)
        for least in (0, each):
            with pytest.raises(SnapshotError, match="bytes to keep"):
                tiny.keep(session, 1, least)
        assert not list(tmp_path.iterdir())
