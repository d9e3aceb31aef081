"""Dropout on a GPU, with the same bits as on the CPU; the kernels are in dropout.cu."""

from __future__ import annotations

import numpy as np

from ..dropout import dropout, dropout_grad, threshold
from ..random import random_bits
from .launch import MOST_Y, Kernel, contiguous, empty, one_each, reals
from .source import macros
from .tunable import Tunable

WORDS = Tunable(
    "four warps, or fewer where a sample has not so many numbers: each thread draws for four",
    macros("dropout.cu", "THREADS"),
    *(dict(THREADS=n) for n in (32, 64, 256, 512)),
)

RANDOM_BITS, DROPOUT_NAIVE, DROPOUT = (
    Kernel("dropout.cu", name, WORDS) for name in ("random_bits", "dropout_naive", "dropout")
)
DROPOUT_GRAD = Kernel("dropout.cu", "dropout_grad")


def _by_samples(samples, threads):
    """Grid and block: blocks of their own for each sample, for which there is something to do for so many threads."""
    block = min(WORDS["THREADS"], -(-threads // 32) * 32)
    return (samples.size, -(-threads // block)), (block,)


def _numbers(samples):
    return contiguous(samples.astype(np.int64, copy=False))


def _scale(p):
    return 1 / (1 - p) if p < 1 else 0.0


def _drawable(samples, n, *args, **kwargs):
    return samples.dtype.kind in "iu" and bool(samples.size) and 0 < n <= MOST_Y * WORDS["THREADS"]


@random_bits.variant("cuda", device="cuda", supports=_drawable)
def random_bits_cuda(samples, n, seed, epoch=0, stream=0):
    """ten rounds in registers; four words a thread, through shared memory to stores side by side"""
    out = empty(samples, (samples.size, n), np.uint32)
    words = (word & 0xFFFFFFFF for word in (epoch, stream, seed, seed >> 32))
    RANDOM_BITS(*_by_samples(samples, -(-n // 4)), _numbers(samples), out, n, *words)
    return out


def _rows_and_samples(x, samples, p, place):
    fits = x.ndim == 2 and samples.shape == x.shape[:1] and place.dtype == np.int64 and place.shape == (3,)
    return fits and reals(x) and _drawable(samples, x.shape[1])


def _dropout(kernel, launch, x, samples, p, place):
    y, mask = empty(x, x.shape), empty(x, x.shape, np.uint8)
    arrays = contiguous(x), _numbers(samples), contiguous(place), y, mask
    kernel(*launch, *arrays, x.shape[1], threshold(p), _scale(p))
    return y, mask


@dropout.variant("cuda_naive", device="cuda", supports=_rows_and_samples, auto=False)
def dropout_cuda_naive(x, samples, p, place):
    """draws and applies in one pass, a thread for each number: no bits in memory, but four words drawn for one used"""
    return _dropout(DROPOUT_NAIVE, _by_samples(samples, x.shape[1]), x, samples, p, place)


@dropout.variant("cuda", device="cuda", supports=_rows_and_samples)
def dropout_cuda(x, samples, p, place):
    """a quarter of the draws: a block's words change hands in shared memory"""
    return _dropout(DROPOUT, _by_samples(samples, -(-x.shape[1] // 4)), x, samples, p, place)


@dropout_grad.variant(
    "cuda",
    device="cuda",
    supports=lambda gy, mask, p: reals(gy) and mask.dtype == np.uint8 and mask.shape == gy.shape,
)
def dropout_grad_cuda(gy, mask, p):
    """one pass, a thread for each number"""
    gx = empty(gy, gy.shape)
    DROPOUT_GRAD(*one_each(gy.size), contiguous(gy), contiguous(mask), gx, _scale(p), gy.size)
    return gx
