"""`sfrt bench`: the reference cases of the benchmark protocol on this machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click

from sfrt.cli.options import backend_option, device_option, text_encoder_option

if TYPE_CHECKING:
    from sfrt.benchmark.run import Report
    from sfrt.config import Placement

SHAPES = ("1.3b", "cpu256")
CASES = ("full21", "stream12", "frame1")
DECODERS = {"taehv": "taehv", "wan": "wan_vae"}


def _cases(context: click.Context, parameter: click.Parameter, text: str) -> tuple[str, ...]:
    """A list such as full21,stream12."""
    names = tuple(dict.fromkeys(text.split(",")))
    for name in names:
        if name not in CASES:
            raise click.BadParameter(f"{name!r} is no case; choose from {', '.join(CASES)}")
    return names


@click.command()
@click.argument("model", metavar="[MODEL]", required=False)
@click.option("--random", type=click.Choice(SHAPES), help="A model of random weights instead: speed is the same.")
@click.option("--decoder", type=click.Choice(tuple(DECODERS)), help="That model's autoencoder.  [default: taehv]")
@click.option("--cases", default=",".join(CASES), show_default=True, callback=_cases, metavar="LIST", help="Which.")
@click.option(
    "--seconds",
    type=click.FloatRange(0, min_open=True),
    default=60.0,
    show_default=True,
    help="Video of a steady case.",
)
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Repetitions of what is short.")
@click.option(
    "--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all, and a .png by it."
)
@device_option
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@backend_option("auto")
@text_encoder_option
def bench(
    model: str | None,
    random: str | None,
    decoder: str | None,
    cases: tuple[str, ...],
    seconds: float,
    rounds: int,
    json_file: Path | None,
    device: str,
    dtype: str,
    backend: str,
    text_encoder: Placement,
) -> None:
    """Measure MODEL (without one: the built-in model): latencies, frame rate, memory, share of the machine's limit.

    full21 is a clip of 21 latent frames in chunks of 3; stream12 a long stream that sees 12 of them, 3 as sinks; frame1
    goes frame by frame.
    """
    if model is not None and random is not None:
        raise click.UsageError("MODEL and --random both say what to measure; give one of them")
    if decoder is not None and random is None:
        raise click.UsageError("--decoder is for --random; a model has the autoencoder that it was exported with")
    from sfrt.benchmark.cases import Effort
    from sfrt.benchmark.report import table
    from sfrt.benchmark.run import measure

    options = {"device": device, "dtype": dtype, "backend": backend}
    with _bundle(model, random, DECODERS[decoder or "taehv"], device, dtype) as path, _bar() as progress:
        click.echo(_stated(path, **options), err=True)
        settings = {**options, "model": None if path is None else str(path), "text_encoder": text_encoder}
        report = measure(settings, cases, Effort(rounds, seconds), progress, partial(_write, json_file))
    click.echo(report.headline())
    click.echo(table(report.results))
    for name, reason in report.not_run.items():
        click.echo(f"{name} did not run: {reason}", err=True)
    if json_file is not None:
        click.echo(f"{json_file}, {json_file.with_suffix('.png')}", err=True)


def _write(path: Path | None, report: Report) -> None:
    """What there is so far."""
    from sfrt.benchmark.report import plot

    if path is not None:
        report.write(path)
        plot(path.with_suffix(".png"), report.results)


@contextmanager
def _bundle(
    model: str | None, random: str | None, decoder: Any, device: str, dtype: str
) -> Iterator[str | Path | None]:
    """The bundle to measure; one of random weights lasts as long as it is measured."""
    if random is None:
        yield model
        return
    from sfrt.benchmark.shapes import SHAPES, write_random_bundle
    from sfrt.device import dtype_name, resolve_device, resolve_dtype

    made_on = resolve_device(device)
    runs_in = dtype_name(resolve_dtype(dtype, made_on))
    with TemporaryDirectory(prefix="sfrt-bench-") as folder:
        yield write_random_bundle(Path(folder) / "model", SHAPES[random], decoder, runs_in, made_on)


def _stated(model: str | Path | None, *, device: str, dtype: str, backend: str) -> str:
    """What the model takes with one stream of its own, before any of it is taken."""
    from sfrt.backends.loading import choose_backend
    from sfrt.backends.memory import Setting, whole_need
    from sfrt.bundle import Bundle, resolve_model
    from sfrt.device import dtype_name, resolve_device, resolve_dtype

    where = resolve_device(device)
    runs_in = resolve_dtype(dtype, where)
    bundle = Bundle.open(resolve_model(model), verify=False)
    name = choose_backend(bundle, backend, where, runs_in)
    setting = Setting(name, dtype_name(runs_in), on_gpu=where.type == "cuda")
    return f"needs {whole_need(bundle.manifest, bundle.manifest.stream, setting)}"


@contextmanager
def _bar() -> Iterator[Any]:
    """A line on stderr that says what is being measured, where there is somebody to read it."""
    from tqdm import tqdm

    with tqdm(bar_format="{desc} [{elapsed}]", file=sys.stderr, disable=None, leave=False) as bar:
        yield bar.set_description_str
