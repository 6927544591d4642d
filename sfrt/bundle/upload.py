"""A safetensors file to a GPU, read once: a block is hashed and copied while the next one is read.

The bytes go from the file into one of two pinned blocks that take turns, and from there straight into the tensors that
the model will hold. So it takes as long as the slowest of reading, hashing and copying, not as all three.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Protocol

from sfrt.bundle.quantization import final_dtype
from sfrt.errors import BundleError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 16 << 20
"""Bytes read at a time: enough that few calls are made, and little stays pinned."""


class CopyQueue(Protocol):
    """A way onto a device: what is queued runs in its order, while the host goes on."""

    def staging(self, size: int) -> Tensor:
        """uint8 [size] in host memory that the device can read by itself."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor on the device; all of them are made before the first copy."""

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Queue the copy of a part of a staging block into as many elements [N] on the device, of any dtype."""

    def mark(self) -> Callable[[], object]:
        """A function that waits for what has been queued up to now."""


class CudaCopyQueue:
    """Copies on a CUDA stream of their own. Unverified: it has not run on a GPU."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._device = device
        self._stream = torch.cuda.Stream(device)

    def staging(self, size: int) -> Tensor:
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        import torch

        made = torch.empty(shape, dtype=dtype, device=self._device)
        # Its memory may be what queued work of the current stream still reads.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return made

    def copy(self, target: Tensor, source: Tensor) -> None:
        import torch

        with torch.cuda.stream(self._stream):
            if source.dtype != target.dtype:  # converted there: the host would take longer than the way
                source = source.to(self._device, non_blocking=True)
            target.copy_(source, non_blocking=True)

    def mark(self) -> Callable[[], object]:
        event: torch.cuda.Event = self._stream.record_event()
        return event.synchronize


@dataclass(frozen=True, eq=False)
class _Place:
    """A tensor on the device, and its bytes [begin, end) behind the file's header, in the dtype they have there."""

    begin: int
    end: int
    stored: torch.dtype
    target: Tensor

    def piece(self, begin: int, end: int) -> Tensor:
        """The elements [N] that these bytes are."""
        size = self.stored.itemsize
        return self.target.view(-1)[(begin - self.begin) // size : (end - self.begin) // size]


@dataclass(frozen=True, eq=False)
class _Block:
    """A staging block, and what has to be waited for before it may be filled again."""

    bytes: Tensor
    pending: list[Callable[[], object]] = field(default_factory=list)

    def wait(self) -> None:
        while self.pending:
            self.pending[-1]()
            self.pending.pop()


def upload(
    path: Path,
    queue: CopyQueue,
    dtype: torch.dtype | None,
    witness: Callable[[memoryview], object] | None = None,
    block: int = BLOCK,
) -> dict[str, Tensor]:
    """The file's tensors by name, in the dtypes that `final_dtype` says, once all of them have arrived.

    witness is given the whole file in order, such as a hash's update. block is a multiple of 8.
    Raises BundleError for a file that cannot be read to its end, SafetensorError for one that is none.
    """
    start, places = _plan(path, queue, dtype)
    end = max((place.end for place in places.values()), default=0)
    blocks = [_Block(queue.staging(min(block, end))) for _ in range(2)]
    with path.open("rb", buffering=0) as file, ThreadPoolExecutor(1) as aside:
        _fill(file, header := memoryview(bytearray(start)))
        if witness is not None:
            witness(header)
        try:
            for begin in range(0, end, block):
                turn = blocks[begin // block % 2]
                turn.wait()
                held = turn.bytes[: end - begin]
                _fill(file, held.numpy().data)
                if witness is not None:
                    turn.pending.append(aside.submit(witness, held.numpy().data).result)
                for place in places.values():
                    here, there = max(place.begin, begin), min(place.end, begin + block)
                    if here < there:
                        source = held[here - begin : there - begin].view(place.stored)
                        queue.copy(place.piece(here, there), source)
                turn.pending.append(queue.mark())
        finally:  # nothing may be let go that is still read or written
            queue.mark()()
            for turn in blocks:
                turn.wait()
    return {name: place.target for name, place in places.items()}


def _plan(path: Path, queue: CopyQueue, dtype: torch.dtype | None) -> tuple[int, Mapping[str, _Place]]:
    """Where the header ends, and each tensor's place, its target made."""
    from safetensors import safe_open

    places: dict[str, _Place] = {}
    with safe_open(path, framework="pt") as library, path.open("rb") as file:  # the library checks the header
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        for name in library.keys():  # noqa: SIM118
            mapped = library.get_tensor(name)
            begin, end = header[name]["data_offsets"]
            if begin % mapped.element_size():
                raise BundleError(f"{path} cannot be read ({name} is not aligned); export the checkpoint again")
            target = queue.empty(tuple(mapped.shape), final_dtype(name, mapped.dtype, dtype))
            places[name] = _Place(begin, end, mapped.dtype, target)
    return 8 + length, places


def _fill(file: BinaryIO, room: memoryview) -> None:
    """Read as many bytes as there is room for. Raises OSError where the file has fewer."""
    filled = 0
    while filled < len(room):
        count = file.readinto(room[filled:])  # type: ignore[attr-defined]
        if not count:
            raise OSError(f"it ends {len(room) - filled} bytes early")
        filled += count
