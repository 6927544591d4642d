"""Made-up clips: one flat shape moving on a flat background, with a prompt that says so in one of many ways.

The picture is a torus: what leaves on one side comes back on the other, so every motion can go on for ever. A clip
is a pure function of its random generator, and a clip may change its prompt where a chunk begins: the picture changes
at once, the motion goes on from where the object is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

SIZE = 64
"""Pixels along one side of the picture."""
CELL = 8
"""Pixels along one side of a latent cell; a latent frame is four pixel frames."""
SPEED = 2.0
"""Pixels an object moves in a pixel frame, along each axis it moves on: a cell in a latent frame."""
RADIUS = 13.0
ORBIT = 16.0
"""Pixels: the size of an object, and of the circle that a circling one follows."""
LAP = 48
"""Pixel frames once round that circle."""
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.87, 0.10, 0.12),
    "green": (0.10, 0.62, 0.22),
    "blue": (0.13, 0.25, 0.90),
    "yellow": (0.98, 0.88, 0.15),
    "white": (0.97, 0.97, 0.97),
    "black": (0.04, 0.04, 0.04),
    "purple": (0.55, 0.16, 0.70),
    "orange": (0.98, 0.53, 0.06),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
MOTIONS = (*DIRECTIONS, "circling", "bouncing")

NOUNS = {
    "circle": ("circle", "circle", "disc", "disk", "ball", "dot"),
    "square": ("square", "square", "box", "block"),
    "triangle": ("triangle",),
}
VERBS = ("moving", "moving", "going", "sliding", "drifting", "floating", "gliding", "travelling", "flying")
PHRASES = {
    "up": ("{verb} up", "{verb} upwards", "{verb} to the top", "rising"),
    "down": ("{verb} down", "{verb} downwards", "{verb} to the bottom", "falling", "sinking"),
    "left": ("{verb} left", "{verb} to the left", "{verb} leftwards", "{verb} towards the left"),
    "right": ("{verb} right", "{verb} to the right", "{verb} rightwards", "{verb} towards the right"),
    "circling": ("{verb} in a circle", "{verb} in circles", "circling", "{verb} round and round", "orbiting"),
    "bouncing": ("bouncing", "bouncing around", "bouncing off the edges", "bouncing off the walls"),
}
SENTENCES = (
    "{article} {colour} {noun} {phrase} on {article} {background} background",
    "{article} {colour} {noun} {phrase} on {article} {background} background",
    "{article} {colour} {noun} {phrase} over {article} {background} background",
    "{article} {colour} {noun} is {phrase} on {article} {background} background",
    "{article} {colour} {noun} {phrase} in front of {article} {background} backdrop",
    "{article} {colour} {noun} {phrase} against {background}",
    "{colour} {noun} {phrase}, {background} background",
    "on {article} {background} background {article} {colour} {noun} is {phrase}",
    "{article} {background} scene with {article} {colour} {noun} {phrase}",
    "a video of {article} {colour} {noun} {phrase} on {background}",
    "{article} {noun}, {colour}, {phrase}, on {article} {background} background",
    "{background} background, {colour} {noun}, {phrase}",
)


@dataclass(frozen=True)
class Scene:
    """What a prompt says: names from COLOURS, SHAPES and MOTIONS."""

    colour: str
    shape: str
    motion: str
    background: str


@dataclass(frozen=True)
class Clip:
    """Pixels [F, 3, SIZE, SIZE] in [0, 1] with one scene and one prompt for every chunk."""

    pixels: Tensor
    scenes: tuple[Scene, ...]
    prompts: tuple[str, ...]


def every_scene() -> list[Scene]:
    """All scenes whose object can be told from the background."""
    return [
        Scene(colour, shape, motion, background)
        for colour in COLOURS
        for shape in SHAPES
        for motion in MOTIONS
        for background in COLOURS
        if colour != background
    ]


def split_scenes(held_out: int, seed: int) -> tuple[list[Scene], list[Scene]]:
    """(to train on, held out): a scene is on one side in all its wordings."""
    scenes = every_scene()
    order = np.random.default_rng(seed).permutation(len(scenes))
    return [scenes[i] for i in order[held_out:]], [scenes[i] for i in order[:held_out]]


def say(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many ways to put a scene in words."""

    def pick(choices: tuple[str, ...]) -> str:
        return choices[int(rng.integers(len(choices)))]

    sentence = pick(SENTENCES).format(
        article="{article}",
        colour=scene.colour,
        background=scene.background,
        noun=pick(NOUNS[scene.shape]),
        phrase=pick(PHRASES[scene.motion]).format(verb=pick(VERBS)),
    )
    words = sentence.split()
    for i, word in enumerate(words):
        if word == "{article}":
            article = "an" if words[i + 1][0] in "aeio" else "a"
            words[i] = article if rng.random() < 0.85 else "the"
    sentence = " ".join(words)
    return sentence.capitalize() + "." if rng.random() < 0.2 else sentence


