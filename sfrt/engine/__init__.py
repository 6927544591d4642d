"""Several sessions of one runtime, made by the one thread that owns its device and read by anyone.

with Engine(Runtime()) as engine:
    stream = engine.open("a red circle moving left on a white background", seed=1)
    for chunk in stream:  # or `async for`; or stream.get(timeout)
        show(chunk.frames)
"""

from __future__ import annotations

from sfrt.engine.engine import Engine, EngineStats
from sfrt.engine.stream import State, Stream, Streamable, StreamStats

__all__ = ["Engine", "EngineStats", "State", "Stream", "StreamStats", "Streamable"]
