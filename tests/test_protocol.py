from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from math import isfinite
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from sfrt import switching
from sfrt.errors import ConfigError, MediaError, ProtocolError
from sfrt.server import protocol
from sfrt.server.access import Access, is_local
from sfrt.server.encoding import H264Encoder, encoder_for
from sfrt.server.limits import Allowance, Limits
from sfrt.server.pictures import pixels_of
from sfrt.server.protocol import (
    HEADER,
    JPEG,
    ChunkNews,
    Frame,
    FromClient,
    FromServer,
    Hello,
    Prompt,
    Record,
    Slot,
    Start,
    SwitchReceipt,
    Times,
    from_client,
    from_server,
    text_of,
)
from sfrt.server.recordings import Recordings


def _strength(message: FromClient) -> float:
    """JSON has no infinity."""
    return message.strength if isinstance(message, Start) else 0.0


NEWS = ChunkNews(
    stream=1,
    index=4,
    frame=45,
    frames=12,
    chunk_ms=31.5,
    deadline_ms=750.0,
    attained=1.0,
    times=Times(1.0, 2.0, 0.0, 20.0, 8.5),
    slots=(Slot(9, False, True), Slot(None, True, False)),
    waiting=1,
    room=2,
    process_bytes=None,
    device_bytes=7,
    receipt=SwitchReceipt("a blue square", "blend", 3, 12.5),
)


@given(st.one_of(*(st.from_type(one) for one in get_args(FromClient))).filter(lambda one: isfinite(_strength(one))))
def test_what_a_client_says_arrives(message: FromClient) -> None:
    assert from_client(text_of(message)) == message


def test_what_a_server_says_arrives() -> None:
    assert from_server(text_of(NEWS)) == NEWS
    assert from_server(text_of(replace(NEWS, receipt=None))) == replace(NEWS, receipt=None)


def test_defaults_may_be_left_out_and_nothing_else() -> None:
    assert from_client('{"kind": "prompt", "prompt": "a cat"}') == Prompt("a cat")
    assert from_client('{"kind": "record", "on": true}') == Record(True)
    with pytest.raises(ProtocolError, match="'start' does not fit: prompt is missing"):
        from_client('{"kind": "start"}')


def test_no_word_means_two_things() -> None:
    kinds = [json.loads(text_of(one))["kind"] for one in (Hello(1), Start(""), Prompt(""))]
    assert kinds == ["hello", "start", "prompt"]
    words = [protocol._kind_of(one) for one in (*get_args(FromClient), *get_args(FromServer))]
    assert len(set(words)) == len(words)


@given(st.text() | st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists).map(json.dumps))
def test_garbage_is_refused_as_such(text: str) -> None:
    with pytest.raises(ProtocolError):
        from_client(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "is no JSON"),
        ('{"kind": ["start"]}', "kind is none of: hello, start"),
        ('{"kind": "welcome"}', "kind is none of: hello, start"),
        ('{"kind": "pause", "why": 1}', "why is not a known key"),
        ('{"kind": "start", "prompt": 7}', "prompt is 7, not text"),
        ('{"kind": "start", "prompt": "", "seed": true}', "seed is True, not a whole number"),
        ('{"kind": "prompt", "prompt": "", "how": "magic"}', "how is 'magic', not one of"),
    ],
)
def test_a_refusal_says_what_is_wrong(text: str, reason: str) -> None:
    with pytest.raises(ProtocolError) as refused:
        from_client(text)
    assert reason in str(refused.value)


def test_a_refusal_does_not_repeat_a_long_message() -> None:
    with pytest.raises(ProtocolError) as refused:
        from_client(json.dumps({"kind": "rewind", "chunk": "9" * 100_000}))
    assert len(str(refused.value)) < 300


@given(
    st.integers(protocol.H264, protocol.PREVIEW),
    st.binary(max_size=64),
    st.booleans(),
    st.integers(0, 255),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**32 - 1),
)
def test_a_frame_arrives(kind: int, data: bytes, key: bool, stream: int, chunk: int, number: int) -> None:
    frame = Frame(kind, data, key, stream, chunk, number)
    assert Frame.read(frame.pack()) == frame


def test_a_stream_may_go_on_for_longer_than_its_numbers() -> None:
    frame = Frame.read(Frame(JPEG, b"x", True, stream=257, chunk=2**32 + 3, number=2**40).pack())
    assert (frame.stream, frame.chunk, frame.number) == (1, 3, 0)


@pytest.mark.parametrize("message", [b"", b"x" * (HEADER.size - 1), b"\x02\x01" + bytes(10), b"\x01\x09" + bytes(10)])
def test_what_is_no_frame_is_refused(message: bytes) -> None:
    with pytest.raises(ProtocolError):
        Frame.read(message)


def test_the_ways_to_switch_are_the_sessions() -> None:
    assert protocol.How == switching.How


def test_the_page_and_the_server_agree_on_the_protocol() -> None:
    page = (Path(protocol.__file__).parent / "page/wire.js").read_text("utf-8")
    assert f"VERSION = {protocol.VERSION};" in page
    assert f"HEADER = {HEADER.size};" in page
    kinds = ("H264", "JPEG", "PICTURE", "CLIP", "CAMERA", "PREVIEW")
    assert "const " + ", ".join(f"{kind} = {getattr(protocol, kind)}" for kind in kinds) + ";" in page
    assert f"CLIP_PART = {protocol.CLIP_PART};" in page


def test_a_client_needs_neither_torch_nor_a_web_framework() -> None:
    source = "import sys, sfrt.server.client; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=True)
    assert {"torch", "numpy", "starlette", "uvicorn", "websockets"}.isdisjoint(done.stdout.split())


