"""What a bundle says of the Triton kernels in it that were compiled ahead of time."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sfrt.errors import ConfigError

_ARCHITECTURE = re.compile(r"sm_(\d{2,3})a?")
_CAPABILITY = re.compile(r"(\d{1,2})\.(\d)")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_SPECIFIC_FROM = 90
"""From this compute capability on, what is compiled may use what only that GPU has; its name ends in an "a" then."""

SUFFIXES = ("json", "cubin")


@dataclass(frozen=True)
class KernelSet:
    """Kernels for one kind of GPU: all that the bundle's own stream runs there, as one version of Triton made them.

    architecture is the kind, such as sm_90a; dtype the one the stream runs in. names are those of the kernels, each
    with two files: its code, and what that is specialised for. Raises ConfigError for a name that is none.
    """

    architecture: str
    triton: str
    dtype: str
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if architecture_of(capability_of(self.architecture)) != self.architecture:
            raise ConfigError(f"no GPU is called {self.architecture!r}; it is {architecture_of(self.capability)}")
        for name in self.names:
            if not _NAME.fullmatch(name):
                raise ConfigError(f"{name!r} cannot be the name of a kernel's files")

    @property
    def capability(self) -> int:
        """The compute capability, 90 meaning 9.0."""
        return capability_of(self.architecture)

    @property
    def stems(self) -> tuple[str, ...]:
        """Its files in the bundle, without their suffixes."""
        return tuple(f"kernels/{self.architecture}/{name}" for name in self.names)

    @property
    def files(self) -> tuple[str, ...]:
        """Its files in the bundle."""
        return tuple(f"{stem}.{suffix}" for stem in self.stems for suffix in SUFFIXES)


def capability_of(text: str) -> int:
    """The compute capability that "sm_90a", "sm_90" or "9.0" means, as 90. Raises ConfigError for anything else."""
    if architecture := _ARCHITECTURE.fullmatch(text):
        return int(architecture[1])
    if capability := _CAPABILITY.fullmatch(text):
        return int(capability[1]) * 10 + int(capability[2])
    raise ConfigError(
        f"{text!r} is no kind of GPU; give its architecture, as sm_90a, or its compute capability, as 9.0"
    )


def architecture_of(capability: int) -> str:
    """The "sm_90a" of 90."""
    return f"sm_{capability}{'a' if capability >= _SPECIFIC_FROM else ''}"
