"""A server of the built-in model in a thread of its own, and the asking of it."""

from __future__ import annotations

import asyncio
import io
import json
import threading
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from sfrt import Runtime
from sfrt.engine import Engine
from sfrt.server.access import Access
from sfrt.server.client import Client
from sfrt.server.limits import Limits
from sfrt.server.protocol import Codec, Frame, FromServer, Start
from sfrt.server.recordings import Recordings
from sfrt.server.service import Service
from sfrt.server.serving import Address, Server, listen

RED = "a red circle moving left on a white background"
BLUE = "a blue square bouncing on a black background"
WAIT_S = 30.0

SMALL = Limits(
    sessions=3, record_s=1.0, prompt_characters=500, picture_bytes=200_000, clip_bytes=300_000, rewind_chunks=4
)
"""Few chunks to be taken back by: as many are made first, to measure what a stream costs."""

T = TypeVar("T", bound=FromServer | Frame)


def runtime_at(fps: int) -> Runtime:
    """The built-in model, played at a rate of the test's own."""
    runtime = Runtime(device="cpu")
    runtime.stream = replace(runtime.stream, fps=fps)
    return runtime


@dataclass(frozen=True)
class Site:
    """A server as its visitors see it."""

    host: str

    @property
    def url(self) -> str:
        return f"http://{self.host}/"

    def get(self, path: str, **headers: str) -> tuple[int, bytes]:
        """Status and body."""
        request = urllib.request.Request(self.url + path, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def health(self) -> dict[str, Any]:
        _, body = self.get("healthz")
        found: dict[str, Any] = json.loads(body)
        return found

    @asynccontextmanager
    async def client(self, codec: Codec = "jpeg", token: str = "") -> AsyncIterator[Listener]:
        async with Client.connect(f"ws://{self.host}/stream", codec=codec, token=token) as client:
            yield Listener(client)

    @asynccontextmanager
    async def watching(self, prompt: str = RED, codec: Codec = "jpeg") -> AsyncIterator[Listener]:
        """A client whose stream has begun to arrive."""
        async with self.client(codec) as viewer:
            await viewer.client.say(Start(prompt, seed=3))
            await viewer.next(Frame)
            yield viewer


@dataclass(frozen=True)
class Running(Site):
    """A server of this process."""

    service: Service

    def is_empty(self) -> bool:
        """Whether nobody is there, and nothing of those who were."""
        return not self.service.viewers and not self.service.engine.stats().streams


class Listener:
    """A client that waits for what it is asked to wait for, passing over the rest."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.heard: list[FromServer | Frame] = []
        self._messages = client.__aiter__()

    async def next(self, kind: type[T], timeout: float = WAIT_S) -> T:
        """The next message of this kind."""
        while True:
            message = await asyncio.wait_for(self._messages.__anext__(), timeout)
            self.heard.append(message)
            if isinstance(message, kind):
                return message

    async def rest(self, timeout: float = WAIT_S) -> list[FromServer | Frame]:
        """Everything until the server hangs up."""

        async def all_of_it() -> list[FromServer | Frame]:
            return [message async for message in self._messages]

        return await asyncio.wait_for(all_of_it(), timeout)


@contextmanager
def serving(
    runtime: Runtime, folder: Path, limits: Limits | None = None, access: Access | None = None
) -> Iterator[Running]:
    """A server, until the end of the block; then it is stopped as a signal would stop it."""
    with Engine(runtime, capacity=inf) as engine, listen(Address(port=0)) as listening:
        service = Service(
            runtime, engine, limits or Limits(), access or Access(), Recordings(folder, (limits or Limits()).recordings)
        )
        server, started = Server(service), threading.Event()
        thread = threading.Thread(target=server.run_on, args=(listening, started.set))
        thread.start()
        try:
            assert started.wait(WAIT_S)
            yield Running(f"127.0.0.1:{listening.getsockname()[1]}", service)
        finally:
            server.should_exit = True
            thread.join(WAIT_S)
            assert not thread.is_alive(), "the server did not stop"


def finish(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 120))


def mean_colour(frame: Frame) -> list[float]:
    pixels = np.asarray(Image.open(io.BytesIO(frame.data)).convert("RGB"), float)
    return [float(value) for value in pixels.mean(axis=(0, 1))]


def upgrade(host: str, **headers: str) -> bytes:
    lines = {
        "Host": host,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
        **headers,
    }
    return "\r\n".join(["GET /stream HTTP/1.1", *(f"{k}: {v}" for k, v in lines.items()), "", ""]).encode()


def masked(data: bytes) -> bytes:
    """A text message of a client (RFC 6455), under a mask of zeros."""
    if len(data) < 126:
        return bytes([0x81, 0x80 | len(data)]) + bytes(4) + data
    return bytes([0x81, 0xFE]) + len(data).to_bytes(2, "big") + bytes(4) + data
