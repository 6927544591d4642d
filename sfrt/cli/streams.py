"""`sfrt generate`: a video from a prompt."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from sfrt.cli.options import (
    backend_option,
    device_option,
    given_settings,
    json_option,
    stream_options,
    text_encoder_option,
)
from sfrt.errors import BundleError

if TYPE_CHECKING:
    from sfrt.config import Placement, StreamConfig
    from sfrt.metrics import StreamMeter
    from sfrt.session import Session
    from sfrt.switching import Receipt
    from sfrt.video import VideoWriter

DEFAULT_SECONDS = 5.0
LONGEST_SECONDS = 1e9
"""A stream of four latent frames a second can number them that long (noise.py: 32 bits)."""


def _seconds(text: str) -> float:
    """A length of video; NaN and infinity are none."""
    with suppress(ValueError):
        if 0 < (seconds := float(text)) <= LONGEST_SECONDS:
            return seconds
    raise click.BadParameter(f"{text!r} is no length of a video; give seconds, such as 5")


@dataclass(frozen=True)
class Then:
    """Another prompt, from the first chunk that begins so many seconds into the new video or later."""

    seconds: float
    prompt: str


def _then(text: str) -> Then:
    """SECONDS:PROMPT."""
    seconds, _, prompt = text.partition(":")
    with suppress(ValueError):
        if 0 <= (begin := float(seconds)) <= LONGEST_SECONDS and prompt.strip():
            return Then(begin, prompt)
    raise click.BadParameter(f"{text!r} is no SECONDS:PROMPT, such as '5:a blue square bouncing'")


@click.command()
@click.argument("prompt")
@click.option("-o", "--output", metavar="FILE", required=True, help=".mp4, .gif, a new folder for PNGs, or - for y4m.")
@click.option("--model", metavar="DIR", help="A bundle that sfrt export wrote.  [default: the built-in model]")
@click.option("--seconds", type=_seconds, metavar="NUMBER", help="Seconds of new video.  [default: 5, or the source's]")
@click.option("--chunks", type=click.IntRange(1), help="Length in chunks instead.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same video.")
@click.option(
    "--then", multiple=True, type=_then, metavar="SECONDS:PROMPT", help="Another prompt from there on; may be repeated."
)
@click.option("--initial", metavar="FILE", help="A picture or clip to go on from.")
@click.option("--source", metavar="FILE", help="A clip to go by: video to video.")
@click.option("--strength", type=float, help="How far to change it, above 0 to 1.  [default: the model's first step]")
@stream_options
@device_option
@click.option("--dtype", default="auto", show_default=True, help="auto, float32, bfloat16 or float16.")
@backend_option("auto")
@text_encoder_option
@click.option("--prompt-cache/--no-prompt-cache", default=True, help="Keep what prompts were read as.  [default: yes]")
@json_option("Print one JSON object with settings and timings.")
def generate(
    prompt: str,
    output: str,
    model: str | None,
    seconds: float | None,
    chunks: int | None,
    seed: int,
    then: tuple[Then, ...],
    initial: str | None,
    source: str | None,
    strength: float | None,
    device: str,
    dtype: str,
    backend: str,
    text_encoder: Placement,
    prompt_cache: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make a video from PROMPT."""
    if seconds is not None and chunks is not None:
        raise click.UsageError("--seconds and --chunks both say how long; give one of them")
    if as_json and output == "-":
        raise click.UsageError("--json and -o - would share standard output; give the video a file")
    from sfrt.device import dtype_name
    from sfrt.metrics import StreamMeter
    from sfrt.runtime import Runtime
    from sfrt.video import check_target, open_writer

    check_target(output)  # a model can take long to load
    runtime = Runtime(
        model, device=device, dtype=dtype, backend=backend, text_encoder=text_encoder, prompt_cache=prompt_cache
    )
    if runtime.manifest.decoder is None:
        raise BundleError(
            f"the model {runtime.manifest.name!r} has no decoder to see pixels with; "
            "export it again with --taehv or --vae"
        )
    stream = dataclasses.replace(runtime.stream, **given_settings(settings))
    length = _length(seconds, chunks, source, stream)
    later = deque(sorted((one.seconds * stream.fps, one.prompt) for one in then))
    meter = StreamMeter()
    with (
        runtime.session(
            prompt,
            seed=seed,
            initial=initial,
            source=source,
            strength=strength,
            limit=length.chunks,
            stream=stream,
            ahead=not later,  # another prompt is to show as early as it can
        ) as session,
        open_writer(output, width=stream.width, height=stream.height, fps=stream.fps) as writer,
    ):
        frames, receipts = _pump(session, writer, length, meter, later)
    if not as_json:
        click.echo(f"{output}: {frames} frames, {meter}", err=True)
        return
    settings_used = {
        "device": str(runtime.device),
        "dtype": dtype_name(runtime.dtype),
        "backend": runtime.backend,
        **dataclasses.asdict(stream),
        **({} if source is None else {"strength": strength}),
    }
    made = {"file": output, "prompt": prompt, "seed": seed, "model": runtime.manifest.name, "frames": frames}
    switches = [dataclasses.asdict(receipt) for receipt in receipts]
    click.echo(json.dumps({**made, "switches": switches, "settings": settings_used, **meter.summary()}))


