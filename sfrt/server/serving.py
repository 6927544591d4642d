"""A service on a socket: opened, announced, and closed in good order."""

from __future__ import annotations

import asyncio
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import current_thread, main_thread

import uvicorn

from sfrt.engine import Engine
from sfrt.errors import ConfigError
from sfrt.runtime import Runtime
from sfrt.server.access import Access, is_local
from sfrt.server.app import create_app
from sfrt.server.limits import Limits
from sfrt.server.recordings import Recordings
from sfrt.server.service import Service

_GRACE_S = 10
"""What is still open so long after the goodbye is cut off."""


@dataclass(frozen=True)
class Address:
    """Where to listen, and who may come. recordings: a folder to keep them in; None: until the server stops."""

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    origins: tuple[str, ...] = ()
    recordings: Path | None = None
    limits: Limits = field(default_factory=Limits)

    @property
    def local(self) -> bool:
        """Whether only this machine can reach it."""
        return is_local(self.host)

    @property
    def open_to_all(self) -> bool:
        """Whether anyone on the network may use it."""
        return not self.local and not self.token

    def url(self, port: int) -> str:
        """The page; the token goes behind #, which browsers keep to themselves."""
        host = "localhost" if self.host in ("0.0.0.0", "::") else self.host
        name = f"[{host}]" if ":" in host else host
        return f"http://{name}:{port}/" + (f"#token={self.token}" if self.token else "")


def serve(runtime: Runtime, address: Address, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; ready is told the page's address. Raises ConfigError where it cannot listen."""
    with ExitStack() as stack:
        listening = stack.enter_context(listen(address))
        folder = address.recordings
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sfrt-recordings-")))
        engine = stack.enter_context(Engine(runtime))
        engine.measure()  # so that the first viewer does not wait for it, and what cannot be streamed fails here
        service = Service(
            runtime,
            engine,
            address.limits,
            Access(address.token, address.origins, address.local),
            Recordings(folder, address.limits.recordings),
        )
        Server(service).run_on(listening, lambda: ready(address.url(listening.getsockname()[1])))


class Server(uvicorn.Server):
    """uvicorn, which says goodbye before it closes the door."""

    def __init__(self, service: Service) -> None:
        limits = service.limits
        super().__init__(
            uvicorn.Config(
                create_app(service),
                log_level="warning",
                ws="websockets-sansio",
                ws_max_size=max(limits.picture_bytes + 64, 4 * limits.message_characters),
                ws_per_message_deflate=False,  # pictures are compressed already
                server_header=False,
                proxy_headers=False,
                timeout_graceful_shutdown=_GRACE_S,
                # Beside the viewers: those who say hello, the page's files, and a probe.
                limit_concurrency=4 * limits.sessions + 64,
            )
        )
        self._service = service

    def run_on(self, listening: socket.socket, ready: Callable[[], None]) -> None:
        """Serve on an open socket until told to stop; ready is called once requests are answered."""
        self._ready = ready
        self.run(sockets=[listening])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        with suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(self._service.goodbye(), _GRACE_S)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server, and nothing else: there is still to be cleaned up behind it."""
        if current_thread() is not main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def listen(address: Address) -> socket.socket:
    """A socket there. Raises ConfigError where there can be none."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address.host} port {address.port} ({error.strerror}); choose another --host or --port"
        ) from error
