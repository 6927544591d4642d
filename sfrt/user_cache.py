"""Where what can be made again is kept for the user between runs: small files, each only ever a saving."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def user_folder() -> Path | None:
    """sfrt's folder in $XDG_CACHE_HOME, or in ~/.cache (XDG Base Directory Specification); None where nobody's home."""
    chosen = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        return (chosen if chosen.is_absolute() else Path.home() / ".cache") / "sfrt"
    except RuntimeError:
        return None


def write_whole(path: Path, content: bytes) -> None:
    """Put a file in its place in one step, readable by its owner alone: no reader ever sees half of it.

    Raises OSError where it cannot be written, and then nothing is left behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, written = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
        os.replace(written, path)
    except OSError:
        os.unlink(written)
        raise
