"""The command line: one function per verb. Each imports what it needs when it runs, so that help costs nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any, NoReturn

import click

from sfrt import __version__
from sfrt.errors import BundleError, SfrtError

if TYPE_CHECKING:
    from sfrt.bundle import Manifest
    from sfrt.config import StreamConfig
    from sfrt.metrics import StreamMeter
    from sfrt.session import Session
    from sfrt.video import VideoWriter
    from sfrt_export.verify import Check

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130

DEFAULT_SECONDS = 5.0
LONGEST_SECONDS = 1e9
"""A stream of four latent frames a second can number them that long (noise.py: 32 bits)."""


def _seconds(text: str) -> float:
    """A length of video; NaN and infinity are none."""
    with suppress(ValueError):
        if 0 < (seconds := float(text)) <= LONGEST_SECONDS:
            return seconds
    raise click.BadParameter(f"{text!r} is no length of a video; give seconds, such as 5")


def _numbers(text: str) -> tuple[float, ...]:
    """A list such as 1000,750,500,250."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers such as 1000,750,500,250") from None


def stream_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The settings of a stream that the command line can change; each is None where the model decides."""
    for option in (
        click.option("--height", type=int, help="Pixels, a multiple of 16."),
        click.option("--width", type=int, help="Pixels, a multiple of 16."),
        click.option("--sink", type=int, help="Latent frames at the start that stay in view."),
        click.option("--window", type=int, help="Latent frames in view, with the sink and the chunk itself."),
        click.option("--shift", type=float, help="Shift of the noise schedule."),
        click.option(
            "--first-steps",
            type=_numbers,
            metavar="LIST",
            help="Timesteps of the first chunk.  [default: --steps, where given]",
        ),
        click.option(
            "--steps", type=_numbers, metavar="LIST", help="Timesteps from noise to picture, such as 1000,750,500,250."
        ),
    ):
        command = option(command)
    return command


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """The stream settings that were asked for; steps hold for the first chunk as well, unless it was given its own."""
    given = {name: value for name, value in settings.items() if value is not None}
    return {"first_steps": None, **given} if "steps" in given else given


def _json_option(help: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--json", "as_json", is_flag=True, help=help)


_device_option = click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N.")
_backend_option = click.option("--backend", default="torch", show_default=True, help="What runs the model.")


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sfrt")
def cli() -> None:
    """Turn a Self Forcing checkpoint into a live video stream."""


@cli.command()
@click.argument("prompt")
@click.option("-o", "--output", metavar="FILE", required=True, help=".mp4, .gif, a new folder for PNGs, or - for y4m.")
@click.option("--model", metavar="DIR", help="A bundle that sfrt export wrote.  [default: the built-in model]")
@click.option("--seconds", type=_seconds, metavar="NUMBER", help="Seconds of new video.  [default: 5]")
@click.option("--chunks", type=click.IntRange(1), help="Length in chunks instead.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same video.")
@click.option("--initial", metavar="FILE", help="A picture or clip to go on from.")
@stream_options
@_device_option
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@_backend_option
@_json_option("Print one JSON object with settings and timings.")
def generate(
    prompt: str,
    output: str,
    model: str | None,
    seconds: float | None,
    chunks: int | None,
    seed: int,
    initial: str | None,
    device: str,
    dtype: str,
    backend: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make a video from PROMPT."""
    if seconds is not None and chunks is not None:
        raise click.UsageError("--seconds and --chunks both say how long; give one of them")
    if as_json and output == "-":
        raise click.UsageError("--json and -o - would share standard output; give the video a file")
    from sfrt.metrics import StreamMeter
    from sfrt.runtime import Runtime
    from sfrt.video import check_target, open_writer

    check_target(output)  # a model can take long to load
    runtime = Runtime(model, device=device, dtype=dtype, backend=backend)
    if runtime.manifest.decoder is None:
        raise BundleError(
            f"the model {runtime.manifest.name!r} has no decoder to see pixels with; "
            "export it again with --taehv or --vae"
        )
    stream = dataclasses.replace(runtime.stream, **_given(settings))
    length = _length_of(seconds or DEFAULT_SECONDS, stream) if chunks is None else Length(chunks)
    meter = StreamMeter()
    with (
        runtime.session(prompt, seed=seed, initial=initial, limit=length.chunks, stream=stream) as session,
        open_writer(output, width=stream.width, height=stream.height, fps=stream.fps) as writer,
    ):
        frames = _pump(session, writer, length, meter)
    if not as_json:
        click.echo(f"{output}: {frames} frames, {meter}", err=True)
        return
    settings_used = {
        "device": str(runtime.device),
        "dtype": str(runtime.dtype).removeprefix("torch."),
        "backend": backend,
        **dataclasses.asdict(stream),
    }
    made = {"file": output, "prompt": prompt, "seed": seed, "model": runtime.manifest.name, "frames": frames}
    click.echo(json.dumps({**made, "settings": settings_used, **meter.summary()}))


