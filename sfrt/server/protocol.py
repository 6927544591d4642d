"""The WebSocket protocol, version 1: control as JSON text, frames as binary. Loads neither torch nor a web framework.

A client connects to /stream and says `hello` with the version, the server's token if it has one, and the codec it can
show. The server answers with `welcome`, which tells the model and the limits. From then on:

    client   start     a stream of a prompt and a seed; one that runs is ended. `picture`: from the picture sent before;
                       `source`: by the camera's frames, or by the clip sent before (video to video)
             prompt    another prompt from the next chunk on; one that has not taken effect gives way to a later one
             pause, resume, stop
             rewind    back to a chunk that was sent, with the prompt of then
             record    keep what is delivered from now on as an mp4 on the server, or finish it
             keyframe  ask for a frame that can be shown without those before it
             watch     ask for previews of the steps with every chunk, or for no more of them
             keep      have the server keep where the stream stands
             restore   a stream that goes on from what was kept; one that runs is ended
             binary    Frames of kind PICTURE: a picture file; CLIP: part of an MP4, MOV or WebM file, numbered from 0,
                       `key` on the last; CAMERA: a JPEG of the model's size, numbered from 0, with its stream's number
    server   started   the stream's number; every frame and chunk carries it, so that late ones can be told apart
             queued    a prompt switch was taken; its receipt comes with the `chunk` that it takes effect in
             chunk     figures of a chunk, just before its frames
             state     playing, paused or stopped, as of now
             rewound   the index of the next chunk
             wanted    how many of the camera's frames may be sent in all; a later one is not read
             kept      the name to restore by, and for how long it is good
             recording on, or off with the path to fetch the file from, or with the reason why it broke off
             error     what was refused, in one sentence; the connection and the stream go on
             bye       why the connection is closed, right before it is
             binary    Frames of kind H264 (Annex B, one access unit each) or JPEG; PREVIEW: a JPEG of what a step took
                       the chunk's last latent frame to be, numbered by step, before the chunk's own frames

A message is one JSON object whose `kind` is one of these words; its other keys are the fields of the classes below, and
those with a default may be left out. Unknown keys are refused. A Frame is HEADER, big-endian, and then its bytes.

What is added keeps the version as long as a client that does not know it is never sent it unasked, and may leave it
out. (The welcome's bounds have grown without a new version, as no release had been made of the first one.)
"""

from __future__ import annotations

import json
import struct
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal, TypeVar, get_args, get_type_hints

from sfrt.bundle.schema import SchemaError, from_json, to_json
from sfrt.errors import ProtocolError

VERSION = 1
PATH = "/stream"

Codec = Literal["h264", "jpeg"]
How = Literal["recache", "cross", "blend"]
"""As in sfrt.switching, which loads torch."""
Playing = Literal["playing", "paused", "stopped"]
Refusal = Literal["message", "prompt", "picture", "state", "stream"]
"""What was refused; "picture" is whatever was sent to start from or to go by."""
FootageKind = Literal["none", "camera", "clip"]
Closing = Literal["token", "protocol", "full", "idle", "over", "slow", "shutdown", "failure"]

H264, JPEG, PICTURE, CLIP, CAMERA, PREVIEW = 1, 2, 3, 4, 5, 6
HEADER = struct.Struct(">BBBBII")
"""version, kind, key (1: decodes without frames before it), stream modulo 256, chunk, frame of the stream."""
CLIP_PART = 256 * 1024
"""Bytes of a clip that a client sends at once, so that what else it says need not wait for all of it."""


@dataclass(frozen=True)
class Hello:
    """The first message of a connection."""

    version: int
    token: str = ""
    codec: Codec = "h264"
    kind: Literal["hello"] = "hello"


@dataclass(frozen=True)
class Start:
    """A new stream, in place of one that plays.

    strength, above 0 and up to 1, is how far to change a source; it counts in steps of 0.05.
    """

    prompt: str
    seed: int = 0
    picture: bool = False
    source: FootageKind = "none"
    strength: float = 0.6
    kind: Literal["start"] = "start"


@dataclass(frozen=True)
class Prompt:
    """over is the number of chunks that a blend takes."""

    prompt: str
    how: How = "recache"
    over: int = 1
    kind: Literal["prompt"] = "prompt"


