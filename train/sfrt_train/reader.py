"""Reads colour, shape and motion from the pixels of a video, knowing nothing of the prompt or the model."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import torch
from torch import Tensor

from sfrt_train.data import COLOURS, DIRECTIONS, SHAPES, SIZE, Scene, coverage

_NAMES = list(COLOURS)
_PALETTE = torch.tensor(list(COLOURS.values()))
AREA = {"circle": math.pi, "square": 4.0, "triangle": 0.675**2 * 3 * math.sqrt(3)}
_FITS = 0.8
"""Overlap with the best of the three shapes below which an object has none of them."""


def read_scene(pixels: Tensor) -> Scene:
    """Pixels [F, 3, SIZE, SIZE] in [0, 1] -> the scene; a part that cannot be told is "?"."""
    ground, colour = _colours(pixels)
    if colour is None:
        return Scene("?", "?", "?", _NAMES[ground])
    masks = _masks(pixels, colour, ground)
    seen = masks.flatten(1).sum(1) > 30
    if seen.float().mean() < 0.8:
        return Scene("?", "?", "?", _NAMES[ground])
    centres = centres_of(masks[seen])
    shape = _most([_shape(mask, centre) for mask, centre in zip(masks[seen], centres, strict=True)])
    return Scene(_NAMES[colour], shape, motion_of(centres.numpy()), _NAMES[ground])


def _colours(pixels: Tensor) -> tuple[int, int | None]:
    """(background, object) as places in the palette: the two colours that most pixels are nearest to."""
    away = torch.cdist(pixels.permute(0, 2, 3, 1).reshape(-1, 3), _PALETTE)
    distance, nearest = away.min(1)
    counts = torch.bincount(nearest[distance < 0.25], minlength=len(_NAMES))
    ground, colour = (int(i) for i in counts.topk(2).indices)
    enough = counts[colour] > 0.02 * len(nearest)
    return ground, colour if enough else None


def _masks(pixels: Tensor, colour: int, ground: int) -> Tensor:
    """How far each pixel [F, SIZE, SIZE] lies on the way from the background's colour to the object's, in [0, 1]."""
    way = (_PALETTE[colour] - _PALETTE[ground]).view(1, 3, 1, 1)
    along = ((pixels - _PALETTE[ground].view(1, 3, 1, 1)) * way).sum(1) / way.square().sum()
    return along.clamp(0, 1).where(along > 0.25, 0.0)


def centres_of(masks: Tensor) -> Tensor:
    """Centroids [F, 2] (x, y) on the torus: a circular mean, then a plain one with that in the middle."""
    angles = 2 * math.pi * (torch.arange(SIZE) + 0.5) / SIZE
    turn = torch.polar(torch.ones(SIZE), angles)
    rough = torch.stack([(masks.sum(axis) * turn).sum(1).angle() for axis in (1, 2)], dim=1) * SIZE / (2 * math.pi)
    pixels = torch.arange(SIZE) + 0.5
    fine = []
    for axis in (0, 1):
        offset = (pixels - rough[:, axis : axis + 1] + SIZE / 2) % SIZE - SIZE / 2
        profile = masks.sum(axis + 1)
        fine.append(rough[:, axis] + (profile * offset).sum(1) / profile.sum(1))
    return torch.stack(fine, dim=1) % SIZE


def _shape(mask: Tensor, centre: Tensor) -> str:
    """The shape that, drawn at the same place with the same area, overlaps the mask most."""
    area = float(mask.sum())
    best, name = _FITS, "?"
    for shape in SHAPES:
        drawn = coverage(centre[None], math.sqrt(area / AREA[shape]), shape)[0]
        overlap = float(torch.minimum(drawn, mask).sum() / torch.maximum(drawn, mask).sum())
        if overlap > best:
            best, name = overlap, shape
    return name


def motion_of(centres: np.ndarray) -> str:
    """Straight along an axis, round a circle, or neither (bouncing), from centres [F, 2] on the torus."""
    moves = (np.diff(centres, axis=0) + SIZE / 2) % SIZE - SIZE / 2
    smooth = np.stack([np.convolve(moves[:, axis], np.ones(5) / 5, mode="valid") for axis in (0, 1)], axis=1)
    speeds = np.hypot(smooth[:, 0], smooth[:, 1])
    if speeds.mean() < 0.4:
        return "?"
    mean = smooth.mean(0)
    if np.hypot(*mean) > 0.9 * speeds.mean():
        name, share = max(
            ((name, float(mean @ np.array(way)) / float(np.hypot(*mean))) for name, way in DIRECTIONS.items()),
            key=lambda pair: pair[1],
        )
        return name if share > math.cos(math.radians(20)) else "bouncing"
    return "circling" if _is_circle(np.cumsum(moves, axis=0)) else "bouncing"


def _is_circle(path: np.ndarray) -> bool:
    """Whether a path [F, 2] off the torus keeps its distance from some middle.

    A bounce may go round too, but on a rectangle: its distance varies by 9 % or more, that of a circle whose places are
    1.5 pixels off by 7 % at most. A straight way to and fro is a circle of no end.
    """
    smooth = np.stack([np.convolve(path[:, axis], np.ones(3) / 3, mode="valid") for axis in (0, 1)], axis=1)
    # The circle nearest to the path: x² + y² = 2·a·x + 2·b·y + c is linear in its middle (a, b).
    (a, b, _), *_ = np.linalg.lstsq(np.column_stack([2 * smooth, np.ones(len(smooth))]), (smooth**2).sum(1))
    radii = np.hypot(smooth[:, 0] - a, smooth[:, 1] - b)
    return bool(radii.std() < 0.08 * radii.mean() and radii.mean() < SIZE / 2)


def _most(names: list[str]) -> str:
    return Counter(names).most_common(1)[0][0]