def plain(scene: Scene) -> str:
    """The scene in the plainest words."""
    phrase = "moving in a circle" if scene.motion == "circling" else scene.motion
    phrase = f"moving {phrase}" if scene.motion in DIRECTIONS else phrase
    article = "an" if scene.colour[0] == "o" else "a"
    ground = "an" if scene.background[0] == "o" else "a"
    return f"{article} {scene.colour} {scene.shape} {phrase} on {ground} {scene.background} background"


def chunk_lengths(chunks: int, chunk: int) -> list[int]:
    """Pixel frames of each chunk of `chunk` latent frames: the very first latent frame shows one, all others four."""
    return [4 * chunk - 3] + [4 * chunk] * (chunks - 1)


def make_clip(
    rng: np.random.Generator,
    scenes: list[Scene],
    chunks: int,
    chunk: int = 3,
    switch_share: float = 0.0,
    free: bool = False,
    skip: int = 0,
) -> Clip:
    """A clip of so many chunks; a `switch_share` of all clips change their scene once, where a later chunk begins.

    An object keeps one size and moves in step with the latent cells: by one cell in the time of one latent frame, from
    a corner of a cell, so that the same few latents come back everywhere; it comes in from the side it moves away from.
    free lifts that: any size, place and speed. A clip with a skip begins in the middle, so many pixel frames later.
    """
    first = scenes[int(rng.integers(len(scenes)))]
    switches = chunks > 1 and rng.random() < switch_share
    boundary = int(rng.integers(1, chunks)) if switches else chunks
    second = switched_scene(first, scenes, rng) if switches else first
    first_prompt, second_prompt = say(first, rng), say(second, rng)
    lengths = chunk_lengths(chunks, chunk)
    size, speed = (float(rng.uniform(10, 14)), float(rng.uniform(1.3, 2.0))) if free else (RADIUS, SPEED)
    path = _travel(first.motion, None, skip + sum(lengths[:boundary]), speed, free, rng)[skip:]
    pixels = [draw(path, size, first)]
    if switches:
        path = _travel(second.motion, path[-1], sum(lengths[boundary:]), speed, free, rng)
        pixels.append(draw(path, size, second))
    after = chunks - boundary
    said = (first_prompt,) * boundary + (second_prompt,) * after
    return Clip(torch.cat(pixels), (first,) * boundary + (second,) * after, said)


def switched_scene(scene: Scene, scenes: list[Scene], rng: np.random.Generator) -> Scene:
    """A scene from the list that differs in one to four of its parts."""
    allowed = set(scenes)
    while True:
        other = scenes[int(rng.integers(len(scenes)))]
        keep = [name for name in ("colour", "shape", "motion", "background") if rng.random() < 0.55]
        mixed = replace(other, **{name: getattr(scene, name) for name in keep})
        if mixed != scene and mixed in allowed:
            return mixed


def _travel(
    motion: str, before: np.ndarray | None, count: int, speed: float, free: bool, rng: np.random.Generator
) -> np.ndarray:
    """`count` places [count, 2] (x, y): on from the place `before`, or from one of their own where a clip begins."""
    if before is not None and not free:
        before = _on_cells(before)
    if motion == "circling":
        return _circle(before, count, speed, rng)
    if motion == "bouncing":
        return _bounce(before, count, speed, free, rng)
    way = speed * np.array(DIRECTIONS[motion])
    if before is None:
        before = (rng.uniform(0, SIZE, 2) if free else _entrance(motion, rng)) - way
    return (before + way + np.arange(count)[:, None] * way) % SIZE


