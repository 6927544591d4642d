"""A WebSocket as the protocol's messages: sizes, pace and patience are kept here."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from contextlib import suppress

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from sfrt.errors import ProtocolError
from sfrt.server.limits import Allowance, Limits
from sfrt.server.protocol import CAMERA, Bye, Frame, FromClient, FromServer, from_client, text_of
from sfrt.server.service import Farewell

_GOODBYE_S = 2.0
"""How long the last words may take: whoever does not read them is gone."""
_GOING_AWAY, _POLICY = 1001, 1008
_CAMERA = bytes([CAMERA])
"""In the second byte of a binary message."""


class Line:
    """Both directions; several tasks may send, one listens."""

    def __init__(self, socket: WebSocket, limits: Limits, fps: int) -> None:
        """fps is how many of a camera's frames a stream goes through in a second."""
        self._socket = socket
        self._limits = limits
        self._words = Allowance(limits.messages_per_s, 2 * limits.messages_per_s)
        self._pictures = Allowance(1.5 * fps, 3 * fps)
        self.heard_at = time.monotonic()

    async def hear(self) -> FromClient | Frame:
        """The client's next message. Raises ProtocolError for what is none, WebSocketDisconnect when it has gone.

        One that talks too fast is listened to more slowly: its messages wait with it, not here.
        """
        event = await self._socket.receive()
        if event["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(event.get("code", _GOING_AWAY))
        self.heard_at = time.monotonic()
        if (data := event.get("bytes")) is not None:
            camera = data[1:2] == _CAMERA
            await asyncio.sleep((self._pictures if camera else self._words).take())
            return Frame.read(data)
        await asyncio.sleep(self._words.take())
        text: str = event["text"]
        if len(text) > self._limits.message_characters:
            raise ProtocolError(
                f"the message has {len(text)} characters; {self._limits.message_characters} are the most of one"
            )
        return from_client(text)

    async def say(self, message: FromServer) -> None:
        """Raises WebSocketDisconnect when the client has gone, Farewell when it does not read."""
        await self._patiently(self._socket.send_text(text_of(message)))

    async def send(self, frame: Frame) -> None:
        """As `say`."""
        await self._patiently(self._socket.send_bytes(frame.pack()))

    async def hang_up(self, farewell: Farewell) -> None:
        """Say why, and close. Never raises, and never takes long."""
        code = _GOING_AWAY if farewell.why == "shutdown" else _POLICY
        with suppress(TimeoutError, asyncio.TimeoutError, WebSocketDisconnect, OSError, RuntimeError):
            if self._socket.application_state is WebSocketState.CONNECTED:
                last_words = text_of(Bye(farewell.why, str(farewell)))
                await asyncio.wait_for(self._socket.send_text(last_words), _GOODBYE_S)
                await asyncio.wait_for(self._socket.close(code, farewell.why), _GOODBYE_S)

    async def _patiently(self, sending: Awaitable[None]) -> None:
        try:
            await asyncio.wait_for(sending, self._limits.slow_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise Farewell(
                "slow", f"nothing was read for {self._limits.slow_s:g} s; connect again on a faster network"
            ) from None
        except (OSError, RuntimeError):  # how a closed socket shows depends on the moment
            raise WebSocketDisconnect(_GOING_AWAY) from None
