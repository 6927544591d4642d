"""The other end of the protocol in Python; needs the websockets library, and no torch.

async with Client.connect("ws://127.0.0.1:8000/stream") as client:
await client.say(Start("a red circle moving left on a white background", seed=1))
async for message in client:
match message:
case Frame():
picture = message.data  # a JPEG, or H.264 where codec="h264" was asked for
case ChunkNews() if message.index == 8:
await client.say(Prompt("a blue square bouncing on a black background"))
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from sfrt.errors import ProtocolError
from sfrt.server.protocol import (
    CAMERA,
    CLIP,
    CLIP_PART,
    PICTURE,
    VERSION,
    Bye,
    Codec,
    Frame,
    FromClient,
    FromServer,
    Hello,
    Wanted,
    Welcome,
    from_server,
    text_of,
)

if TYPE_CHECKING:
    from websockets.asyncio.client import ClientConnection

_LARGEST = 64 * 2**20
"""Of a message; a picture of 4K is smaller."""


class Client:
    """One connection that has been let in. Iterating it gives what the server says and shows.

    It ends when the server hangs up, and raises ProtocolError where the connection breaks off without a bye.

    Attributes: welcome (the model and the limits), farewell (why the server closed, once it has).
    """

    def __init__(self, socket: ClientConnection, welcome: Welcome) -> None:
        """Made by `connect`."""
        self._socket = socket
        self._camera = Wanted(0, 0)
        self._filmed = 0
        self.welcome = welcome
        self.farewell: Bye | None = None

    @classmethod
    @asynccontextmanager
    async def connect(
        cls, url: str, *, token: str = "", codec: Codec = "jpeg", timeout: float = 10.0
    ) -> AsyncIterator[Client]:
        """Say hello at ws://host:port/stream.

        Raises ProtocolError where the server says bye instead of welcome, OSError or TimeoutError where there is none.
        """
        from websockets.asyncio.client import connect

        async with connect(url, max_size=_LARGEST, open_timeout=timeout, max_queue=64, compression=None) as socket:
            await socket.send(text_of(Hello(VERSION, token, codec)))
            first = await socket.recv()
            answer = from_server(first) if isinstance(first, str) else None
            if isinstance(answer, Bye):
                raise ProtocolError(f"the server said bye ({answer.why}): {answer.message}")
            if not isinstance(answer, Welcome):
                raise ProtocolError("the server's first message was no welcome; is this an sfrt server?")
            yield cls(socket, answer)

    async def say(self, message: FromClient) -> None:
        """Send a message; answers come where this is iterated. Raises ProtocolError where the server has gone."""
        await self._send(text_of(message))

    async def send_picture(self, data: bytes) -> None:
        """A picture file that the next Start with picture=True begins from. Raises as `say`."""
        await self._send(Frame(PICTURE, data).pack())

    async def send_clip(self, data: bytes) -> None:
        """An MP4, MOV or WebM file that the next Start with source="clip" goes by. Raises as `say`."""
        starts = range(0, max(len(data), 1), CLIP_PART)
        for number, start in enumerate(starts):
            part = data[start : start + CLIP_PART]
            await self._send(Frame(CLIP, part, number == len(starts) - 1, number=number).pack())

    async def send_camera(self, jpeg: bytes) -> bool:
        """The camera's next frame, a JPEG of the model's size, for a stream with source="camera".

        False, and it is not sent, while enough of them are on their way: show the next one when there is a next one.
        What the server wants is heard where this is iterated. Raises as `say`.
        """
        if self._filmed >= self._camera.until:
            return False
        number, self._filmed = self._filmed, self._filmed + 1
        await self._send(Frame(CAMERA, jpeg, stream=self._camera.stream, number=number).pack())
        return True

    def __aiter__(self) -> AsyncIterator[FromServer | Frame]:
        return self._messages()

    async def _messages(self) -> AsyncIterator[FromServer | Frame]:
        from websockets.exceptions import ConnectionClosedError

        try:
            async for message in self._socket:
                heard = Frame.read(message) if isinstance(message, bytes) else from_server(message)
                if isinstance(heard, Bye):
                    self.farewell = heard
                elif isinstance(heard, Wanted):
                    if heard.stream != self._camera.stream:
                        self._filmed = 0
                    self._camera = heard
                yield heard
        except ConnectionClosedError as error:
            if self.farewell is None:
                raise ProtocolError(f"the connection broke off ({error}); connect again") from None

    async def _send(self, message: str | bytes) -> None:
        from websockets.exceptions import ConnectionClosed

        try:
            await self._socket.send(message)
        except ConnectionClosed:
            why = "" if self.farewell is None else f" ({self.farewell.message})"
            raise ProtocolError(f"the server has closed the connection{why}; connect again") from None
