"""What writing and reading share of the video library, which is imported where it is first needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING

from sfrt.errors import MediaError

if TYPE_CHECKING:
    from av import VideoFrame
    from av.filter import Graph


def pyav(target: str) -> ModuleType:
    """The library itself. Raises MediaError where it is not installed."""
    try:
        import av
    except ImportError as error:
        raise MediaError(f"cannot open {target}: videos need PyAV; install it with `pip install av`") from error
    return av


def pull(graph: Graph) -> Iterator[VideoFrame]:
    """The frames that a filter graph has ready."""
    from av.error import BlockingIOError, EOFError

    with suppress(BlockingIOError, EOFError):
        while True:
            yield graph.vpull()