@dataclass(frozen=True)
class Length:
    """How many chunks to make, and at which new pixel frame to stop within them."""

    chunks: int
    frames: int | None = None


def _length_of(seconds: float, stream: StreamConfig) -> Length:
    """Chunks that surely hold so much video: the first latent frame may be one pixel frame, each other is four."""
    from sfrt.ring import chunk_size

    frames = max(1, round(seconds * stream.fps))
    after_first = math.ceil((frames + 3) / 4) - chunk_size(stream, first_chunk=True)
    return Length(1 + max(0, math.ceil(after_first / stream.chunk)), frames)


def _pump(session: Session, writer: VideoWriter, length: Length, meter: StreamMeter) -> int:
    """Chunks into the writer until the length is reached or the reader leaves; how many frames were written."""
    from tqdm import tqdm

    layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} chunks [{elapsed}<{remaining}{postfix}]"
    written = 0
    if session.initial_frames is not None:
        written = len(session.initial_frames)
        writer.write(session.initial_frames)
    end = None if length.frames is None else written + length.frames
    with tqdm(total=length.chunks, bar_format=layout, file=sys.stderr, disable=None, leave=False) as bar:
        for chunk in session:
            meter.add(len(chunk.frames), chunk.timings.chunk_ms)
            bar.set_postfix_str(f"{chunk.timings.chunk_ms:.0f} ms per chunk, {meter.fps:.1f} fps", refresh=False)
            bar.update()
            frames = chunk.frames if end is None else chunk.frames[: end - written]
            written += len(frames)
            last = written == end or chunk.index + 1 == length.chunks
            if not last:
                session.refresh()  # a GPU runs it while the frames are encoded here
            if not writer.write(frames) or last:
                break
    return written