@dataclass(frozen=True)
class Pause:
    """Hold the stream, and what of it is on its way."""

    kind: Literal["pause"] = "pause"


@dataclass(frozen=True)
class Resume:
    """Go on where it was paused."""

    kind: Literal["resume"] = "resume"


@dataclass(frozen=True)
class Stop:
    """End the stream."""

    kind: Literal["stop"] = "stop"


@dataclass(frozen=True)
class Rewind:
    """Go back: chunk is the index of the one to be made next, again."""

    chunk: int
    kind: Literal["rewind"] = "rewind"


@dataclass(frozen=True)
class Record:
    """Begin a recording, or finish it."""

    on: bool
    kind: Literal["record"] = "record"


@dataclass(frozen=True)
class Keyframe:
    """Ask for a frame that needs none before it."""

    kind: Literal["keyframe"] = "keyframe"


@dataclass(frozen=True)
class Watch:
    """Ask for previews, or for no more."""

    on: bool
    kind: Literal["watch"] = "watch"


@dataclass(frozen=True)
class Keep:
    """Have the stream kept as it stands."""

    kind: Literal["keep"] = "keep"


@dataclass(frozen=True)
class Restore:
    """Go on from what was kept under this name."""

    name: str
    kind: Literal["restore"] = "restore"


@dataclass(frozen=True)
class Model:
    """What streams. sigmas are the noise levels of a chunk's steps, first_sigmas those of the first chunk.

    window and sink are in latent frames; chunk_frames are the pixel frames of a chunk but the first.
    """

    name: str
    device: str
    backend: str
    width: int
    height: int
    fps: int
    chunk: int
    chunk_frames: int
    window: int
    sink: int
    sigmas: tuple[float, ...]
    first_sigmas: tuple[float, ...]


@dataclass(frozen=True)
class Bounds:
    """What a client may ask for; seconds, bytes, characters, chunks. A length of 0 s is unlimited.

    snapshots is how many streams are kept for all clients together, the newest.
    """

    prompt_characters: int
    picture_bytes: int
    idle_s: float
    longest_s: float
    record_s: float
    rewind_chunks: int
    clip_bytes: int
    snapshots: int


@dataclass(frozen=True)
class Welcome:
    """The client is let in."""

    version: int
    model: Model
    bounds: Bounds
    kind: Literal["welcome"] = "welcome"


@dataclass(frozen=True)
class Started:
    """A stream has begun; frames carry its number modulo 256."""

    stream: int
    prompt: str
    seed: int
    kind: Literal["started"] = "started"


@dataclass(frozen=True)
class Wanted:
    """Of the camera's frames for this stream, those numbered below `until` may be sent."""

    stream: int
    until: int
    kind: Literal["wanted"] = "wanted"


@dataclass(frozen=True)
class Kept:
    """A stream was kept just before `chunk` was made; the name is good for so many seconds, if not for less."""

    name: str
    prompt: str
    chunk: int
    seconds: float
    kind: Literal["kept"] = "kept"


@dataclass(frozen=True)
class Queued:
    """A switch was taken."""

    prompt: str
    how: How
    kind: Literal["queued"] = "queued"


@dataclass(frozen=True)
class SwitchReceipt:
    """A prompt switch in effect; ms is the work it made."""

    prompt: str
    how: How
    over: int
    ms: float


@dataclass(frozen=True)
class Slot:
    """One slot of the ring: the latent frame it holds, None while it is empty; written: by this chunk."""

    frame: int | None
    sink: bool
    written: bool


@dataclass(frozen=True)
class Times:
    """Milliseconds of a chunk by what they were spent on."""

    refresh: float
    switch: float
    encode: float
    denoise: float
    decode: float


@dataclass(frozen=True)
class ChunkNews:
    """A chunk that is about to be shown.

    frame is the number of its first pixel frame in what was delivered, frames how many there are; chunk_ms is what
    making it took, deadline_ms the time it plays for; attained is the share of chunks that were ready in time; waiting
    are the chunks made ahead; memory is in bytes, of the process and of the device (None on a CPU).
    """

    stream: int
    index: int
    frame: int
    frames: int
    chunk_ms: float
    deadline_ms: float
    attained: float
    times: Times
    slots: tuple[Slot, ...]
    waiting: int
    room: int
    process_bytes: int | None
    device_bytes: int | None
    receipt: SwitchReceipt | None
    kind: Literal["chunk"] = "chunk"


