"""sfrt streams video out of Self Forcing checkpoints: `Runtime` opens a model, a `Session` yields `Chunk`s.

Importing this package loads nothing heavy; torch comes in with the first name that needs it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from sfrt.errors import (
    AdmissionError,
    BundleError,
    Cancelled,
    CheckpointError,
    ConfigError,
    DeviceError,
    MediaError,
    PromptError,
    SfrtError,
    SnapshotError,
)

if TYPE_CHECKING:
    from sfrt.chunk import Chunk
    from sfrt.runtime import Runtime
    from sfrt.session import Session

__version__ = "0.1.0"

__all__ = [
    "AdmissionError",
    "BundleError",
    "Cancelled",
    "CheckpointError",
    "Chunk",
    "ConfigError",
    "DeviceError",
    "MediaError",
    "PromptError",
    "Runtime",
    "Session",
    "SfrtError",
    "SnapshotError",
    "__version__",
]

_LAZY = {"Chunk": "sfrt.chunk", "Runtime": "sfrt.runtime", "Session": "sfrt.session"}


def __getattr__(name: str) -> object:
    if name in _LAZY:
        value: object = getattr(import_module(_LAZY[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sfrt' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
