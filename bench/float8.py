"""`python -m bench.float8 --json FILE`: what float8 costs in quality and gains in time: of weights, of rings, of both.

The same streams from the same noise, by the model as it is and by its float8 forms, on the torch backend in the
device's own dtype. Quality is the peak signal-to-noise ratio of latents, whose peak is the range of the plain ones, and
of frames; as each stream goes on from its own past, small errors come to be other motion, so the first chunk is stated
by itself. What is printed are medians over the streams. Speed is what chunks take once the ring is full.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from sfrt import Runtime
from sfrt.backends.memory import in_words
from sfrt.benchmark.protocol import Figure, environment
from sfrt.benchmark.shapes import SHAPES, write_random_bundle
from sfrt.bundle import Bundle, resolve_model
from sfrt.chunk import Chunk
from sfrt.config import RingDType, StreamConfig
from sfrt.device import dtype_name, resolve_device, resolve_dtype
from sfrt.ring import ring_for
from sfrt_export.gate import PROMPTS, embeddings
from sfrt_export.quantized_bundle import quantize_bundle


@dataclass(frozen=True)
class Form:
    """A way to run the model."""

    name: str
    quantized: bool
    ring: RingDType


PLAIN = Form("plain", False, "model")
FORMS = (Form("float8 weights", True, "model"), Form("float8 ring", False, "float8"), Form("both", True, "float8"))
MOST = 100.0


@dataclass(frozen=True)
class Row:
    """How a form did: decibels beside the plain model, stream by stream (none for that itself), and time."""

    form: str
    quality: dict[str, Figure]
    chunk_ms: Figure
    stated_bytes: dict[str, int]

    def __str__(self) -> str:
        medians = {name: f"{figure.percentiles['p50']:.1f}" for name, figure in self.quality.items()}
        told = " ".join(f"{medians.get(name, '–'):>7}" for name in QUALITIES)
        parts = ", ".join(f"{part} {in_words(self.stated_bytes[part])}" for part in ("transformer", "ring"))
        return f"{self.form:15} {told} {self.chunk_ms.percentiles['p50']:10.1f} ms   {parts}"


QUALITIES = ("first_latents_db", "first_frames_db", "latents_db", "frames_db")
HEADER = """\
                  first chunk      all chunks
                latents  frames latents  frames     a chunk"""


def measure(model: Path, device: str, chunks: int, seeds: int, folder: Path) -> list[Row]:
    """A row for the plain model, then one for each form; the quantised bundle is written into the folder."""
    plain = Bundle.open(model)
    prompts = PROMPTS if plain.manifest.text_encoder else embeddings(None, plain.manifest.model)
    without_graphs = replace(plain, manifest=replace(plain.manifest, graphs=()))
    quantized = quantize_bundle(without_graphs, folder / "quantized", "float8", force=True)
    rows: list[Row] = []
    expected: list[list[Chunk]] = []
    for form in (PLAIN, *FORMS):
        runtime = Runtime(quantized.path if form.quantized else plain.path, device=device, backend="torch")
        stream = replace(runtime.stream, ring_dtype=form.ring)
        streams = [played(runtime, stream, prompt, seed, chunks) for prompt in prompts for seed in range(seeds)]
        expected = expected or streams
        ratios = [] if form is PLAIN else [decibels(*pair) for pair in zip(streams, expected, strict=True)]
        quality = {name: Figure(name, tuple(of[name] for of in ratios)) for name in QUALITIES if ratios}
        filled = min(chunks - 1, math.ceil(ring_for(stream, chunks * stream.chunk).slots / stream.chunk))
        times = tuple(chunk.timings.chunk_ms for chunks_of_one in streams for chunk in chunks_of_one[filled:])
        rows.append(Row(form.name, quality, Figure("chunk_ms", times), dict(runtime.memory(stream).parts)))
    return rows


def played(runtime: Runtime, stream: StreamConfig, prompt: str | Tensor, seed: int, chunks: int) -> list[Chunk]:
    """A stream of so many chunks."""
    with runtime.session(prompt, seed=seed, limit=chunks, stream=stream) as session:
        return list(session)


def decibels(stream: list[Chunk], expected: list[Chunk]) -> dict[str, float]:
    """The ratios that QUALITIES names."""
    ratios: list[float] = []
    for count in (1, len(stream)):
        latents, plain_latents = (torch.cat([each.latents.cpu() for each in of[:count]]) for of in (stream, expected))
        frames, plain_frames = (
            torch.cat([torch.from_numpy(each.frames) for each in of[:count]]) for of in (stream, expected)
        )
        reach = float(plain_latents.max() - plain_latents.min())
        ratios += [psnr(latents, plain_latents, reach), psnr(frames, plain_frames, 255.0)]
    return dict(zip(QUALITIES, ratios, strict=True))


def psnr(found: Tensor, expected: Tensor, peak: float) -> float:
    """In dB, at most 100."""
    error = float((found.double() - expected.double()).square().mean())
    return min(10 * math.log10(peak**2 / error), MOST) if error else MOST


def main() -> None:
    """Measure, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--model", help="a bundle's folder; default: the built-in model")
    parser.add_argument("--random", choices=SHAPES, help="random weights of this shape instead: for the time alone")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--chunks", type=int, default=7, help="of each stream")
    parser.add_argument("--seeds", type=int, default=4, help="streams of each prompt")
    arguments = parser.parse_args()
    report: dict[str, Any] = {"environment": environment(arguments.device), "chunks": arguments.chunks}
    with TemporaryDirectory() as folder:
        model = resolve_model(arguments.model)
        if arguments.random is not None:
            device = resolve_device(arguments.device)
            dtype = dtype_name(resolve_dtype("auto", device))
            model = write_random_bundle(Path(folder, "random"), SHAPES[arguments.random], "taehv", dtype, device)
        rows = measure(model, arguments.device, arguments.chunks, arguments.seeds, Path(folder))
    print(HEADER, *rows, sep="\n")
    report["forms"] = [
        {
            "form": row.form,
            "stated_bytes": row.stated_bytes,
            **{figure.name: figure.as_json() for figure in (row.chunk_ms, *row.quality.values())},
        }
        for row in rows
    ]
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
