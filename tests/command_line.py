"""What a command of the command line came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

PROMPT = "a red circle moving left on a white background"


@dataclass(frozen=True)
class Outcome:
    code: int | str
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line of a refused command."""
        assert self.code == 2, (self.code, self.err)
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("sfrt: error: ")
        return line.removeprefix("sfrt: error: ")


Run = Callable[..., Outcome]
