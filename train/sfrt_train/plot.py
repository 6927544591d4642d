"""The plot beside a training's log."""

from __future__ import annotations

import csv
from pathlib import Path

from sfrt.plot import Line, Panel, write_plot


def plot_log(log: Path) -> None:
    """Beside a training's CSV, a PNG: every column against the first one, but for the second, the seconds."""
    with log.open() as file:
        head, *rows = csv.reader(file)
    columns = [[float(value) for value in column] for column in zip(*rows, strict=True)]
    if columns:
        panels = [Panel(name, [Line("", columns[0], y)]) for name, y in zip(head[2:], columns[2:], strict=True)]
        write_plot(log.with_suffix(".png"), panels, head[0])
