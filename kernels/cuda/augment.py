"""Batches from bytes on a GPU, with the same bits as on the CPU; the kernel is in augment.cu."""

from __future__ import annotations

import numpy as np

from ..augment import STREAM, augment
from ..narrow import sum_dtype
from .im2col import MOST_Y
from .launch import REALS, Kernel, contiguous, empty
from .source import macros
from .tunable import Tunable

VALUES = Tunable(
    "eight warps, for whose values two threads draw: larger blocks draw less often, smaller ones balance better",
    macros("augment.cu", "THREADS"),
    *(dict(THREADS=n) for n in (128, 512, 1024)),
)

AUGMENT = Kernel("augment.cu", "augment", VALUES)


def _bytes_and_samples(images, samples, scale, shift, *args, out=None):
    like = scale if out is None else out
    fits = images.dtype == np.uint8 and images.ndim == 4 and samples.dtype.kind in "iu" and bool(samples.size)
    to = like.dtype in REALS and (out is None or out.flags.c_contiguous)
    numbers = scale.dtype == shift.dtype == sum_dtype(like.dtype) and scale.shape == shift.shape == images.shape[3:]
    return fits and to and numbers and 0 < images[:1].size <= MOST_Y * VALUES["THREADS"]


@augment.variant("cuda", device="cuda", supports=_bytes_and_samples)
def augment_cuda(images, samples, scale, shift, pad, flip, cutout, seed, epoch, *, out=None):
    """one pass, a thread for each value; the words of an image are drawn in its blocks, and no table is in memory"""
    size = images[:1].size
    x = empty(images, (samples.size, *images.shape[1:]), scale.dtype) if out is None else out
    given = contiguous(images), contiguous(samples.astype(np.int64, copy=False)), contiguous(scale), contiguous(shift)
    words = (word & 0xFFFFFFFF for word in (epoch, STREAM, seed, seed >> 32))
    threads = VALUES["THREADS"]
    grid = samples.size, -(-size // threads)
    AUGMENT(grid, (threads,), *given, x, *images.shape[1:], pad, bool(flip), cutout, *words)
    return x