def _entrance(motion: str, rng: np.random.Generator) -> np.ndarray:
    """Where an object that moves in one direction begins: whole in the picture, near the side it moves away from.

    So already the average over all first frames tells one direction from another, which is what the flow model has to
    go by where all is noise.
    """
    way = np.array(DIRECTIONS[motion])
    behind, beside = int(rng.integers(1, 3)), int(rng.integers(-2, 3))
    return SIZE / 2 - CELL * (behind * way + beside * way[::-1])


def _on_cells(place: np.ndarray) -> np.ndarray:
    """The nearest corner of a latent cell."""
    return np.round(place / CELL) * CELL % SIZE


def _circle(before: np.ndarray | None, count: int, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Clockwise, a lap in twelve latent frames, from a quarter on.

    Round the middle, or on from `before` round the centre nearest to it.
    """
    phase = int(rng.integers(4)) * math.pi / 2
    centre, turned = np.array([SIZE / 2, SIZE / 2]), np.arange(count)
    if before is not None:
        phases = np.arange(4) * math.pi / 2
        centres = before - ORBIT * np.stack([np.cos(phases), np.sin(phases)], axis=1)
        nearest = int(np.abs(centres - SIZE / 2).sum(1).argmin())
        phase, centre, turned = float(phases[nearest]), centres[nearest], turned + 1
    angles = phase + turned[:, None] * (speed / SPEED) * 2 * math.pi / LAP
    return (centre + ORBIT * np.concatenate([np.cos(angles), np.sin(angles)], axis=1)) % SIZE


def _bounce(before: np.ndarray | None, count: int, speed: float, free: bool, rng: np.random.Generator) -> np.ndarray:
    """Straight and slanted, turned back at the walls, which an object beyond them comes back to."""
    low, high = 2 * CELL, SIZE - 2 * CELL
    angle = rng.uniform(math.radians(32), math.radians(58)) if free else math.pi / 4
    slant = math.sqrt(2) * speed * np.array([math.cos(angle), math.sin(angle)])
    velocity = slant * rng.choice([-1, 1], 2)
    here = rng.uniform(low, high, 2) if before is None else before.astype(float)
    if before is None and not free:
        here = _on_cells(here)
    path = np.empty((count, 2))
    for i in range(count):
        if i or before is not None:
            velocity = np.where(here <= low, slant, np.where(here >= high, -slant, velocity))
            here = np.round(here + velocity, 6)  # exactly on the cells, however many steps it took
        path[i] = here
    return path % SIZE


def draw(path: np.ndarray, size: float, scene: Scene) -> Tensor:
    """The scene with its object at every place of the path -> [F, 3, SIZE, SIZE], edges anti-aliased."""
    cover = coverage(torch.from_numpy(path).float(), size, scene.shape)[:, None]
    colour = torch.tensor(COLOURS[scene.colour]).view(1, 3, 1, 1)
    background = torch.tensor(COLOURS[scene.background]).view(1, 3, 1, 1)
    return torch.lerp(background, colour, cover)


def coverage(places: Tensor, size: float | Tensor, shape: str) -> Tensor:
    """How much of each pixel the shape covers: [F, 2] centres (x, y) on the torus -> [F, SIZE, SIZE] in [0, 1]."""
    pixels = torch.arange(SIZE) + 0.5
    x = (pixels - places[:, :1] + SIZE / 2) % SIZE - SIZE / 2
    y = (pixels - places[:, 1:] + SIZE / 2) % SIZE - SIZE / 2
    x, y = x[:, None, :], y[:, :, None]
    if shape == "circle":
        outside = torch.sqrt(x * x + y * y) - size
    elif shape == "square":
        outside = torch.maximum(x.abs(), y.abs()) - size
    else:
        outside = torch.maximum(y.expand(-1, -1, SIZE), 0.75**0.5 * x.abs() - 0.5 * y) - 0.675 * size
    return (0.5 - outside).clamp(0, 1)
