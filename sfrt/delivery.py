"""Latents to pixel frames in host memory: on a GPU beside the work that follows, on a CPU at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Wait = Callable[[], object]


class Outlet(Protocol):
    """Where a device decodes frames and sends them to the host.

    beside says whether what is queued there runs beside what the caller queues next.
    """

    @property
    def beside(self) -> bool: ...

    def behind(self, *given: Tensor) -> AbstractContextManager[object]:
        """What is done within comes behind all that made these tensors, which it reads."""

    def to_host(self, frames: Tensor) -> tuple[Tensor, Wait]:
        """The frames in host memory, there once the wait is over; to be called within `behind`."""


class HostOutlet:
    """A CPU's: everything is done when it is asked for."""

    beside = False

    def behind(self, *given: Tensor) -> AbstractContextManager[object]:
        """As Outlet.behind."""
        return nullcontext()

    def to_host(self, frames: Tensor) -> tuple[Tensor, Wait]:
        """As Outlet.to_host."""
        return frames.cpu(), lambda: None


class GpuOutlet:
    """A stream of its own, which goes first wherever the GPU has a choice. No GPU has run it yet."""

    beside = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)

    @contextmanager
    def behind(self, *given: Tensor) -> Iterator[None]:
        """As Outlet.behind."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        for tensor in given:
            tensor.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def to_host(self, frames: Tensor) -> tuple[Tensor, Wait]:
        """As Outlet.to_host: pinned memory, which the GPU writes by itself."""
        host = torch.empty(frames.shape, dtype=frames.dtype, pin_memory=True)
        host.copy_(frames, non_blocking=True)
        arrived = torch.cuda.Event(blocking=True)  # a wait that leaves the core to others
        arrived.record(self._stream)
        return host, arrived.synchronize


def outlet_for(device: torch.device) -> Outlet:
    """A device's outlet."""
    return GpuOutlet(device) if device.type == "cuda" else HostOutlet()


@dataclass(frozen=True, eq=False)
class Delivery:
    """Frames on their way, and the decoder's state for those that follow."""

    frames: Tensor
    arrived: Wait
    state: Any

    def wait(self) -> npt.NDArray[np.uint8]:
        """The frames, uint8 [F, H, W, 3], once they are there."""
        self.arrived()
        shown: npt.NDArray[np.uint8] = self.frames.numpy()
        return shown
