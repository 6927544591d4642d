"""The published families of causal video models: how each is rolled out, and which ones cannot be yet.

Settings as published with the checkpoints; all but the numbers that differ are those of Self Forcing. Families that
are published without a window get one of 21 latent frames, the length they were trained at: nothing changes within it,
and a stream may go on beyond.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from sfrt.config import StreamConfig
from sfrt.errors import ConfigError


@dataclass(frozen=True)
class Family:
    """One family. prefer_ema picks among the weights of a file that has both kinds.

    files are beginnings of the file names that its checkpoints go by, in lower case without separators; FOLDER/NAME
    where only the folder tells. caution is what to know of an exported bundle, without_adapter what to know of one that
    no adapter was merged into, unsupported the reason why settings alone do not run the family; None: there is none.
    """

    name: str
    source: str
    files: tuple[str, ...]
    stream: StreamConfig = field(default_factory=StreamConfig)
    prefer_ema: bool = False
    caution: str | None = None
    without_adapter: str | None = None
    unsupported: str | None = None


DEFAULT = "self-forcing"

_FOUR_STEPS = (1000.0, 750.0, 500.0, 250.0)
_FRAME_WISE = StreamConfig(chunk=1)

_ALL = (
    Family(DEFAULT, "arXiv 2506.08009", ("selfforcing",), prefer_ema=True),
    Family("causal-forcing", "arXiv 2602.02214", ("causalforcing", "chunkwise")),
    Family(
        "causal-forcing-framewise",
        "arXiv 2602.02214, frame-wise",
        ("framewise/causalforcing", "causalforcingframewise", "framewise"),
        _FRAME_WISE,
        prefer_ema=True,
    ),
    Family(
        "causal-forcing-pp",
        "Causal Forcing++, frame-wise, two steps",
        ("causalforcingpp", "causalforcingplus"),
        StreamConfig(chunk=1, steps=(1000.0, 500.0), first_steps=_FOUR_STEPS),
        prefer_ema=True,
    ),
    Family(
        "longlive",
        "arXiv 2509.22622",
        ("longlive",),
        StreamConfig(window=12, sink=3),
        without_adapter="the adapter that longlive checkpoints come with (lora.pt) is not merged: "
        "this is the base model alone (--lora FILE merges it)",
    ),
    Family(
        "causvid",
        "arXiv 2412.07772",
        ("causvid",),
        StreamConfig(steps=(1000.0, 757.0, 522.0), warp=False, shift=8.0),
    ),
    Family(
        "streamdiffusionv2",
        "arXiv 2511.07399, video to video",
        ("streamdiffusionv2", "wancausaldmdv2v"),
        # Its code puts 0.8 of noise on latents that it does not normalise, and begins with two latent frames at once;
        # here the noise is what the first step removes, the latents are those that models are trained on.
        StreamConfig(chunk=1, window=6, sink=3, steps=(700.0, 500.0, 400.0, 200.0), warp=False, shift=8.0),
        caution="streamdiffusionv2 makes videos of source videos alone (--source FILE); its published code mostly runs "
        "the first two steps (--steps 700,500), puts less noise where the source moves fast, replaces sink frames "
        "unlike the present, and keeps the last step's keys where sfrt refreshes the cache",
    ),
    Family(
        "infinite-forcing",
        "Infinite Forcing",
        ("infiniteforcing",),
        # It caches keys without rotary phases and rotates them when they are read, by their places in the window.
        StreamConfig(window=6, sink=1, positions="window"),
        prefer_ema=True,
    ),
    Family(
        "krea",
        "Krea realtime 14B",
        ("krea",),
        # The steps as they were trained; its server adds one at 0, which no longer changes the picture by much.
        StreamConfig(window=6, steps=(1000.0, 937.0, 833.0, 625.0), warp=False, positions="window", refresh="reencode"),
        caution="krea sees the oldest frame in view encoded anew as a picture, before every chunk: as published with "
        "--vae, nearly so with --taehv, and without a decoder it streams under --refresh rebuild alone",
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
        folder = checkpoint.resolve().parent.name
        family = _guess(checkpoint.stem, folder) or _guess(folder) or _unnamed(checkpoint)
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


def _unnamed(checkpoint: Path) -> Family:
    caution = f"{checkpoint} names no family; it is taken as {DEFAULT} (--family says otherwise)"
    return replace(FAMILIES[DEFAULT], caution=caution)


def _guess(name: str, folder: str = "") -> Family | None:
    """The family with the longest beginning that fits; of two that fit the name alike, the one that fits the folder."""
    fits = [
        (len(start), len(inside), family)
        for family in _ALL
        for inside, _, start in (file.rpartition("/") for file in family.files)
        if _begins(name, start) and _begins(folder, inside)
    ]
    return max(fits, key=lambda fit: fit[:2])[2] if fits else None


def _begins(name: str, start: str) -> bool:
    """Whether a name begins so, separators and case aside; a version at the end of start must be the whole number."""
    end = r"(?!\d)" if start[-1:].isdigit() else ""
    pattern = "[^a-z0-9]*".join(("", *start)) + end
    return re.match(pattern, name.lower().replace("++", "pp")) is not None
