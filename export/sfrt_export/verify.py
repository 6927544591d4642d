"""Replay golden folders on this machine and compare tensor by tensor: `sfrt verify`.

A golden folder holds case.json beside tensors.safetensors (inputs and outputs in float32 of the published code); what
case.json says tells which part it is about. schedule.json, where present, holds the published step tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sfrt.config import StreamConfig, TaehvConfig, Umt5Config, WanVaeConfig
from sfrt.decoders import LoadedDecoder, exact_convolutions
from sfrt.decoders.taehv import Taehv
from sfrt.device import memory_told, resolve_device, resolve_dtype
from sfrt.errors import CheckpointError, SfrtError
from sfrt.timesteps import sigma_table, warp
from sfrt_export.parts_on import decoder_on, text_encoder_on
from sfrt_export.replay import replay_rollout

if TYPE_CHECKING:
    from sfrt.backends.exported_parts import ExportedDecoder

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 2e-2}
"""Largest relative error ‖out - ref‖ / ‖ref‖ of a tensor that counts as the same."""


@dataclass(frozen=True)
class Check:
    """One compared tensor of one golden folder."""

    case: str
    tensor: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # a NaN is no pass


@dataclass(frozen=True)
class Machine:
    """What a case is replayed on."""

    backend: str
    device: torch.device
    dtype: torch.dtype


Pair = tuple[str, Tensor, Tensor]
"""(name, what this machine makes, what it should be)"""


def verify(
    folder: str | Path, *, backend: str = "torch", dtype: str = "float32", device: str = "auto"
) -> Iterator[Check]:
    """Replay every golden case at or below a folder, one after another, yielding its comparisons.

    Raises CheckpointError for a folder without golden cases or with a broken one; ConfigError or DeviceError for a
    backend, dtype or device that is not to be had.
    """
    folder = Path(folder)
    where = resolve_device(device)
    machine = Machine(backend, where, resolve_dtype(dtype, where))
    cases = sorted(file.parent for file in folder.rglob("case.json"))
    schedules = sorted(folder.rglob("schedule.json"))
    if not cases and not schedules:
        raise CheckpointError(
            f"{folder} has no golden case; give a folder with case.json and tensors.safetensors below it"
        )
    for file in schedules:
        with _blaming(file):
            tables = list(_schedule(_read_json(file)))
        yield from _checks(file.relative_to(folder.parent), TOLERANCES[torch.float32], tables)
    for case in cases:
        yield from _checks(case.relative_to(folder.parent), TOLERANCES[machine.dtype], _replay(case, machine))


def _checks(name: Path, tolerance: float, pairs: list[Pair]) -> Iterator[Check]:
    if not pairs:
        raise CheckpointError(f"{name} has nothing to compare; copy the golden folder again")
    for tensor, out, reference in pairs:
        if out.shape != reference.shape:
            raise CheckpointError(
                f"{name}: {tensor} is {list(reference.shape)} there but {list(out.shape)} here; "
                "the case is inconsistent"
            )
        yield Check(str(name), tensor, relative_error(out.detach(), reference), tolerance)


def relative_error(out: Tensor, reference: Tensor) -> float:
    """‖out - reference‖ / ‖reference‖, in double precision; the two may lie on different devices."""
    expected = reference.cpu().double()
    return float((out.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-12))


def _replay(case: Path, machine: Machine) -> list[Pair]:
    settings = _read_json(case / "case.json")
    with _blaming(case), memory_told(f"the case {case}", machine.device), exact_convolutions():
        return list(_part(settings)(case, settings, load_file(case / "tensors.safetensors"), machine))


@contextmanager
def _blaming(case: Path) -> Iterator[None]:
    """What goes wrong within, where it is no error of sfrt's own, as CheckpointError: the case is malformed."""
    try:
        yield
    except SfrtError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{case} cannot be read ({error}); copy the golden folder again") from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise CheckpointError(f"{case} cannot be replayed ({reason}); copy the golden folder again") from None


def _part(settings: dict[str, Any]) -> Callable[[Path, dict[str, Any], dict[str, Tensor], Machine], Iterator[Pair]]:
    """Which part a case is about, told by a setting that only it has."""
    parts = {"model": _rollout, "dim_mult": _wan_vae, "num_buckets": _umt5, "weights_recipe": _taehv}
    for key, part in parts.items():
        if key in settings:
            return part
    raise CheckpointError(f"a case.json with the keys {sorted(settings)} is about no part sfrt knows")


def _rollout(case: Path, settings: dict[str, Any], tensors: dict[str, Tensor], machine: Machine) -> Iterator[Pair]:
    return replay_rollout(case, settings, tensors, machine.backend, machine.device, machine.dtype)


