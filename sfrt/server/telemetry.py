"""The server's figures for Prometheus, in a registry of its own."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest
from prometheus_client.registry import Collector

from sfrt.machine import resident_memory

_SECONDS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.5, 5.0)


class Telemetry:
    """Counts what viewers do and get; every name begins with sfrt_."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        to = self._registry
        self.viewers = Gauge("sfrt_viewers", "Connections that hold one of the places", registry=to)
        self.places = Gauge("sfrt_places", "Connections that can hold one", registry=to)
        self.free_places = Gauge("sfrt_free_places", "How many more viewers would be let in", registry=to)
        self.load = Gauge("sfrt_load", "The part of the device's tightest stretch of time that is taken", registry=to)
        self.turned_away = Counter("sfrt_turned_away", "Connections that ended with a bye", ["why"], registry=to)
        self.refused = Counter("sfrt_refused", "Messages that were refused", ["about"], registry=to)
        self.chunks = Counter("sfrt_chunks", "Chunks delivered", registry=to)
        self.frames = Counter("sfrt_frames", "Pixel frames delivered", registry=to)
        self.bytes = Counter("sfrt_sent_bytes", "Bytes of pictures sent", registry=to)
        self.waiting = Gauge("sfrt_waiting_chunks", "Chunks that are made and not yet taken to be sent", registry=to)
        self.late = Counter("sfrt_late_chunks", "Chunks that were made after their deadline", registry=to)
        self.switches = Counter("sfrt_prompt_switches", "Prompt switches in effect", ["how"], registry=to)
        self.failures = Counter("sfrt_stream_failures", "Streams that ended with an error", registry=to)
        self.recordings = Counter("sfrt_recordings", "Recordings by how they ended", ["how"], registry=to)
        self.period = Gauge("sfrt_chunk_period_seconds", "How long a chunk plays, and may take", registry=to)
        self.chunk_seconds = Histogram("sfrt_chunk_seconds", "What making a chunk took", buckets=_SECONDS, registry=to)
        memory = Gauge("sfrt_process_resident_bytes", "Main memory held by the server", registry=to)
        memory.set_function(lambda: float(resident_memory() or 0))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self._registry)

    def figures(self) -> list[Metric]:
        """All of it as it is now, to be sent elsewhere."""
        return list(self._registry.collect())


def told_apart(label: str, figures: Iterable[tuple[str, Iterable[Metric]]]) -> bytes:
    """The same figures of several servers in Prometheus' text format; a label says whose each is."""
    families: dict[str, Metric] = {}
    for whose, theirs in figures:
        for one in theirs:
            family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
            family.samples += [sample._replace(labels={**sample.labels, label: whose}) for sample in one.samples]
    registry = CollectorRegistry()
    registry.register(_Collected(families.values()))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
