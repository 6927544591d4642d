"""A service on a socket: opened, announced, and closed in good order."""

from __future__ import annotations

import asyncio
import signal
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import current_thread, main_thread
from types import FrameType

import uvicorn

from sfrt.bundle import Bundle, resolve_model
from sfrt.engine import Engine
from sfrt.errors import ConfigError
from sfrt.runtime import Runtime
from sfrt.server.access import Access, is_local
from sfrt.server.app import create_app
from sfrt.server.limits import Limits
from sfrt.server.recordings import Recordings
from sfrt.server.service import Service

GRACE_S = 10
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


@dataclass(frozen=True)
class ModelChoice:
    """What to open, as `Runtime` takes it; fps: frames per second that are shown, None for the model's own."""

    model: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    fps: int | None = None

    @property
    def name(self) -> str:
        """What the model calls itself. Raises BundleError where there is none."""
        return Bundle.open(resolve_model(self.model), verify=False).manifest.name

    def open(self) -> Runtime:
        """Raises as `Runtime`."""
        runtime = Runtime(self.model, device=self.device, dtype=self.dtype, backend=self.backend)
        if self.fps is not None:
            runtime.stream = replace(runtime.stream, fps=self.fps)
        return runtime


def serve(runtime: Runtime, address: Address, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; ready is told the page's address. Raises ConfigError where it cannot listen."""
    with listen(address) as listening, open_service(runtime, address) as service:
        Server(service).run_on(listening, lambda: ready(address.url(listening.getsockname()[1])))


@contextmanager
def open_service(runtime: Runtime, address: Address) -> Iterator[Service]:
    """A service as it is to be at this address, with nobody listening there yet."""
    with ExitStack() as stack:
        folder = address.recordings
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sfrt-recordings-")))
        engine = stack.enter_context(Engine(runtime))
        # So that the first viewer does not wait for it, and what cannot be streamed fails here.
        engine.measure(history=address.limits.history)
        yield Service(
            runtime,
            engine,
            address.limits,
            Access(address.token, address.origins, address.local),
            Recordings(folder, address.limits.recordings),
        )


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
                timeout_graceful_shutdown=GRACE_S,
                limit_concurrency=limits.requests,
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
            await asyncio.wait_for(self._service.goodbye(), GRACE_S)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the server, and nothing else: there is still to be cleaned up behind it."""
        with signals_go_to(self.handle_exit):
            yield


@contextmanager
def signals_go_to(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """SIGINT and SIGTERM, for a while; only the main thread has signals, and in any other this does nothing."""
    if current_thread() is not main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def listen(address: Address) -> socket.socket:
    """A socket there. Raises ConfigError where there can be none."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    try:
        return socket.create_server((address.host, address.port), family=family, backlog=128)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address.host} port {address.port} ({error.strerror}); choose another --host or --port"
        ) from error