def moving_square(frames: int = 6, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    video = np.full((frames, height, width, 3), (20, 40, 220), np.uint8)
    for number in range(frames):
        video[number, 16:48, 8 * number : 8 * number + 32] = (230, 60, 20)
    return video


def decoded(kind: int, pictures: list[bytes]) -> NDArray[np.uint8]:
    import av
    from PIL import Image

    if kind == JPEG:
        return np.stack([np.array(Image.open(io.BytesIO(data))) for data in pictures])
    decoder: Any = av.CodecContext.create("h264", "r")
    frames = [frame for data in pictures for frame in decoder.decode(av.Packet(data))] + decoder.decode(None)
    return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


@pytest.mark.parametrize("codec", ["h264", "jpeg"])
def test_what_is_encoded_can_be_seen(codec: protocol.Codec) -> None:
    frames = moving_square()
    encoder = encoder_for(codec, width=96, height=64, fps=16)
    pictures = [picture for part in np.split(frames, 3) for picture in encoder.encode(part)]
    assert len(pictures) == len(frames)
    seen = decoded(encoder.kind, [picture.data for picture in pictures])
    assert np.abs(seen.astype(int) - frames).mean() < 6


def test_h264_can_be_joined_where_a_key_frame_was_asked_for() -> None:
    frames = moving_square(8)
    encoder = H264Encoder(96, 64, 16)
    before = encoder.encode(frames[:4])
    encoder.start_over()
    after = encoder.encode(frames[4:])
    assert [picture.key for picture in before + after] == [True, False, False, False] * 2
    seen = decoded(encoder.kind, [picture.data for picture in after])
    assert np.abs(seen.astype(int) - frames[4:]).mean() < 6


def test_messages_are_slowed_down_and_not_lost() -> None:
    now = 0.0
    allowance = Allowance(rate=10, most=3, clock=lambda: now)
    assert [allowance.take() for _ in range(5)] == pytest.approx([0, 0, 0, 0.1, 0.2])
    now = 100.0
    assert [allowance.take() for _ in range(4)] == pytest.approx([0, 0, 0, 0.1])


@pytest.mark.parametrize(("name", "value"), [("sessions", 0), ("idle_s", float("nan")), ("record_s", -1.0)])
def test_an_impossible_limit_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"the limit {name} is"):
        Limits(**{name: value})


@pytest.mark.parametrize(
    ("host", "origin", "local", "admitted"),
    [
        ("localhost:8000", None, True, True),
        ("127.0.0.1:8000", "http://127.0.0.1:8000", True, True),
        ("[::1]:8000", "http://[::1]:8000", True, True),
        ("127.0.0.1:8000", "http://evil.example", True, False),
        ("127.0.0.1:8000", "null", True, False),
        ("evil.example:8000", "http://evil.example:8000", True, False),  # a name that resolves to 127.0.0.1
        ("", None, True, False),
        ("192.168.1.7:8000", "http://192.168.1.7:8000", False, True),
        ("192.168.1.7:8000", "https://friend.example", False, True),
        ("192.168.1.7:8000", "https://evil.example", False, False),
    ],
)
def test_who_is_let_in(host: str, origin: str | None, local: bool, admitted: bool) -> None:
    access = Access(origins=("https://friend.example",), local=local)
    headers = {"host": host} if origin is None else {"host": host, "origin": origin}
    assert access.admits(headers) is admitted


def test_the_token_is_asked_for() -> None:
    access = Access(token="häßlich")
    assert access.knows("häßlich")
    assert not access.knows("")
    assert not access.knows("\ud800")
    assert access.bearer({"authorization": "Bearer häßlich"})
    assert not access.bearer({})
    assert Access().knows("anything")


@pytest.mark.parametrize(("host", "local"), [("127.0.0.5", True), ("::1", True), ("0.0.0.0", False), ("::", False)])
def test_which_addresses_are_this_machine(host: str, local: bool) -> None:
    assert is_local(host) is local


def test_recordings_are_so_long_and_so_many(tmp_path: Path) -> None:
    recordings = Recordings(tmp_path, most=2)
    names = []
    for _ in range(3):
        recorder = recordings.begin(width=96, height=64, fps=16, seconds=0.5)
        assert recorder.write(moving_square(6))
        assert not recorder.write(moving_square(6))
        assert recorder.frames == 8
        assert recorder.finish()
        names.append(recordings.keep(recorder))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names[1:])
    assert recordings.find(names[0]) is None
    assert recordings.find("../" + names[1]) is None
    assert recordings.find(names[2]) == tmp_path / names[2]


def test_a_picture_is_brought_to_size_and_nothing_else_is_read() -> None:
    from PIL import Image

    data = io.BytesIO()
    Image.new("RGBA", (300, 100), (255, 0, 0, 255)).save(data, "PNG")
    pixels = pixels_of(data.getvalue(), height=32, width=48)
    assert pixels.shape == (1, 3, 32, 48)
    assert pixels[0, :, 16, 24].tolist() == [1, 0, 0]
    for other in (b"", b"#EXTM3U\nfile:///etc/passwd\n", data.getvalue()[:40]):
        with pytest.raises(MediaError, match="is no picture that can be read"):
            pixels_of(other, height=32, width=48)


def test_a_picture_that_would_fill_memory_is_refused() -> None:
    from PIL import Image

    data = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(data, "PNG")
    with pytest.raises(MediaError):
        pixels_of(data.getvalue(), height=32, width=48)
