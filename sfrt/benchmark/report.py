"""What a run of the reference cases says: a short table, and a plot of chunk latency over time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from sfrt.benchmark.cases import CLIP_CHUNKS
from sfrt.benchmark.protocol import Figure, Result
from sfrt.plot import Line, Panel, write_plot

_COLUMNS = ("chunk_ms", "dit_ms", "refresh_ms", "decode_ms", "fps", "ttff_ms", "switch_ms", "jitter", "roofline")
_NAMES = 2
"""Columns of words, before those of numbers."""
_LAST_CHUNK = f"[{CLIP_CHUNKS}]"


def table(results: Sequence[Result]) -> str:
    """A row per stream: medians, chunk_ms with its p99; of a clip those of its last chunk, whose window is full.

    Where the model reads no text, ttff_ms is that without.
    """
    heads = ["case", "decoder", "chunk_ms p50", "p99", *_COLUMNS[1:-1], "peak GiB", "roofline"]
    rows = [heads, *(_row(result) for result in results if result.stream_ms)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(_aligned(row, widths)).rstrip() for row in rows]
    return "\n".join([*lines, *_asides(results)])


def _row(result: Result) -> list[str]:
    chunk = _of(result, "chunk_ms")
    tail = "" if chunk is None else _number(chunk.percentiles["p99"])
    shown = [_median(_of(result, name)) for name in _COLUMNS]
    first = result.figure("ttff_ms") or result.figure("ttff_without_text_ms")
    shown[_COLUMNS.index("ttff_ms")] = _median(first)
    peak = result.figure("peak_gib") or result.figure("process_peak_gib")
    roofline = _of(result, "roofline")
    share = "" if roofline is None else f"{roofline.percentiles['p50']:.1%}"
    case = result.case
    return [case.name, case.decoder or "none", shown[0], tail, *shown[1:-1], _median(peak), share]


def _asides(results: Sequence[Result]) -> list[str]:
    """What is one number for a whole run, or a clip."""
    lines = []
    for result in results:
        clip, fps, cold = (result.figure(name) for name in ("clip_ms", "fps", "cold_start_s"))
        if clip is not None:
            rate = "" if fps is None else f", {fps.percentiles['p50']:.1f} fps"
            lines.append(f"the whole clip: {clip.percentiles['p50'] / 1e3:.2f} s{rate}")
        if cold is not None:
            lines.append(f"cold start: {cold.percentiles['p50']:.1f} s")
    return lines


def plot(path: Path, results: Sequence[Result]) -> None:
    """A PNG: for each case that played a stream, the latency of every chunk at the moment it was delivered.

    The first one is left out: it follows no other.
    """
    panels = []
    for result in results:
        moments = [ms / 1e3 for ms in accumulate(result.stream_ms)][1:]
        if moments:
            title = f"{result.case.name}, {result.case.decoder or 'no decoder'}: chunk_ms"
            panels.append(Panel(title, [Line("", moments, result.stream_ms[1:])], from_zero=True))
    if panels:
        write_plot(path, panels, "seconds")


def _of(result: Result, name: str) -> Figure | None:
    return result.figure(name) or result.figure(name + _LAST_CHUNK)


def _median(figure: Figure | None) -> str:
    return "" if figure is None else _number(figure.percentiles["p50"])


def _number(value: float) -> str:
    """Three digits that matter, and no fewer than are before the point."""
    if not math.isfinite(value) or not value:
        return f"{value:g}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _aligned(row: Sequence[str], widths: Sequence[int]) -> list[str]:
    """Names to the left, numbers to the right."""
    padded = [(cell.ljust(width), cell.rjust(width)) for cell, width in zip(row, widths, strict=True)]
    return [left if place < _NAMES else right for place, (left, right) in enumerate(padded)]
