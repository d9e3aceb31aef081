"""The built-in data set: ten shapes that a person can name, drawn by signed distances. No file, no network.

A shape is a function d(x, y): the distance to its outline, negative inside (I. Quilez, "2D distance functions").
`clip(0.5 - d / blur, 0, 1)` is then how much of a pixel it covers, which is all the drawing there is. Colour, texture,
size, place, turn, clutter, light and noise are drawn alike for all ten classes, and a shape is as often darker than
its ground as lighter. So no pixel says anything alone, a linear model learns next to nothing, and a network has to
find edges, corners and holes.

Image i depends on (seed, split, i) only, whatever else is made with it. What is done for each pixel is + - * / sqrt,
min and max, which every machine rounds alike; the few sines are taken once an image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..kernels.random import random_bits, uniform
from .datasets import Part, Raw, dataset

SIZE = 32  # pixels, height and width, as CIFAR-10's: the same networks take both
TRAIN, TEST = 10_000, 2_000  # enough for AlexNet to pass 95 %, few enough that a first run takes about a minute
SEED = 2024  # of the data set; `load(seed=...)` splits it and never redraws it, or runs could not be compared
STREAMS = {"train": 0x5A0, "test": 0x5A1}  # of the random bits, so that no test image is a training image
CHUNK = 128  # images at a time: a plane of them is 512 KB and stays in the cache

Plane = np.ndarray  # (n, SIZE, SIZE) float32


@dataset("shapes")
def shapes(folders: Sequence[Path], train_size: int | None = None, test_size: int | None = None) -> Raw:
    """As many images as are asked for; nothing is looked up in `folders`."""
    train = make_shapes(TRAIN if train_size is None else train_size, split="train")
    test = make_shapes(TEST if test_size is None else test_size, split="test")
    return Raw(Part(*train), Part(*test), CLASSES, "the built-in generator")


# ------------------------------------------------------------------ the ten, each about as large as the unit circle


def circle(x: Plane, y: Plane) -> Plane:
    return np.sqrt(x * x + y * y) - 0.9


def square(x: Plane, y: Plane) -> Plane:
    return np.maximum(abs(x), abs(y)) - 0.75


def triangle(x: Plane, y: Plane) -> Plane:
    return np.maximum(0.866 * abs(x) + 0.5 * y, -y) - 0.55


def star(x: Plane, y: Plane) -> Plane:
    """Folded along its axes of symmetry until one half of one ray is left: a single straight edge."""
    c, s = np.float32(0.809017), np.float32(0.587785)  # of 36 degrees
    x = abs(x)
    over = 2 * np.maximum(c * x - s * y, 0)
    x, y = x - over * c, y + over * s
    over = 2 * np.maximum(-c * x - s * y, 0)
    x, y = abs(x + over * c), y + over * s
    return 0.883 * x + 0.469 * (y - 1.1)


def cross(x: Plane, y: Plane) -> Plane:
    x, y = abs(x), abs(y)
    return np.maximum(np.maximum(x, y) - 0.95, np.minimum(x, y) - 0.3)


def ring(x: Plane, y: Plane) -> Plane:
    return abs(np.sqrt(x * x + y * y) - 0.72) - 0.22


def crescent(x: Plane, y: Plane) -> Plane:
    bite = x - 0.5
    return np.maximum(np.sqrt(x * x + y * y) - 0.95, 0.8 - np.sqrt(bite * bite + y * y))


def heart(x: Plane, y: Plane) -> Plane:
    """A square on its corner and a half circle on each of its two upper sides."""
    x, y = abs(x), y + 0.2
    side, height = x - 0.42, y - 0.42
    return np.minimum(0.7071 * (x + abs(y) - 0.84), np.sqrt(side * side + height * height) - 0.594)


def arrow(x: Plane, y: Plane) -> Plane:
    y = abs(y)
    shaft = np.maximum(y - 0.2, abs(x + 0.4) - 0.6)
    head = np.maximum(0.05 - x, 0.6139 * (x - 1) + 0.7894 * y)
    return np.minimum(shaft, head)


def hourglass(x: Plane, y: Plane) -> Plane:
    x, y = abs(x), abs(y)
    return np.maximum(y - 0.95, 0.7809 * (x - 0.05) - 0.6247 * y)


SHAPES: tuple[Callable[[Plane, Plane], Plane], ...] = (
    circle, square, triangle, star, cross, ring, crescent, heart, arrow, hourglass,
)  # fmt: skip
CLASSES = tuple(shape.__name__ for shape in SHAPES)


# ------------------------------------------------------------------ a picture


class _Draws:
    """The random numbers of n images, handed out in order: each call is the next column of all of them."""

    def __init__(self, samples: np.ndarray, seed: int, stream: int, words: int = 64):
        self.columns = iter(uniform(random_bits(samples, words, seed, stream=stream)).T)

    def __call__(self, low: float = 0.0, high: float = 1.0) -> np.ndarray:
        """(n, 1, 1) numbers in [low, high)."""
        return (np.float32(low) + np.float32(high - low) * next(self.columns))[:, None, None]

    def colour(self, light: np.ndarray) -> np.ndarray:
        """(n, 1, 1, 3): a hue of that lightness."""
        hue = np.stack([self(-0.25, 0.25) for _ in range(3)], axis=-1)
        return light[..., None] + hue - hue.mean(axis=-1, keepdims=True)


def make_shapes(n: int, seed: int = SEED, split: str = "train", first: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images `first` to `first + n` of a split: uint8 (n, 32, 32, 3), and labels, int64 (n,)."""
    images = np.empty((n, SIZE, SIZE, 3), np.uint8)
    labels = np.empty(n, np.int64)
    grain = _grain(seed)
    for start in range(0, n, CHUNK):
        stop = min(start + CHUNK, n)
        samples = np.arange(first + start, first + stop)
        images[start:stop], labels[start:stop] = _draw(samples, seed, STREAMS[split], grain)
    return images, labels