@cli.command()
@click.argument("checkpoint", metavar="CHECKPOINT")
@click.option("-o", "--output", metavar="DIR", required=True, help="The bundle's folder; must not exist yet.")
@click.option("--family", help="How the model is rolled out.  [default: guessed from the file's name]")
@click.option("--ema/--no-ema", default=None, help="Which weights of a file with both.  [default: the family decides]")
@click.option("--vae", metavar="FILE", help="Wan2.1_VAE.pth, to decode with.")
@click.option("--taehv", metavar="FILE", help="taew2_1.pth, to decode with instead: much faster, a little softer.")
@click.option("--text-encoder", metavar="FILE", help="models_t5_umt5-xxl-enc-bf16.pth")
@click.option("--tokenizer", metavar="FILE", help="The text encoder's tokenizer.json, or its folder.")
@click.option("--dtype", help="Convert the transformer: float32, bfloat16 or float16.")
@click.option("--heads", type=int, help="Attention heads, where they are not 128 wide.")
@click.option("--text-len", type=int, help="Text slots, where they are not 512.")
@stream_options
@_json_option("Print the manifest.")
def export(
    checkpoint: str,
    output: str,
    family: str | None,
    ema: bool | None,
    vae: str | None,
    taehv: str | None,
    text_encoder: str | None,
    tokenizer: str | None,
    dtype: Any,
    heads: int | None,
    text_len: int | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Turn a published CHECKPOINT into a bundle."""
    from sfrt_export.export import export_checkpoint

    with _StageBars() as bars:
        bundle = export_checkpoint(
            checkpoint,
            output,
            family=family,
            ema=ema,
            vae=vae,
            taehv=taehv,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            heads=heads,
            text_len=text_len,
            stream=_given(settings),
            dtype=dtype,
            progress=bars,
        )
    click.echo(bundle.manifest.dumps() if as_json else _describe(bundle.manifest))


class _StageBars:
    """One progress bar on stderr after another, for stages that count bytes."""

    def __init__(self) -> None:
        self._stage = ""
        self._bar: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        from tqdm import tqdm

        if stage != self._stage:
            self.__exit__()
            self._stage = stage
            self._bar = tqdm(
                desc=stage, total=total, unit="B", unit_scale=True, file=sys.stderr, disable=None, leave=False
            )
        self._bar.update(done - self._bar.n)

    def __enter__(self) -> _StageBars:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.close()


@cli.command()
@click.argument("directory", metavar="[DIR]", required=False)
@_json_option("Print the manifest.")
def info(directory: str | None, as_json: bool) -> None:
    """Describe the bundle in DIR (without one: the built-in model) once its hashes are checked."""
    from sfrt.bundle import Bundle, resolve_model

    manifest = Bundle.open(resolve_model(directory)).manifest
    click.echo(manifest.dumps() if as_json else _describe(manifest))


def _describe(manifest: Manifest) -> str:
    model, stream = manifest.model, manifest.stream
    window = "everything in view" if stream.window is None else f"window {stream.window}, sink {stream.sink}"
    rows = {
        "name": f"{manifest.name}, family {manifest.family}, written by {manifest.created_by}",
        "transformer": f"dim {model.dim}, {model.num_heads} heads, {model.num_layers} layers",
        "weights": f"{manifest.weights}, {manifest.dtype}",
        "decoder": "none" if manifest.decoder is None else manifest.decoder.kind,
        "text encoder": "none"
        if manifest.text_encoder is None
        else f"UMT5, dim {manifest.text_encoder.dim}, {manifest.text_encoder.num_layers} layers",
        "stream": f"{stream.width}×{stream.height} at {stream.fps} fps, chunks of {stream.chunk}, {window}",
        "steps": f"{_listed(stream.steps)}{' warped' if stream.warp else ''}, shift {stream.shift:g}",
        **_rarities(stream),
        **{name: f"{info.bytes / 1e6:.1f} MB, sha256 {info.sha256[:12]}…" for name, info in manifest.files.items()},
        **{f"from {name}": f"{info.bytes / 1e6:.1f} MB" for name, info in manifest.source.items()},
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:{width}}  {value}" for name, value in rows.items())


def _rarities(stream: StreamConfig) -> dict[str, str]:
    """Settings that few models have: rows for those that this one does."""
    rows = {}
    if stream.first_chunk is not None:
        rows["first chunk"] = f"{stream.first_chunk} of {stream.chunk} latent frames"
    if stream.first_steps is not None:
        rows["first steps"] = _listed(stream.first_steps)
    if stream.context_noise:
        rows["context noise"] = f"{stream.context_noise:g}"
    return rows


def _listed(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:g}" for number in numbers)


@cli.command()
@click.argument("golden", metavar="GOLDEN_DIR")
@_device_option
@click.option("--dtype", default="float32", show_default=True, help="float32, bfloat16 or float16.")
@_backend_option
@_json_option("Print one JSON object with every tensor.")
def verify(golden: str, device: str, dtype: str, backend: str, as_json: bool) -> int:
    """Replay the golden folders at or below GOLDEN_DIR; exit with 1 when a tensor is over its tolerance."""
    from sfrt_export.verify import verify

    checks: list[Check] = []
    for case, found in groupby(verify(golden, backend=backend, dtype=dtype, device=device), lambda check: check.case):
        in_case = list(found)
        checks += in_case
        if not as_json:
            click.echo(_case_line(case, in_case))
    passed = sum(check.passed for check in checks)
    if as_json:
        settings = {"backend": backend, "dtype": dtype, "device": device}
        tensors = [_check_as_json(check) for check in checks]
        click.echo(json.dumps({"passed": passed == len(checks), "settings": settings, "tensors": tensors}))
    else:
        click.echo(f"{passed} of {len(checks)} tensors within tolerance ({backend}, {dtype})")
    return 0 if passed == len(checks) else FAILED


def _case_line(case: str, checks: list[Check]) -> str:
    # The largest error by its place on the scale; what is no number is worse than any.
    worst = max(checks, key=lambda check: math.inf if math.isnan(check.error) else check.error / check.tolerance)
    over = sum(not check.passed for check in checks)
    verdict = f"{over} of {len(checks)} OVER" if over else f"{len(checks)} ok"
    return f"{case}: {verdict}, worst {worst.error:.1e} of {worst.tolerance:.0e} ({worst.tensor})"


def _check_as_json(check: Check) -> dict[str, object]:
    error = check.error if math.isfinite(check.error) else None  # JSON has no NaN
    return {**dataclasses.asdict(check), "error": error, "passed": check.passed}


@cli.command()
@_json_option("Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Say what this machine can run, and why not the rest."""
    from sfrt import doctor

    probes = doctor.report()
    click.echo(doctor.as_json(probes) if as_json else doctor.as_text(probes))
    return 0 if "yes" in doctor.verdicts(probes).values() else FAILED


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb and exit: 0 done, 1 a check failed, 2 bad input (one line on stderr), 130 interrupted."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _warn
            status = cli.main(arguments, prog_name="sfrt", standalone_mode=False)
    except (SfrtError, click.ClickException, OSError) as error:
        sys.exit(_complain(error))
    except (click.Abort, KeyboardInterrupt):
        click.echo("sfrt: interrupted", err=True)
        sys.exit(INTERRUPTED)
    sys.exit(status)


def _complain(error: SfrtError | click.ClickException | OSError) -> int:
    """One line on stderr that names the thing and the way out."""
    message = str(error)
    if isinstance(error, click.ClickException):
        message = error.format_message().rstrip(".")
    if isinstance(error, OSError) and error.filename is not None:
        message = f"{error.filename}: {error.strerror}"
    if isinstance(error, click.UsageError) and error.ctx is not None:
        message += f"; see {error.ctx.command_path} --help"
    click.echo(f"sfrt: error: {' '.join(message.split())}", err=True)
    return BAD_INPUT


def _warn(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """A warning as a user of the command line wants it: without the place in the source."""
    click.echo(f"sfrt: warning: {message}", err=True)
