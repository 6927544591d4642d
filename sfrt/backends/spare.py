"""The rollout of a stream that has ended, for the next one of its kind, with what was captured over its ring."""

from __future__ import annotations

from collections.abc import Hashable

from sfrt.backends import Rollout


class Spare:
    """At most one rollout, and how many bytes of the device's memory go with it.

    A ring that begins anew shows nothing of what it held, so a stream may take over another one's.
    """

    def __init__(self) -> None:
        self._kept: tuple[Hashable, Rollout, int] | None = None

    def keep(self, kind: Hashable, rollout: Rollout, size: int) -> None:
        """Have this one for the next stream of its kind, in place of what was kept."""
        self._kept = (kind, rollout, size)

    def take(self, kind: Hashable) -> Rollout | None:
        """One of this kind, if it was kept; another kind makes room."""
        kept, self._kept = self._kept, None
        return kept[1] if kept is not None and kept[0] == kind else None

    def clear(self) -> None:
        """Make room."""
        self._kept = None

    @property
    def size(self) -> int:
        """The bytes that are had back when another kind is asked for."""
        return 0 if self._kept is None else self._kept[2]