@dataclass(frozen=True)
class State:
    """What plays."""

    playing: Playing
    kind: Literal["state"] = "state"


@dataclass(frozen=True)
class Rewound:
    """chunk is the index of the next one."""

    chunk: int
    kind: Literal["rewound"] = "rewound"


@dataclass(frozen=True)
class Recording:
    """path is where a finished recording can be fetched; reason why it was not kept, or ended early."""

    on: bool
    path: str | None = None
    reason: str | None = None
    kind: Literal["recording"] = "recording"


@dataclass(frozen=True)
class Refused:
    """Something was not done; nothing has changed."""

    about: Refusal
    message: str
    kind: Literal["error"] = "error"


@dataclass(frozen=True)
class Bye:
    """The last message of a connection."""

    why: Closing
    message: str
    kind: Literal["bye"] = "bye"


FromClient = Hello | Start | Prompt | Pause | Resume | Stop | Rewind | Record | Keyframe | Watch | Keep | Restore
FromServer = Welcome | Started | Wanted | Kept | Queued | ChunkNews | State | Rewound | Recording | Refused | Bye


@dataclass(frozen=True)
class Frame:
    """A binary message; numbers that its kind does not use are 0."""

    kind: int
    data: bytes
    key: bool = True
    stream: int = 0
    chunk: int = 0
    number: int = 0

    def pack(self) -> bytes:
        """The message; numbers are taken modulo what their fields hold."""
        whole = self.stream % 2**8, self.chunk % 2**32, self.number % 2**32
        return HEADER.pack(VERSION, self.kind, self.key, *whole) + self.data

    @classmethod
    def read(cls, message: bytes) -> Frame:
        """What pack made. Raises ProtocolError."""
        if len(message) < HEADER.size:
            raise ProtocolError(f"a binary message of {len(message)} bytes is no frame; its header has {HEADER.size}")
        version, kind, key, stream, chunk, number = HEADER.unpack_from(message)
        if version != VERSION or kind not in range(H264, PREVIEW + 1):
            raise ProtocolError(f"a frame of version {version} and kind {kind} is unknown; this is version {VERSION}")
        return cls(kind, message[HEADER.size :], bool(key), stream, chunk, number)


def text_of(message: FromClient | FromServer) -> str:
    """The JSON of a message."""
    return json.dumps(to_json(message), ensure_ascii=False, separators=(",", ":"))


T = TypeVar("T")


def from_client(text: str) -> FromClient:
    """What a client said. Raises ProtocolError for anything that is no message of it."""
    message: FromClient = _read(text, get_args(FromClient))
    return message


def from_server(text: str) -> FromServer:
    """What a server said. Raises ProtocolError for anything that is no message of it."""
    message: FromServer = _read(text, get_args(FromServer))
    return message


def _read(text: str, classes: tuple[type[T], ...]) -> T:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise ProtocolError("the message is no JSON; send one object with a `kind`") from None
    if not isinstance(data, dict):
        raise ProtocolError("the message is no JSON object; send one with a `kind`")
    kinds = {_kind_of(one): one for one in classes}
    kind = data.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise ProtocolError(f"the message's kind is none of: {', '.join(kinds)}")
    try:
        message: T = from_json(kinds[kind], {**_defaults(kinds[kind]), **data})
    except SchemaError as error:
        raise ProtocolError(f"the message {kind!r} does not fit: {_shortened(str(error))}") from None
    return message


def _kind_of(one: type[Any]) -> str:
    (kind,) = get_args(get_type_hints(one)["kind"])
    return str(kind)


def _defaults(one: type[Any]) -> dict[str, Any]:
    return {field.name: field.default for field in fields(one) if field.default is not MISSING}


def _shortened(text: str, most: int = 160) -> str:
    """An error quotes what it is about, which may be as long as a message."""
    return text if len(text) <= most else f"{text[:most]} …"
