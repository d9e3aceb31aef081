"""Augmentation and normalisation of a batch at once: a table of which pixel goes where, and one gather.

Crop, padding and flip move pixels and change none, so all three are index arithmetic. What is drawn for a sample
depends on (seed, epoch, sample) only: on 1 rank or 4, resumed or not, in whatever batch it comes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..kernels.memory import empty
from ..kernels.random import random_bits
from .datasets import DataError, Split

STREAM = 0xDA7A  # of the random bits; dropout uses others
BLOCK = 32  # images at a time: larger tables are given back to the system each time, and page faults cost the most


@dataclass(frozen=True)
class Augment:
    """Random crop after padding by `pad` pixels, random horizontal flip, cutout of a square of `cutout` pixels.

    The padding mirrors the image, so that no black border shows where it was. Cutout fills with the mean, as T. DeVries
    and G. W. Taylor, "Improved Regularization of Convolutional Neural Networks with Cutout" (2017), section 3: its
    centre may lie anywhere, so that part of the square may fall outside.
    """

    pad: int = 4
    flip: bool = True
    cutout: int = 0

    def check(self, images: np.ndarray) -> None:
        """Raise DataError if `images` (N, H, W, C) are too small for this."""
        smallest = min(images.shape[1:3])
        if not 0 <= self.pad < smallest or not 0 <= self.cutout <= smallest:
            raise DataError(
                f"pad {self.pad} and cutout {self.cutout} do not fit images of {images.shape[1]} x {images.shape[2]} "
                f"pixels; expected a pad of 0 to {smallest - 1} and a cutout of 0 to {smallest}"
            )


def load_batch(
    split: Split,
    samples: np.ndarray,
    augment: Augment | None = None,
    seed: int = 0,
    epoch: int = 0,
    dtype: type = np.float32,
) -> np.ndarray:
    """Images `samples` (n,) of a split, augmented and normalised: (n, H, W, C). NumPy only, so that any thread may."""
    images = split.images
    x = empty((len(samples), *images.shape[1:]), dtype)
    scale, shift = _per_value(split, dtype)
    if augment is not None:
        # the reference body: the thread that prefetches must start none of Numba's and leave no mark in the profile
        words = random_bits.__wrapped__(samples, 5, seed, epoch, STREAM)
    for start in range(0, len(samples), BLOCK):
        block = slice(start, start + BLOCK)
        if augment is None:
            pixels = images[samples[block]]
        else:
            pixels = _crop_and_flip(images, samples[block], words[block], augment)
        _normalise(pixels, scale, shift, x[block])
    if augment is not None and augment.cutout:
        _cut_out(x, words, augment.cutout)
    return x


def _crop_and_flip(images: np.ndarray, samples: np.ndarray, words: np.ndarray, augment: Augment) -> np.ndarray:
    """uint8 (n, H, W, C), by the words 0 to 2 of each sample."""
    height, width, channels = images.shape[1:]
    places = 2 * augment.pad + 1
    rows = _mirror(np.arange(height) + _below(words[:, 0], places)[:, None] - augment.pad, height)
    columns = np.arange(width)
    if augment.flip:
        columns = np.where(words[:, 1, None] >> 31, columns[::-1], columns)
    columns = _mirror(columns + _below(words[:, 2], places)[:, None] - augment.pad, width)
    table = ((samples[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
    return np.take(images.reshape(-1, channels), table, axis=0)


def _cut_out(x: np.ndarray, words: np.ndarray, size: int) -> None:
    """Zero, the mean, in a square of each image, by the words 3 and 4."""
    height, width = x.shape[1:3]
    side = np.arange(size) - size // 2
    rows = np.clip(_below(words[:, 3], height)[:, None] + side, 0, height - 1)  # what falls outside hits the edge,
    columns = np.clip(_below(words[:, 4], width)[:, None] + side, 0, width - 1)  # which is inside the square anyway
    x[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]] = 0


def _below(words: np.ndarray, n: int) -> np.ndarray:
    """(N,) uint32 words -> whole numbers 0 to n-1."""
    return ((words.astype(np.uint64) * np.uint64(n)) >> np.uint64(32)).astype(np.int64)


def _mirror(places: np.ndarray, size: int) -> np.ndarray:
    """Places up to `size - 1` beyond either end -> places within, the image mirrored at its edge pixels."""
    places = np.abs(places)
    return np.minimum(places, 2 * (size - 1) - places)


def _per_value(split: Split, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """a and b (H*W*C,) with which (v / 255 - mean) / std is v * a - b. NumPy is slow on a last axis of 3 channels."""
    pixels = split.images.shape[1] * split.images.shape[2]
    scale, shift = 1 / (255 * split.std), split.mean / split.std
    return np.tile(scale.astype(dtype), pixels), np.tile(shift.astype(dtype), pixels)


def _normalise(pixels: np.ndarray, scale: np.ndarray, shift: np.ndarray, y: np.ndarray) -> None:
    flat = y.reshape(len(y), -1)
    np.multiply(pixels.reshape(flat.shape), scale, out=flat, dtype=flat.dtype)
    flat -= shift
