"""The same server many times behind one address, by Ray Serve: one replica per GPU, on as many machines as there are.

A replica is a whole server, with a model, an engine and places of its own; Ray's proxies pass to it what comes in at
the address. To Ray a WebSocket is one request, so a viewer stays with the replica that heard its hello until the bye,
and nothing of a session is known anywhere else.

Who is sent where: `Idlest` sends what comes to the replica that has the fewest requests in hand, and as those that last
are viewers, that is the one with the most free places. A replica is given more requests at once than it has places,
because the page, the probes and those who say hello must get through when all places are taken; so it is the replica
that turns a viewer away who finds no place, with the reason. That happens where all replicas are full, or where two
come in the same moment for the last place of one: who comes again is sent elsewhere.

What is asked of the address, not of a replica, is asked of all: /metrics tells the figures of every replica, its free
places among them, told apart by the label "replica", and a recording is fetched from whoever keeps it. /healthz is of
the replica that answers: that one does is the health of the whole. Ray asks every replica's device for its health, and
starts the replica anew where there is no answer; its viewers then lose their connection, and find a place at another
replica when they connect again.

Ray's proxy takes what a replica sends and holds it until the viewer has read it, so that the replica does not notice
how slowly that goes. A viewer that reads nothing any more answers no pings, and is let go by the proxy within 40 s; for
one that reads, but more slowly than the video comes, memory is bounded by --longest alone. Not tried yet: several
machines, and replicas on GPUs.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, replace
from io import StringIO
from threading import Event
from types import FrameType
from typing import Any, NoReturn

import ray
from prometheus_client import Metric
from ray import serve
from ray.serve import Deployment
from ray.serve.config import RequestRouterConfig
from ray.serve.handle import DeploymentHandle
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica
from starlette.applications import Starlette

from sfrt.bundle import resolve_model
from sfrt.errors import ConfigError, DeviceError
from sfrt.server.app import create_app
from sfrt.server.serving import GRACE_S, Address, ModelChoice, listen, open_service, signals_go_to
from sfrt.server.telemetry import told_apart

_NAME = "sfrt"
_ASK_S = 5.0
"""How long a replica waits for what the others have to say."""


@dataclass(frozen=True)
class Fleet:
    """Replicas of one server: what each of them runs, and where all of them listen.

    replicas: None is one per GPU of the cluster, or a single one on CPUs. Limits hold for each replica.
    """

    model: ModelChoice
    address: Address
    replicas: int | None = None


class Replica:
    """A server behind Ray's proxies. Its methods are called on the event loop that its application runs on."""

    def __init__(self, fleet: Fleet) -> None:
        self._resources = ExitStack()
        runtime = fleet.model.open()
        self._service = self._resources.enter_context(open_service(runtime, fleet.address))
        self._name: str = serve.get_replica_context().replica_id.unique_id

    def __serve_build_asgi_app__(self) -> Starlette:
        return create_app(self._service, peers=self)

    def __del__(self) -> None:
        self._resources.close()

    # What Ray asks

    async def check_health(self) -> None:
        """Raises where the engine has stopped; Ray counts no answer in time as none."""
        await asyncio.to_thread(self._service.engine.ping)

    # What the replicas ask each other

    async def figures_of_one(self) -> tuple[str, list[Metric]]:
        return self._name, self._service.telemetry.figures()

    async def recording_of_one(self, name: str) -> bytes | None:
        found = self._service.recordings.find(name)
        return None if found is None else found.read_bytes()

    async def goodbye(self) -> None:
        """Let the viewers go in good order."""
        await self._service.goodbye()

    # What the application asks

    async def figures(self) -> bytes:
        """Of all replicas, in Prometheus' text format."""
        return told_apart("replica", await self._ask_all("figures_of_one"))

    async def recording(self, name: str) -> bytes | None:
        """The file that one of the replicas keeps under this name."""
        answers: list[bytes | None] = await self._ask_all("recording_of_one", name)
        return next((answer for answer in answers if answer is not None), None)

    async def _ask_all(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of those that give one: a replica that is dying does not keep the others from being seen."""
        handle = serve.get_deployment_handle(_NAME, _NAME)
        answers = await handle.broadcast(method, *arguments).results_async(timeout_s=_ASK_S, return_exceptions=True)
        return [answer for answer in answers if not isinstance(answer, BaseException)]


class Idlest(RequestRouter):  # type: ignore[misc]
    """Sends a request to the replica with the fewest in hand; those that have as many as they may are passed over.

    Ray chooses so among the replicas that are named here, and asks each of them. It is not to remember the answers, as
    it would by default: viewers come so seldom that it would know of the replica that it used last, and take that one
    for want of knowledge about the others.
    """

    queue_len_response_deadline_s = 1.0
    """A replica on a CPU is busy with making video."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **{**named, "use_replica_queue_len_cache": False})

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        if pending_request is not None:
            pending_request.routing_context.should_backoff = True  # as there are no others to ask at once
        return [candidate_replicas]


def serve_replicas(fleet: Fleet, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM; ready is told the page's address.

    In the Ray cluster that RAY_ADDRESS names or that runs on this machine, or else in one of this machine alone, which
    ends with this. Raises BundleError, ConfigError or DeviceError where that cannot be, and KeyboardInterrupt where a
    signal comes before all replicas answer.
    """
    with listen(fleet.address) as free:
        port: int = free.getsockname()[1]
    fleet = _found_from_anywhere(fleet, port)
    with _cluster(), signals_go_to(_interrupt), _deployed(fleet) as handle:
        ready(fleet.address.url(port))
        with suppress(KeyboardInterrupt):
            Event().wait()
        handle.broadcast("goodbye").results(timeout_s=GRACE_S, return_exceptions=True)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _found_from_anywhere(fleet: Fleet, port: int) -> Fleet:
    """With full paths, as replicas start in other folders. Raises BundleError for a model that is none."""
    folder = resolve_model(fleet.model.model).resolve()
    recordings = fleet.address.recordings
    address = replace(fleet.address, port=port, recordings=recordings and recordings.resolve())
    return replace(fleet, model=replace(fleet.model, model=str(folder)), address=address)


@contextmanager
def _cluster() -> Iterator[None]:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is told to anyone unless it is asked for
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    try:
        yield
    finally:
        with _hushed():
            ray.shutdown()


@contextmanager
def _deployed(fleet: Fleet) -> Iterator[DeploymentHandle]:
    """All replicas, once they answer. Raises ConfigError for what this cluster cannot run, DeviceError if they fail."""
    deployment = deployment_of(fleet, ray.cluster_resources())
    if serve.status().applications:
        raise ConfigError("Ray Serve already runs on this cluster; end that first, with: serve shutdown")
    logs = {"log_level": "WARNING", "enable_access_log": False}
    try:
        serve.start(http_options={"host": fleet.address.host, "port": fleet.address.port}, logging_config=logs)
        try:
            handle = serve.run(deployment.bind(fleet), name=_NAME, logging_config=logs)
        except RuntimeError:
            raise DeviceError(f"the replicas did not start: {_why_it_failed()}") from None
        yield handle
    finally:
        with _hushed():
            serve.shutdown()


def _hushed() -> AbstractContextManager[object]:
    """Ray prints which tasks of its own are broken off by its end."""
    return redirect_stdout(StringIO())


def deployment_of(fleet: Fleet, cluster: Mapping[str, float]) -> Deployment:
    """What Ray is asked for; cluster: the number of each of its resources.

    Raises ConfigError where the cluster has less than that.
    """
    device = fleet.model.device
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"Ray gives each replica a GPU of its own; with --ray, --device is cuda, not {device}")
    gpus, cores = int(cluster.get("GPU", 0)), int(cluster.get("CPU", 0))
    on_gpu = device == "cuda" or (device == "auto" and gpus > 0)
    most = gpus if on_gpu else cores
    replicas = fleet.replicas or (max(1, gpus) if on_gpu else 1)
    if replicas > most:
        what = "GPUs" if on_gpu else "CPU cores"
        raise ConfigError(f"the Ray cluster has {what} for {most} replicas, not for {replicas}; each takes one")
    requests = fleet.address.limits.requests
    return serve.deployment(
        serve.ingress()(Replica),
        name=_NAME,
        num_replicas=replicas,
        ray_actor_options={"num_cpus": 0 if on_gpu else 1, "num_gpus": int(on_gpu)},
        max_ongoing_requests=requests,
        max_queued_requests=requests,
        request_router_config=RequestRouterConfig(request_router_class=Idlest),
        max_constructor_retry_count=1,
        health_check_period_s=2.0,
        graceful_shutdown_wait_loop_s=0.2,
        graceful_shutdown_timeout_s=GRACE_S,
    )


def _why_it_failed() -> str:
    """The last line of the replicas' first traceback."""
    message: str = serve.status().applications[_NAME].deployments[_NAME].message
    return message.strip().splitlines()[-1].strip()
