"""One connection, from its hello to its bye: what the client asks for is done here."""

from __future__ import annotations

import asyncio
import re
import time
import unicodedata
from collections.abc import Coroutine
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from sfrt.errors import AdmissionError, ConfigError, MediaError, PromptError, ProtocolError, SfrtError
from sfrt.server.beginning import beginning_of
from sfrt.server.encoding import encoder_for
from sfrt.server.line import Line
from sfrt.server.protocol import (
    CAMERA,
    CLIP,
    PICTURE,
    VERSION,
    Frame,
    FromClient,
    Hello,
    Keep,
    Keyframe,
    Pause,
    Prompt,
    Queued,
    Record,
    Refusal,
    Refused,
    Restore,
    Resume,
    Rewind,
    Rewound,
    Start,
    Started,
    State,
    Stop,
    Watch,
    Welcome,
)
from sfrt.server.service import Farewell, Service
from sfrt.server.show import Show
from sfrt.server.uploads import Uploads
from sfrt.text import clean_prompt

_LOOK_S = 0.25
"""How often the time limits are looked at."""
_FOLDERS = re.compile(r"(?<!\S)/\S*/")
"""Of the server's files viewers are told the names alone."""


class Viewer:
    """`run` ends when the viewer has gone, whoever left, and then nothing of it is left."""

    def __init__(self, socket: WebSocket, service: Service) -> None:
        self._service = service
        self._limits = service.limits
        self._line = Line(socket, service.limits, service.model.fps)
        self._codec = Hello(VERSION).codec
        self._uploads = Uploads(service.limits)
        self._watching = False
        self._show: Show | None = None
        self._shows: asyncio.Queue[Show] = asyncio.Queue()
        self._number = 0
        self._dismissal: asyncio.Queue[Farewell] = asyncio.Queue()
        self._gone = asyncio.Event()

    async def run(self) -> None:
        """The socket has been accepted."""
        try:
            await self._greet()
            async with self._service.place(self):
                await self._line.say(Welcome(VERSION, self._service.model, self._service.bounds))
                try:
                    await _first_of(self._listen(), self._deliver(), self._watch_the_time(), self._be_dismissed())
                finally:
                    await self._tidy_up()
        except Farewell as farewell:
            self._service.telemetry.turned_away.labels(farewell.why).inc()
            await self._line.hang_up(farewell)
        except WebSocketDisconnect:
            pass  # it has left, as viewers do
        finally:
            self._gone.set()

    async def dismiss(self, farewell: Farewell) -> None:
        """Say goodbye and be gone; returns when that is done."""
        self._dismissal.put_nowait(farewell)
        await self._gone.wait()

    async def _greet(self) -> None:
        """Raises Farewell for a client that does not say who it is, or says it wrongly."""
        try:
            hello = await asyncio.wait_for(self._line.hear(), self._limits.hello_s)
        except (TimeoutError, asyncio.TimeoutError):
            raise Farewell("protocol", f"no hello came within {self._limits.hello_s:g} s") from None
        except ProtocolError as error:
            raise Farewell("protocol", str(error)) from None
        if not isinstance(hello, Hello):
            raise Farewell("protocol", "the first message must be a hello")
        if hello.version != VERSION:
            raise Farewell("protocol", f"the client speaks version {hello.version} and this server {VERSION}")
        if not self._service.access.knows(hello.token):
            raise Farewell("token", "this server asks for a token, and that was not it")
        self._codec = hello.codec

    async def _listen(self) -> None:
        while True:
            try:
                message = await self._line.hear()
                if isinstance(message, Frame):
                    await self._receive(message)
                else:
                    await self._do(message)
            except SfrtError as error:
                await self._refuse(_about(error), error)

    async def _receive(self, frame: Frame) -> None:
        """Raises MediaError for what is left out, ProtocolError for what is not a client's to send."""
        if frame.kind == CAMERA:
            if self._show is not None:
                await self._show.film(frame)
        elif frame.kind in (PICTURE, CLIP):
            await asyncio.to_thread(self._uploads.take, frame)
        else:
            raise ProtocolError("a client sends frames of the kinds 3 (picture), 4 (clip) and 5 (camera) only")

    async def _do(self, message: FromClient) -> None:
        """Raises SfrtError for what cannot be done; then nothing has changed."""
        if isinstance(message, Hello):
            raise ProtocolError("hello was said already")
        if isinstance(message, Start | Restore):
            await self._start(message)
            return
        if isinstance(message, Watch):
            self._watching = message.on
            if self._show is not None:
                self._show.watch(message.on)
            return
        show = self._show
        if show is None:
            raise ConfigError("nothing is playing; send start first")
        if isinstance(message, Prompt):
            self._check_prompt(message.prompt)
            await asyncio.to_thread(show.stream.session.switch, message.prompt, message.how, message.over)
            await self._line.say(Queued(message.prompt, message.how))
        elif isinstance(message, Pause):
            show.pause()
            await self._line.say(State("paused"))
        elif isinstance(message, Resume):
            show.resume()
            await self._line.say(State("playing"))
        elif isinstance(message, Stop):
            await self._stop()
            await self._line.say(State("stopped"))
        elif isinstance(message, Rewind):
            await show.rewind(message.chunk, self._limits.rewind_chunks)
            await self._line.say(Rewound(message.chunk))
        elif isinstance(message, Record):
            if message.on:
                await show.record()
            else:
                await self._line.say(await show.finish_recording())
        elif isinstance(message, Keep):
            await self._line.say(await show.keep())
        elif isinstance(message, Keyframe):
            show.refresh_picture()

    async def _start(self, message: Start | Restore) -> None:
        if isinstance(message, Start):
            self._check_prompt(message.prompt)
        model = self._service.model
        beginning = await asyncio.to_thread(beginning_of, message, self._service, self._uploads)
        encoder = encoder_for(self._codec, width=model.width, height=model.height, fps=model.fps)
        await self._stop()
        try:
            stream = await beginning.open()
        except SfrtError:
            await self._line.say(State("stopped"))
            raise
        self._number += 1
        self._show = Show(self._number, stream, beginning, encoder, self._line, self._service)
        self._show.watch(self._watching)
        await self._line.say(Started(self._number, beginning.prompt, beginning.seed))
        self._shows.put_nowait(self._show)

    async def _stop(self) -> None:
        """End what plays; a recording of it is complete then."""
        show, self._show = self._show, None
        if show is not None:
            show.close()
            recording = await show.finish_recording()
            if recording.path is not None or recording.reason is not None:
                await self._line.say(recording)

    async def _tidy_up(self) -> None:
        """Leave nothing behind, whatever broke off."""
        self._uploads.close()
        show, self._show = self._show, None
        if show is not None:
            show.close()
            await show.finish_recording()

    async def _deliver(self) -> None:
        """One stream after the other; one that fails is told of, and the connection goes on."""
        while True:
            show = await self._shows.get()
            try:
                await show.run()
            except (WebSocketDisconnect, Farewell):
                raise
            except Exception as error:  # whatever a backend raises: it is this stream's end, and no other's
                self._service.telemetry.failures.inc()
                await self._refuse("stream", error)
            if show is self._show:
                await self._stop()
                await self._line.say(State("stopped"))

    async def _watch_the_time(self) -> None:
        began, limits = time.monotonic(), self._limits
        while True:
            await asyncio.sleep(_LOOK_S)
            now = time.monotonic()
            if now - self._line.heard_at > limits.idle_s:
                raise Farewell("idle", f"nothing was asked for in {limits.idle_s:g} s; connect again to go on")
            if limits.longest_s and now - began > limits.longest_s:
                raise Farewell("over", f"a visit lasts {limits.longest_s:g} s here; connect again for another one")

    async def _be_dismissed(self) -> None:
        raise await self._dismissal.get()

    async def _refuse(self, about: Refusal, error: Exception) -> None:
        self._service.telemetry.refused.labels(about).inc()
        known = isinstance(error, SfrtError)
        message = str(error) if known else f"the stream failed ({type(error).__name__}); start it again"
        message = _FOLDERS.sub("", message)
        await self._line.say(Refused(about, message))

    def _check_prompt(self, prompt: str) -> None:
        """Raise PromptError for one that is empty, too long, or would write over a terminal that prints it."""
        most = self._limits.prompt_characters
        if len(prompt) > most:
            raise PromptError(f"the prompt has {len(prompt)} characters; {most} are the most that this server takes")
        for place, character in enumerate(prompt):
            if unicodedata.category(character) in ("Cc", "Cs") and not character.isspace():
                raise PromptError(f"the prompt has a control character, U+{ord(character):04X}, at {place}; drop it")
        clean_prompt(prompt)


def _about(error: SfrtError) -> Refusal:
    kinds: tuple[tuple[type[SfrtError], Refusal], ...] = (
        (ProtocolError, "message"),
        (PromptError, "prompt"),
        (MediaError, "picture"),
        (AdmissionError, "stream"),
    )
    return next((about for kind, about in kinds if isinstance(error, kind)), "state")


async def _first_of(*works: Coroutine[Any, Any, None]) -> None:
    """Run all until the first of them ends, which is the end of all; what it raised is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    for task in done:
        task.result()
