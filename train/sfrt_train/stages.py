"""Every training of the recipe by name, in the order in which they build on each other."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Protocol

from sfrt_train import autoencoder, flow, pairs, reading, self_forcing
from sfrt_train.settings import Settings


class Train(Protocol):
    """Train to the end, or to step `until`, going on from the checkpoint in the folder."""

    def __call__(self, settings: Settings, folder: Path, device: str, until: int | None = None) -> None: ...


STAGES: dict[str, Train] = {
    **{stage: partial(autoencoder.train, stage=stage) for stage in autoencoder.STAGES},
    reading.NAME: reading.train,
    **{stage: partial(flow.train, stage=stage) for stage in flow.STAGES},
    pairs.NAME: pairs.train,
    **{stage: partial(self_forcing.train, stage=stage) for stage in self_forcing.STAGES},
}
COMPARED = ("diffusion_forcing", "naive_rolling")
"""Those that nothing is built on: what the model is compared with."""