def _draw(samples: np.ndarray, seed: int, stream: int, grain: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    draw = _Draws(samples, seed, stream)
    labels = (draw() * len(SHAPES)).astype(np.int64).ravel()
    axis = np.arange(SIZE, dtype=np.float32) - (SIZE - 1) / 2
    px, py = axis[None, None, :], axis[None, :, None]

    # where, how large, how turned: pixels -> the shape's own coordinates
    radius = draw(10, 13)
    room = SIZE / 2 - 0.85 * radius
    x, y = px - room * draw(-0.4, 0.4), py - room * draw(-0.4, 0.4)
    cos, sin = _turn(draw())
    stretch = draw(0.87, 1.15)
    u, v = (cos * x + sin * y) / (radius * stretch), (cos * y - sin * x) / radius * stretch
    distance = np.empty_like(u)
    for label, shape in enumerate(SHAPES):
        mine = np.flatnonzero(labels == label)
        distance[mine] = shape(u[mine], v[mine])
    shape_cover = _cover(distance * radius, draw(0.8, 1.6))

    # two colours whose lightness differs, either way round, each with a texture
    dark, light = draw(0.15, 0.4), draw(0.6, 0.85)
    swap = draw() < 0.5
    ground, figure = (draw.colour(np.where(swap, a, b)) for a, b in ((dark, light), (light, dark)))
    picture = ground + _texture(draw, px, py)[..., None]
    figure = figure + _texture(draw, px, py)[..., None]

    # clutter: short strokes behind the shape
    for _ in range(2):
        _paint(picture, _stroke(draw, px, py), draw.colour(draw(0.15, 0.85)))
    _paint(picture, shape_cover, figure)

    # light from one side, and the grain of a camera
    cos, sin = _turn(draw())
    picture *= (1 + draw(0, 0.3) / SIZE * (cos * px + sin * py))[..., None]
    rows, columns = (draw(0, len(grain) - SIZE).astype(np.int64).ravel() for _ in range(2))
    windows = np.lib.stride_tricks.sliding_window_view(grain.reshape(len(grain), -1), (SIZE, SIZE * 3))
    noise = windows[rows, columns * 3].reshape(picture.shape)
    picture += draw(0.02, 0.08)[..., None] * noise
    return np.clip(picture * 255 + 0.5, 0, 255).astype(np.uint8), labels


def _turn(part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cosine and sine of a part of a full turn."""
    angle = 2 * np.pi * part.astype(np.float64)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def _cover(distance: Plane, blur: np.ndarray | float) -> Plane:
    """How much of each pixel lies inside an outline at this distance (in pixels)."""
    return np.clip(0.5 - distance / blur, 0, 1)


def _paint(picture: np.ndarray, cover: Plane, colour: np.ndarray) -> None:
    picture += cover[..., None] * (colour - picture)


def _texture(draw: _Draws, px: np.ndarray, py: np.ndarray) -> Plane:
    """Stripes, checks or, when the waves are long, a slope: the product of two triangle waves or one of them."""
    cos, sin = _turn(draw())
    wave = _wave((cos * px + sin * py) * draw(0.02, 0.3) + draw())
    across = _wave((cos * py - sin * px) * draw(0.02, 0.3) + draw())
    return draw(0, 0.1) * wave * np.where(draw() < 0.5, across, np.float32(1))


def _wave(phase: Plane) -> Plane:
    return 4 * abs(phase - np.rint(phase)) - 1


def _stroke(draw: _Draws, px: np.ndarray, py: np.ndarray) -> Plane:
    """The cover of a short thick line, anywhere."""
    x, y = px - draw(-16, 16), py - draw(-16, 16)
    cos, sin = _turn(draw())
    along, across = cos * x + sin * y, cos * y - sin * x
    along = np.maximum(abs(along) - draw(0, 6), 0)
    return _cover(np.sqrt(along * along + across * across) - draw(0.7, 2), 1.0)


def _grain(seed: int) -> np.ndarray:
    """Noise (256, 256, 3), from which each image takes a window: 3072 normal numbers an image would cost the most."""
    return np.random.default_rng(seed).standard_normal((256, 256, 3), dtype=np.float32)
