"""The ASGI application: the page, the stream, and what watches over them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.resources import files

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from starlette.websockets import WebSocket

from sfrt.server.access import Access
from sfrt.server.protocol import PATH
from sfrt.server.service import Peers, Service
from sfrt.server.viewer import Viewer

_HEADERS = {
    # All that the page is made of lies beside it. ws: is for browsers that do not count WebSockets as 'self'.
    "content-security-policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data: blob:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def create_app(service: Service, peers: Peers | None = None) -> Starlette:
    """The application of a service; when it stops it lets the viewers go and closes the engine.

    peers: the servers that share its address; None: it has the address for itself.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.goodbye()
        await asyncio.to_thread(service.engine.close)

    async def stream(socket: WebSocket) -> None:
        await socket.accept()
        await Viewer(socket, service).run()

    async def healthz(request: Request) -> Response:
        state = {
            "status": "stopping" if service.stopping else "ok",
            "model": service.model.name,
            "viewers": len(service.viewers),
            "places": service.limits.sessions,
        }
        return JSONResponse(state, 503 if service.stopping else 200)

    async def metrics(request: Request) -> Response:
        if not service.access.bearer(request.headers):
            return PlainTextResponse("the token is asked for: Authorization: Bearer …\n", 401)
        text = service.telemetry.text() if peers is None else await peers.figures()
        return Response(text, media_type="text/plain; version=0.0.4")

    async def recording(request: Request) -> Response:
        name = request.path_params["name"]
        found = service.recordings.find(name)
        if found is not None:
            return FileResponse(found, media_type="video/mp4", filename=f"sfrt-{name}")
        elsewhere = None if peers is None else await peers.recording(name)
        if elsewhere is None:
            return PlainTextResponse("there is no such recording, or no more\n", 404)
        saved_as = {"content-disposition": f'attachment; filename="sfrt-{name}"'}
        return Response(elsewhere, media_type="video/mp4", headers=saved_as)

    page = str(files("sfrt.server") / "page")
    routes = [
        WebSocketRoute(PATH, stream),
        Route("/healthz", healthz),
        Route("/metrics", metrics),
        Route("/recordings/{name}", recording),
        Mount("/", StaticFiles(directory=page, html=True)),
    ]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.add_middleware(_Door, access=service.access)
    return app


class _Door:
    """Lets in what `Access` admits, and puts the page's headers on what goes out."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if not self._access.admits(Headers(scope=scope)):
            await self._turn_away(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, with_headers)

    async def _turn_away(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await WebSocket(scope, receive, send).close(1008)  # before it is accepted: the client sees status 403
        else:
            refusal = PlainTextResponse("this server answers neither to this name nor to pages of that origin\n", 403)
            await refusal(scope, receive, send)
