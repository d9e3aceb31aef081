"""Augmentation and normalisation of bytes in one go: a table of which pixel goes where, and one gather.

Crop, padding and flip move pixels and change none, so all three are index arithmetic. What is drawn for a sample
depends on (seed, epoch, sample) only: on 1 rank or 4, resumed or not, in whatever batch it comes, on the CPU or a GPU.
"""

from __future__ import annotations

from .dispatch import Primitive, xp_of
from .random import random_bits

STREAM = 0xDA7A  # of the random bits; dropout uses others
BLOCK = 32  # images at a time: larger tables are given back to the system each time, and page faults cost the most


@Primitive(unkeyed=("seed", "epoch", "out"))
def augment(images, samples, scale, shift, pad, flip, cutout, seed, epoch, *, out=None):
    """uint8 images (S, H, W, C), integers `samples` (N,) -> (N, H, W, C): a random crop after padding by `pad` mirrored
    pixels, with `flip` mirrored at random, v * scale - shift, and zero in a random square of `cutout` pixels.

    scale and shift (C,) are float32, or float64 for float64; the result is of their dtype, or goes to `out`, where
    given: C-contiguous, of any float dtype. The product is rounded before the difference is: bits are alike anywhere.
    """
    xp, (height, width, _) = xp_of(images), images.shape[1:]
    x = xp.empty((len(samples), *images.shape[1:]), scale.dtype) if out is None else out
    # NumPy is slow on a last axis of 3 channels: a factor for each value of an image
    scale, shift = xp.tile(scale, height * width), xp.tile(shift, height * width)
    if pad or flip or cutout:
        # the reference body: the thread that prefetches must start none of Numba's and leave no mark in the profile
        words = random_bits.__wrapped__(samples, 5, seed, epoch, STREAM)
    for start in range(0, len(samples), BLOCK):
        block = slice(start, start + BLOCK)
        if pad or flip:
            pixels = _crop_and_flip(images, samples[block], words[block], pad, flip)
        else:
            pixels = images[samples[block]]
        _normalise(pixels, scale, shift, x[block])
    if cutout:
        _cut_out(x, words, cutout)
    return x


def _crop_and_flip(images, samples, words, pad, flip):
    """uint8 (n, H, W, C), by the words 0 to 2 of each sample."""
    xp, (height, width, channels) = xp_of(images), images.shape[1:]
    places = 2 * pad + 1
    rows = _mirror(xp.arange(height) + _below(words[:, 0], places)[:, None] - pad, height)
    columns = xp.arange(width)
    if flip:
        columns = xp.where(words[:, 1, None] >> 31, columns[::-1], columns)
    columns = _mirror(columns + _below(words[:, 2], places)[:, None] - pad, width)
    table = ((samples[:, None] * height + rows) * width)[:, :, None] + columns[:, None, :]
    return xp.take(images.reshape(-1, channels), table, axis=0)


def _cut_out(x, words, size):
    """Zero, the mean, in a square of each image, by the words 3 and 4."""
    xp, (height, width) = xp_of(x), x.shape[1:3]
    side = xp.arange(size) - size // 2
    rows = xp.clip(_below(words[:, 3], height)[:, None] + side, 0, height - 1)  # what falls outside hits the edge,
    columns = xp.clip(_below(words[:, 4], width)[:, None] + side, 0, width - 1)  # which is inside the square anyway
    x[xp.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]] = 0


def _below(words, n):
    """(N,) uint32 words -> whole numbers 0 to n-1."""
    xp = xp_of(words)
    return ((words.astype(xp.uint64) * xp.uint64(n)) >> xp.uint64(32)).astype(xp.int64)


def _mirror(places, size):
    """Places up to `size - 1` beyond either end -> places within, the image mirrored at its edge pixels."""
    xp = xp_of(places)
    places = xp.abs(places)
    return xp.minimum(places, 2 * (size - 1) - places)


def _normalise(pixels, scale, shift, y):
    flat = y.reshape(len(y), -1)
    pixels = pixels.reshape(flat.shape)
    if flat.dtype != scale.dtype:
        flat[...] = pixels * scale - shift
        return
    xp_of(y).multiply(pixels, scale, out=flat, dtype=flat.dtype)
    flat -= shift


@augment.work
def _(images, samples, scale, shift, pad, flip, cutout, seed, epoch, *, out=None):
    values = len(samples) * images[:1].size
    return 2 * values, values * (1 + (scale if out is None else out).itemsize)