@torch.inference_mode()
def _wan_vae(case: Path, settings: dict[str, Any], tensors: dict[str, Tensor], machine: Machine) -> Iterator[Pair]:
    config = WanVaeConfig(
        dim=settings["dim"],
        latent_channels=settings["z_dim"],
        dim_mult=tuple(settings["dim_mult"]),
        num_res_blocks=settings["num_res_blocks"],
        temporal_downsample=tuple(settings["temporal_downsample"]),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )
    weights, latents = load_file(case / "weights.safetensors"), tensors["latents"]
    names = sorted(name for name in tensors if name.startswith("pixels_chunk"))
    chunks = latents.split([(tensors[name].shape[1] + 3) // 4 for name in names], dim=1)
    streams = _streams(latents, *chunks)
    with decoder_on(machine.backend, config, weights, machine.device, machine.dtype, streams) as vae:
        pixels, _ = vae.decode(latents, None)
        yield "pixels", 2 * pixels - 1, tensors["pixels"]  # sfrt's pixels are in [0, 1], theirs in [-1, 1]
        state = None
        for name, chunk in zip(names, chunks, strict=True):
            pixels, state = vae.decode(chunk, state)
            yield name, 2 * pixels - 1, tensors[name]
        clip = tensors["encode_pixels"].movedim(1, 2)
        yield "encode_latents", vae.encode((clip + 1) / 2)[0], tensors["encode_latents"]


@torch.inference_mode()
def _taehv(case: Path, settings: dict[str, Any], tensors: dict[str, Tensor], machine: Machine) -> Iterator[Pair]:
    shapes = settings["keys"]
    weights = seeded_weights(shapes, settings["weights_seed"], settings["weights_gain"])
    config, streams = _taehv_config(shapes), _streams(tensors["latents"])
    with decoder_on(machine.backend, config, weights, machine.device, machine.dtype, streams) as taehv:
        pixels, _ = taehv.decode(tensors["latents"], None)
        yield "pixels", pixels, tensors["pixels"]
        clip = tensors["encode_pixels"].to(machine.device)
        if isinstance(taehv, LoadedDecoder):
            assert isinstance(taehv.module, Taehv)
            latents, _ = taehv.module.encode_groups(clip.to(taehv.dtype))
        else:
            latents, _ = cast("ExportedDecoder", taehv).encode_groups(clip)
        yield "encode_latents", latents, tensors["encode_latents"]


def _streams(*latents: Tensor) -> list[StreamConfig]:
    """Streams whose chunks are as long as these latents [B, T, C, h, w]."""
    sizes = dict.fromkeys((part.shape[1], 8 * part.shape[3], 8 * part.shape[4]) for part in latents)
    return [StreamConfig(chunk=chunk, window=None, height=height, width=width) for chunk, height, width in sizes]


def _taehv_config(shapes: dict[str, list[int]]) -> TaehvConfig:
    first, second, third, fourth = (shapes[f"decoder.{layer}.weight"][0] for layer in (1, 8, 14, 20))
    return TaehvConfig(
        latent_channels=shapes["decoder.1.weight"][1],
        encoder_width=shapes["encoder.0.weight"][0],
        decoder_widths=(first, second, third, fourth),
    )


def seeded_weights(shapes: dict[str, list[int]], seed: int, gain: float) -> dict[str, Tensor]:
    """The weights that a case's recipe means: seeded normals, scaled by fan-in, rounded to bfloat16."""
    generator = np.random.Generator(np.random.PCG64(seed))
    weights = {}
    for name in sorted(shapes):
        shape = tuple(shapes[name])
        values = generator.standard_normal(shape, dtype=np.float32)
        values *= np.float32(gain if len(shape) > 1 else 0.1)
        # Two roundings, as the published values were made: one product by the ratio would round some otherwise.
        values /= np.float32(math.sqrt(math.prod(shape[1:])))
        weights[name] = torch.from_numpy(values).bfloat16()
    return weights


@torch.inference_mode()
def _umt5(case: Path, settings: dict[str, Any], tensors: dict[str, Tensor], machine: Machine) -> Iterator[Pair]:
    names = ("dim", "dim_attn", "dim_ffn", "num_heads", "num_layers", "num_buckets")
    config = Umt5Config(vocab_size=settings["vocab"], **{name: settings[name] for name in names})
    weights, ids, mask = load_file(case / "weights.safetensors"), tensors["ids"], tensors["mask"]
    length = ids.shape[1]
    with text_encoder_on(machine.backend, config, length, weights, machine.device, machine.dtype) as encoder:
        rows = []
        for row, real in zip(ids, mask.sum(1).tolist(), strict=True):
            embeds = encoder(row[None, : int(real)].to(machine.device))[0]
            rows.append(F.pad(embeds, (0, 0, 0, length - len(embeds))))
    yield "prompt_embeds", torch.stack(rows), tensors["prompt_embeds"]


def _schedule(tables: dict[str, Any]) -> Iterator[Pair]:
    for shift, table in tables.items():
        sigmas = torch.tensor(sigma_table(float(shift))[::50])
        yield f"shift {shift}: sigmas", sigmas, torch.tensor(table["sigmas_every_50"])
        yield f"shift {shift}: timesteps", 1000 * sigmas, torch.tensor(table["timesteps_every_50"])
        warped = torch.tensor([warp(float(step), float(shift)) for step in table["warped"]])
        yield f"shift {shift}: warped", warped, torch.tensor(list(table["warped"].values()))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        data = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error}); copy the golden folder again") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} is no JSON object; copy the golden folder again")
    return data
