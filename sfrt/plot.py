"""Plots of a few lines in a few panels, drawn with Pillow, which sfrt needs anyway."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_COLOURS = ((31, 119, 180), (214, 95, 14), (44, 140, 60), (150, 60, 160), (120, 120, 120), (190, 150, 0))
_INK, _FAINT, _PAPER = (30, 30, 30), (222, 222, 222), (255, 255, 255)
_SCALE = 2
"""Dots to a unit: lengths below are in units."""
_WIDTH, _HEIGHT, _COLUMNS = 330, 220, 3
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 12, 28, 30
_LEGEND_ROW = 18


@dataclass(frozen=True)
class Line:
    """Points with a spread about each, drawn as a band."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    spread: Sequence[float] = ()


@dataclass(frozen=True)
class Panel:
    """Lines on one pair of axes; the colour of a line is its place among them.

    from_zero: the vertical axis begins there, so that heights can be compared.
    """

    title: str
    lines: Sequence[Line]
    from_zero: bool = False


def write_plot(path: Path, panels: Sequence[Panel], x_title: str) -> None:
    """A PNG with the panels in rows and one legend below them, of the lines that have a name."""
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(line.name for panel in panels for line in panel.lines))
    shown = [name for name in names if name]
    size = (columns * _WIDTH, rows * _HEIGHT + _LEGEND_ROW * (len(shown) + 1))
    image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), _PAPER)
    draw = ImageDraw.Draw(image, "RGBA")
    for number, panel in enumerate(panels):
        _Axes(draw, number % columns * _WIDTH, number // columns * _HEIGHT, panel).draw(x_title, names)
    for number, name in enumerate(shown):
        y = rows * _HEIGHT + _LEGEND_ROW * (number + 0.5)
        _segment(draw, (_LEFT, y), (_LEFT + 24, y), _colour(number), 2)
        _text(draw, (_LEFT + 32, y), name, "lm")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


class _Axes:
    """One panel's place on the page and its scales."""

    def __init__(self, draw: ImageDraw.ImageDraw, left: float, top: float, panel: Panel) -> None:
        self._draw, self._panel = draw, panel
        self._box = (left + _LEFT, top + _TOP, left + _WIDTH - _RIGHT, top + _HEIGHT - _BOTTOM)
        self._x = _ticks([x for line in panel.lines for x in line.x])
        zero = [0.0] if panel.from_zero else []
        self._y = _ticks([*zero, *(y for line in panel.lines for pair in _band(line) for y in pair)])

    def draw(self, x_title: str, names: list[str]) -> None:
        """The grid, the titles, then the lines."""
        left, top, right, bottom = self._box
        for tick in self._x:
            place = self._place(tick, self._y[0])
            _segment(self._draw, place, (place[0], top), _FAINT)
            _text(self._draw, (place[0], bottom + 9), f"{tick:g}", "mm")
        for tick in self._y:
            place = self._place(self._x[0], tick)
            _segment(self._draw, place, (right, place[1]), _FAINT)
            _text(self._draw, (left - 6, place[1]), f"{tick:g}", "rm")
        _text(self._draw, (left, top - 13), self._panel.title, "lm")
        _text(self._draw, (right, bottom + 21), x_title, "rm")
        for line in self._panel.lines:
            self._draw_line(line, _colour(names.index(line.name)))

    def _draw_line(self, line: Line, colour: tuple[int, int, int]) -> None:
        if line.spread:
            low, high = zip(*_band(line), strict=True)
            way = [self._place(*point) for point in zip(line.x, high, strict=True)]
            back = [self._place(*point) for point in zip(line.x, low, strict=True)]
            outline = [_dots(point) for point in (*way, *reversed(back))]
            if len(outline) > 3:
                self._draw.polygon(outline, fill=(*colour, 40))
        places = [self._place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        for start, end in pairwise(places):
            _segment(self._draw, start, end, colour, 1.5)
        for x, y in places if len(places) <= 20 else ():
            self._draw.ellipse((*_dots((x - 2, y - 2)), *_dots((x + 2, y + 2))), fill=colour)

    def _place(self, x: float, y: float) -> tuple[float, float]:
        left, top, right, bottom = self._box
        across = (x - self._x[0]) / (self._x[-1] - self._x[0])
        up = (y - self._y[0]) / (self._y[-1] - self._y[0])
        return left + across * (right - left), bottom - up * (bottom - top)


def _band(line: Line) -> list[tuple[float, float]]:
    """(low, high) at each point."""
    spread = line.spread or [0.0] * len(line.y)
    return [(y - s, y + s) for y, s in zip(line.y, spread, strict=True)]


def _ticks(values: Sequence[float]) -> list[float]:
    """Round numbers, about five of them, that the values lie between."""
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high), 1.0) / 5
    unit = 10 ** math.floor(math.log10(span / 4))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor * 4 >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * number, 12) for number in range(first, max(last, first + 1) + 1)]


def _colour(number: int) -> tuple[int, int, int]:
    return _COLOURS[number % len(_COLOURS)]


def _dots(place: tuple[float, float]) -> tuple[float, float]:
    return place[0] * _SCALE, place[1] * _SCALE


def _segment(
    draw: ImageDraw.ImageDraw,
    start: tuple[float, float],
    end: tuple[float, float],
    colour: tuple[int, int, int],
    width: float = 1,
) -> None:
    draw.line((*_dots(start), *_dots(end)), fill=colour, width=round(width * _SCALE))


def _text(draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str) -> None:
    draw.text(_dots(place), text, fill=_INK, font=ImageFont.load_default(11 * _SCALE), anchor=anchor)
