"""Work that is queued again and again with other numbers, captured once and launched as one: CUDA graphs.

A captured launch reads and writes the very memory that it was captured with. So work that is launched here is given
what differs from time to time as inputs, and whatever else it touches stays where it is: weights, rings, tables.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from threading import get_ident
from typing import Protocol
from weakref import WeakSet

import torch
from torch import Tensor

Work = Callable[..., tuple[Tensor, ...]]
"""Inputs to outputs, by work for the device alone: it waits for nothing and looks at no value."""


class Launcher(Protocol):
    """Runs work."""

    def launch(self, key: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The outputs of work(*inputs), which are the caller's.

        Of work of one key, any may stand for any other: it differs in nothing but the inputs' values.
        """


class Eager:
    """Runs work as it is."""

    def launch(self, key: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As Launcher.launch."""
        return work(*inputs)


class Replay(Protocol):
    """Captured work."""

    def replay(self) -> None:
        """Queue it again, over the same memory."""


class Recorder(Protocol):
    """Captures work."""

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """The work, captured and not run, and the outputs that every replay leaves in the same memory."""


@dataclass(frozen=True, eq=False)
class _Captured:
    graph: Replay
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class Graphs:
    """Captures work of a key when it comes for the second time.

    The first time it runs as it is: libraries and compilers prepare what they need when they are first called, which a
    capture would not allow, and work that never comes again is not worth one. They do so in every thread: cuBLAS and
    cuDNN have handles for each, and cuDNN plans, too. What cannot be captured runs as it is for good, with a warning.
    """

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._seen: set[tuple[int, Hashable]] = set()
        self._captured: dict[Hashable, _Captured | None] = {}

    @torch.inference_mode(False)  # in which tensors would be made that a later caller outside of it cannot write to
    @torch.no_grad()
    def launch(self, key: Hashable, work: Work, *inputs: Tensor) -> tuple[Tensor, ...]:
        """As Launcher.launch."""
        seen = get_ident(), key
        if key not in self._captured and seen in self._seen:
            self._captured[key] = self._capture(work, inputs)
        captured = self._captured.get(key)
        if captured is None:
            outputs = work(*inputs)
            self._seen.add(seen)
            return outputs
        for place, given in zip(captured.inputs, inputs, strict=True):
            place.copy_(given)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)

    def _capture(self, work: Work, inputs: tuple[Tensor, ...]) -> _Captured | None:
        places = tuple(given.clone() for given in inputs)
        try:
            graph, outputs = self._recorder.record(lambda: work(*places))
        except RuntimeError as error:
            warnings.warn(f"a part of the stream runs uncaptured, which is slower: {error}", stacklevel=2)
            return None
        return _Captured(graph, places, outputs)


class CudaRecorder:
    """CUDA graphs that share one pool of memory, as no two of them run at once. No GPU has run it yet."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = None
        self._graphs: WeakSet[torch.cuda.CUDAGraph] = WeakSet()

    def record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        """As Recorder.record. It waits for nothing, unlike torch.cuda.graph, so the GPU stays busy meanwhile.

        Where memory is short it does wait, and tries again: a capture cannot take back what torch keeps for reuse.
        """
        with suppress(torch.OutOfMemoryError):
            return self._record(work)
        torch.cuda.empty_cache()
        return self._record(work)

    def _record(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Replay, tuple[Tensor, ...]]:
        graph = torch.cuda.CUDAGraph()
        outer = torch.cuda.current_stream(self._device)
        if self._stream is None:  # a graph's kernels keep the priority of the stream that they were captured on
            self._stream = torch.cuda.Stream(self._device, priority=outer.priority)
        # A pool is gone with the last graph that shares it, and cannot be begun again: then there is another.
        living = next(iter(self._graphs), None)
        pool = torch.cuda.graph_pool_handle() if living is None else living.pool()
        self._stream.wait_stream(outer)
        with torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                outputs = work()
                graph.capture_end()
            except BaseException:
                # What went wrong may have broken the capture; torch would then take it to go on for ever.
                with suppress(RuntimeError):
                    graph.capture_end()
                with suppress(RuntimeError):
                    torch._C._cuda_endAllocateToPool(self._stream.device_index, pool)
                raise
        outer.wait_stream(self._stream)
        self._graphs.add(graph)
        return graph, outputs


def recorder_for(device: torch.device) -> Recorder | None:
    """What captures work on a device; None where there is nothing to capture."""
    return CudaRecorder(device) if device.type == "cuda" else None


def launcher_by(recorder: Recorder | None) -> Launcher:
    """A launcher that captures its work, or runs it as it is."""
    return Eager() if recorder is None else Graphs(recorder)
