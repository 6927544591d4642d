"""From trained weights to the bundle that sfrt streams from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sfrt.bundle import Bundle, Manifest, TaehvPart
from sfrt.bundle.manifest import MANIFEST
from sfrt.bundle.writer import BundleWriter
from sfrt.errors import BundleError
from sfrt_export.bundle_graphs import bundle_graphs, require_onnx
from sfrt_train import autoencoder, flow
from sfrt_train.loop import weights_of
from sfrt_train.settings import Settings
from sfrt_train.vocabulary import make_tokenizer

NAME = "shapes"
FAMILY = "Self Forcing runtime, built-in"


def export(settings: Settings, folder: Path, target: Path, stage: str = "self_forcing") -> Bundle:
    """Write the bundle of what a stage made in `folder`, in float16, with ONNX graphs that compute in float32.

    A bundle at `target` is replaced once all is written. Raises BundleError where something else is at `target`, and
    ConfigError where what makes graphs is missing.
    """
    require_onnx()
    said = manifest(settings, stage)
    with replacing(target) as writer:
        trained = weights_of(folder, stage)
        writer.add_tensors("transformer", _part(trained, "transformer."))
        writer.add_tensors("text_encoder", _part(trained, "text_encoder."))
        writer.add_tensors("decoder", _part(autoencoder.load(settings, folder, "cpu", "sharpening").state_dict(), ""))
        writer.add_tokenizer(make_tokenizer(settings, folder))
        writer.add_graphs(partial(bundle_graphs, said))
        writer.finish(said)
    return Bundle.open(target)


@contextmanager
def replacing(target: Path) -> Iterator[BundleWriter]:
    """Write a bundle, to be finished within; one at `target` is replaced then. Raises BundleError for anything else."""
    if target.exists() and not (target / MANIFEST).is_file():
        raise BundleError(f"{target} is no bundle, so it is not replaced; choose another output folder")
    fresh = target.with_name(f"{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    with BundleWriter(fresh) as writer:
        yield writer
    before = target.with_name(f"{target.name}.old")
    if target.exists():
        target.rename(before)  # there until the new one is in its place
    fresh.rename(target)
    shutil.rmtree(before, ignore_errors=True)


def manifest(settings: Settings, stage: str) -> Manifest:
    """What the bundle says of itself; the writer adds its files. Flow matching's own models take many Euler steps."""
    return Manifest(
        name=NAME,
        family=FAMILY,
        model=settings.transformer,
        stream=settings.euler(settings.many_steps) if stage in flow.STAGES else settings.stream,
        weights="ema",
        dtype="float16",
        created_by="sfrt_train",
        decoder=TaehvPart(settings.taehv),
        text_encoder=settings.text,
        graphs=("float32",),
    )


def _part(weights: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value.to(torch.float16) for key, value in weights.items() if key.startswith(prefix)
    }
