"""Why a video cannot be written, in words that say what to do."""

from __future__ import annotations

import errno

from sfrt.errors import MediaError


def cannot_write(target: str, error: Exception) -> MediaError:
    """The error that tells a user why writing to the target failed."""
    number = getattr(error, "errno", None)
    reason = _REASONS.get(number or 0) or getattr(error, "strerror", None) or str(error)
    return MediaError(f"cannot write {target}: {reason}")


_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EFBIG: "the file has reached the largest size allowed here; write a shorter video or elsewhere",
    errno.ENOENT: "its folder does not exist; create that first",
    errno.EEXIST: "a file of that name is in the way; choose another name",
    errno.ENOTDIR: "a file is in the way of its folder; choose another name",
    errno.ENAMETOOLONG: "the name is too long; choose a shorter one",
    errno.EISDIR: "that is a folder; choose another name",
    errno.EACCES: "writing there is not permitted; choose another place",
}