@dataclass(frozen=True)
class Length:
    """How many chunks to make (None: to the source's end), and at which new pixel frame to stop within them."""

    chunks: int | None
    frames: int | None = None


def _length(seconds: float | None, chunks: int | None, source: str | None, stream: StreamConfig) -> Length:
    """What was asked for; else the whole source where there is one."""
    if seconds is None and (chunks is not None or source is not None):
        return Length(chunks)
    return _length_of(seconds or DEFAULT_SECONDS, stream)


def _length_of(seconds: float, stream: StreamConfig) -> Length:
    """Chunks that surely hold so much video: the first latent frame may be one pixel frame, each other is four."""
    from sfrt.ring import chunk_sizes

    frames = max(1, round(seconds * stream.fps))
    after_first = math.ceil((frames + 3) / 4) - chunk_sizes(stream).first
    return Length(1 + max(0, math.ceil(after_first / stream.chunk)), frames)


def _pump(
    session: Session, writer: VideoWriter, length: Length, meter: StreamMeter, later: deque[tuple[float, str]]
) -> tuple[int, list[Receipt]]:
    """Chunks into the writer until the length is reached or the reader leaves; frames written, and prompts switched.

    later are prompts, each with the number of the first new frame that may be under it.
    """
    from tqdm import tqdm

    share, left = ("{percentage:3.0f}%|{bar}| ", "<{remaining}") if length.chunks else ("", "")
    layout = share + "{n_fmt}/{total_fmt} chunks [{elapsed}" + left + "{postfix}]"
    written = 0
    if session.initial_frames is not None:
        written = len(session.initial_frames)
        writer.write(session.initial_frames)
    begin, end = written, None if length.frames is None else written + length.frames
    receipts: list[Receipt] = []
    with tqdm(total=length.chunks, bar_format=layout, file=sys.stderr, disable=None, leave=False) as bar:
        for chunk in session:
            meter.add(len(chunk.frames), chunk.timings.chunk_ms)
            bar.set_postfix_str(f"{chunk.timings.chunk_ms:.0f} ms per chunk, {meter.fps:.1f} fps", refresh=False)
            bar.update()
            frames = chunk.frames if end is None else chunk.frames[: end - written]
            written += len(frames)
            last = written == end or chunk.index + 1 == length.chunks
            if chunk.receipt is not None:
                receipts.append(chunk.receipt)
            while later and later[0][0] <= written - begin:
                _, session.prompt = later.popleft()
            if not writer.write(frames) or last:
                break
    return written, receipts
