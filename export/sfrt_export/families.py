"""The published families of causal video models: how each is rolled out, and which ones cannot be yet.

Settings as published with the checkpoints; all but the numbers that differ are those of Self Forcing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from sfrt.config import StreamConfig
from sfrt.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """One family. prefer_ema picks among the weights of a file that has both kinds.

    files are beginnings of the file names that its checkpoints go by, letters and digits only. unsupported is the
    reason why settings alone do not run it, None where they do.
    """

    name: str
    source: str
    files: tuple[str, ...]
    stream: StreamConfig = field(default_factory=StreamConfig)
    prefer_ema: bool = False
    unsupported: str | None = None


DEFAULT = "self-forcing"

_FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
_FRAME_WISE = StreamConfig(chunk=1)

_ALL = (
    Family(DEFAULT, "arXiv 2506.08009", ("selfforcing",), prefer_ema=True),
    Family("causal-forcing", "arXiv 2602.02214", ("causalforcing",)),
    Family(
        "causal-forcing-framewise",
        "arXiv 2602.02214, frame-wise",
        ("causalforcingframewise", "framewise"),
        _FRAME_WISE,
        prefer_ema=True,
    ),
    Family(
        "causal-forcing-pp",
        "Causal Forcing++, frame-wise, two steps",
        ("causalforcingpp", "causalforcingplusplus"),
        StreamConfig(chunk=1, steps=(1000.0, 500.0), first_steps=_FOUR_STEPS),
        prefer_ema=True,
    ),
    Family("longlive", "arXiv 2509.22622", ("longlivebase", "longlive"), StreamConfig(window=12, sink=3)),
    Family(
        "causvid",
        "arXiv 2412.07772",
        ("causvid",),
        StreamConfig(steps=(1000.0, 757.0, 522.0), warp=False, shift=8.0),
    ),
    Family(
        "streamdiffusionv2",
        "StreamDiffusionV2, video to video",
        ("streamdiffusionv2", "wancausaldmdv2v"),
        StreamConfig(chunk=1, window=6, sink=3, steps=(700.0, 500.0, 400.0, 200.0), warp=False, shift=8.0),
        unsupported="it starts from a source video noised to its first step, not from noise",
    ),
    Family(
        "infinite-forcing",
        "Infinite Forcing",
        ("infiniteforcing",),
        StreamConfig(window=6, sink=1),
        unsupported="it caches keys without rotary phases and rotates them when they are read",
    ),
    Family(
        "krea",
        "Krea realtime 14B",
        ("krea",),
        StreamConfig(window=6, steps=(1000.0, 937.0, 833.0, 625.0), warp=False),
        unsupported="it rebuilds its cache from the clean latents of the window before every chunk",
    ),
    Family(
        "rolling-forcing",
        "Rolling Forcing",
        ("rollingforcing",),
        unsupported="it denoises several chunks jointly, each at another noise level",
    ),
    Family(
        "reward-forcing",
        "Reward Forcing",
        ("rewardforcing",),
        unsupported="its sink is a moving average of evicted frames",
    ),
    Family("memflow", "MemFlow", ("memflow",), unsupported="it retrieves past frames from a memory bank"),
    Family("longlive2", "LongLive 2", ("longlive2",), unsupported="it is another model than Wan 2.1"),
)

FAMILIES = {family.name: family for family in _ALL}


def family_of(name: str | None, checkpoint: Path) -> Family:
    """The family asked for; with None, the one that the names of the file or its folder suggest, else Self Forcing.

    Raises ConfigError for an unknown name and for a family that needs more than settings, with the reason.
    """
    if name is None:
        family = _guess(checkpoint.stem) or _guess(checkpoint.resolve().parent.name) or FAMILIES[DEFAULT]
    elif name in FAMILIES:
        family = FAMILIES[name]
    else:
        known = ", ".join(family.name for family in _ALL if family.unsupported is None)
        raise ConfigError(f"no family is called {name!r}; choose one of: {known}")
    if family.unsupported is not None:
        raise ConfigError(
            f"{family.name} checkpoints need more than settings: {family.unsupported}; "
            f"this is not built yet, so choose another checkpoint (or --family, if {checkpoint.name} is no such model)"
        )
    return family


def _guess(name: str) -> Family | None:
    plain = re.sub(r"[^a-z0-9]", "", name.lower().replace("++", "pp"))
    matches = [(len(start), family) for family in _ALL for start in family.files if plain.startswith(start)]
    return max(matches, key=lambda match: match[0])[1] if matches else None
