"""A matrix product of few rows, as at inference with batch 1: all its time is that of reading B, once.

A fully connected layer of 4096 x 4096 weights is 64 MB and, for one image, 34 million multiply-adds: memory needs a
millisecond, arithmetic a tenth of that. So nothing is packed. Each worker takes some of the columns and walks down B,
eight rows at a time, each a stream for the prefetcher of the hardware; C, which is small, waits in L1.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import threads
from .dispatch import aside, plain_floats
from .matmul import matmul
from .memory import contiguous, empty
from .parallel_for import parallel_for
from .simd import broadcast, fma, lanes, load, splat, store, unrolled
from .tile import clip, panel_width, part

MOST_ROWS = 16  # with more, each number of B is used often enough to be packed
DEEP = 8  # rows of B at once
STRIP = 8192  # numbers of C that stay in L1 meanwhile


def _few_rows(a, b, out=None, *, bias=None, relu=False):
    two = plain_floats(a, b, bias) and a.ndim == b.ndim == 2
    return two and a.shape[0] <= MOST_ROWS and b.flags.c_contiguous and b.flags.aligned


def _wide(a, b, out=None, **epilogue):
    """The fixed rule of "fastest": columns for two whole vectors; those that are left go through masks, one by one."""
    return b.shape[1] >= panel_width(b.dtype)


@matmul.variant("few_rows", supports=_few_rows, auto=_wide)
def matmul_few_rows(a, b, out=None, *, bias=None, relu=False):
    """B is read once, from end to end, and never packed: for 16 rows or fewer"""
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul of {a.shape} and {b.shape}: the inner sizes differ")
    n = b.shape[1]
    if out is None:
        out = empty((a.shape[0], n), a.dtype)
    c = out if out.flags.c_contiguous and out.flags.aligned else empty(out.shape, out.dtype)
    blank = np.zeros(n, c.dtype) if bias is None else contiguous(bias)
    workers = max(1, min(threads.count(), b.size // STRIP, n // panel_width(b.dtype)))
    _few(contiguous(a), contiguous(b).reshape(b.size), blank, c.dtype.type(0 if relu else -np.inf), c, workers)
    if c is not out:
        aside(np.copyto, out, c)
    return out


@njit(cache=True)
def _few(a, b, bias, floor, c, workers):
    parallel_for(workers, _columns, (a, b, bias, floor, c, workers))


@njit(cache=True)
def _columns(worker, a, b, bias, floor, c, workers):
    n = 2 * lanes(c)  # columns are shared, and taken, in pairs of vectors
    pairs, strip = (c.shape[1] + n - 1) // n, STRIP // max(1, c.shape[0]) // n * n
    left, right = part(worker, workers, pairs)
    for first in range(left * n, min(c.shape[1], right * n), strip):
        _strip(a, b, bias, floor, c, first, min(strip, min(c.shape[1], right * n) - first))


@njit(cache=True)
def _strip(a, b, bias, floor, c, first, columns):
    """`columns` columns of C from number `first` on."""
    rows, line, deep = c.shape[0], c.shape[1], a.shape[1]
    n = lanes(c)
    flat, c = a.reshape(a.size), c.reshape(c.size)
    for row in range(rows):
        for i in range(first, first + columns):
            c[row * line + i] = bias[i]
    whole = columns // (2 * n) * (2 * n)
    for k in range(0, deep - DEEP + 1, DEEP):
        for i in range(first, first + whole, 2 * n):
            lines = _lines(b, k * line + i, line)
            for row in range(rows):
                _add(c, row * line + i, flat, row * deep + k, lines)
    for k in range(deep):  # what is left: the last rows, and the last columns of all rows
        begin = first + (whole if k < deep // DEEP * DEEP else 0)
        for row in range(rows):
            times = splat(flat[row * deep + k], c)
            for i in range(begin, first + columns, n):
                count = min(n, first + columns - i)
                at = row * line + i
                store(c, at, fma(times, load(b, k * line + i, count), load(c, at, count)), count)
    low = splat(floor, c)
    for row in range(rows):
        for i in range(first, first + columns, n):
            count = min(n, first + columns - i)
            store(c, row * line + i, clip(load(c, row * line + i, count), low), count)


@unrolled
def _lines(b, i, line):
    """DEEP rows of B, two vectors each."""
    return [[load(b, i + k * line + v * lanes(b)) for v in range(2)] for k in range(DEEP)]


@unrolled
def _add(c, i, a, j, lines):
    """Two vectors of C plus DEEP numbers of A times those rows."""
    for v in range(2):
        total = load(c, i + v * lanes(c))
        for k, line in enumerate(lines):
            total = fma(broadcast(a, j + k), line[v], total)
        store(c, i + v * lanes(c), total)
