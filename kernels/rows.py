"""One pass over the rows of (M, C) arrays at the speed of memory: what it stores, what it adds up for each column.

A pass is a named tuple of C-contiguous arrays and numbers, the arrays' dtype first, with a method for one vector:

    class ReLUAndSum(NamedTuple):           # y = max(x, 0), and the sum of y over the rows
        x: np.ndarray
        y: np.ndarray

        def step(self, i, c, count, sums):  # at element i, which is in column c; `count` lanes, all of them if None
            y = maximum(load(self.x, i, count), 0)
            store(self.y, i, y, count)
            return (sums[0] + y,)

`run(ReLUAndSum(x, y), rows, columns, sums=1)` returns the sum, (1, C) in float64. LLVM vectorises a plain loop over
one row too, but at each row it first tests whether the arrays overlap: of 64 channels and six arrays, half the time.

Sums over a batch are long (128 x 32 x 32 rows). They are added up in registers for ROWS rows, four vectors of columns
side by side; these sums to those of a block of at most BLOCK_ROWS rows, which the shape alone determines; and those in
float64. So no number meets more than 64 roundings, and the bits of the result do not depend on the number of threads.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from .memory import contiguous, past_caches
from .parallel_for import parallel_for
from .simd import WIDTH, lanes, load, store, stream, unrolled, zeros

ROWS = 32
BLOCK_ROWS = 1024
BLOCK = 65536  # elements that are worth a thread's while


@unrolled
def past(y, i, v, count):
    """store() past the caches, where a whole vector is to be written."""
    if count is None:
        stream(y, i, v)
    else:
        store(y, i, v, count)


def whole_and_past(y):
    """Whether a pass may write its result `y` past the caches: see memory.past_caches; rows must be whole vectors."""
    return past_caches(y) and y.shape[-1] * y.itemsize % WIDTH == 0


def rows_of(*arrays):
    """Arrays (..., C) as C-contiguous ones (M, C), copied only where they must be; (C,) is one row."""
    return [contiguous(a).reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in arrays]


def run(one_pass, rows, columns, sums=0, dtype=np.float64):
    """Do the pass; what it adds up over the rows, (sums, columns), in float64 and then rounded to `dtype`."""
    blocks = -(-rows // min(BLOCK_ROWS, max(ROWS, BLOCK // max(1, columns))))
    partial = np.empty((blocks, sums, columns), one_pass[0].dtype)
    _run(one_pass, (0,) * sums, rows, partial)
    return add_up(partial, np.empty((sums, columns), dtype))


def add_up(partial, totals):
    """(blocks, sums, C) -> `totals` (sums, C), which is returned: in float64, block after block."""
    if totals.size:
        _add_up(partial, totals)
    return totals


@njit(cache=True)
def _add_up(partial, totals):
    line = np.empty(totals.shape[1])
    for s in range(totals.shape[0]):
        line[:] = 0
        for b in range(partial.shape[0]):
            for c in range(line.size):
                line[c] += partial[b, s, c]
        for c in range(line.size):
            totals[s, c] = line[c]


@njit(cache=True)
def _run(one_pass, none, rows, partial):  # `none`, a zero for each sum, says how many while this is being compiled
    parallel_for(len(partial), _block, (one_pass, none, rows, partial))


@njit
def _block(b, one_pass, none, rows, partial):
    length = (rows + len(partial) - 1) // len(partial)
    first, last, totals = b * length, min(rows, (b + 1) * length), partial[b]
    totals[:] = 0
    columns, n = totals.shape[1], lanes(one_pass[0])
    for r0 in range(first, last, ROWS):
        r1 = min(last, r0 + ROWS)
        c = 0
        while c + 4 * n <= columns:
            sums = _start(one_pass, none, 4)
            for r in range(r0, r1):
                sums = _step(one_pass, r * columns + c, c, None, sums)
            _add_to(totals, columns, c, None, sums)
            c += 4 * n
        while c < columns:
            count = min(n, columns - c)
            tail = _start(one_pass, none, 1)
            for r in range(r0, r1):
                tail = _step(one_pass, r * columns + c, c, count, tail)
            _add_to(totals, columns, c, count, tail)
            c += n


@unrolled
def _start(one_pass, none, vectors):
    return [[zeros(one_pass[0])] * len(none)] * vectors


@unrolled
def _step(one_pass, i, c, count, sums):
    n = lanes(one_pass[0])
    return [one_pass.step(i + k * n, c + k * n, count, of_vector) for k, of_vector in enumerate(sums)]


@unrolled
def _add_to(totals, columns, c, count, sums):
    n = lanes(totals)
    for k, of_vector in enumerate(sums):
        for s, v in enumerate(of_vector):
            i = columns * s + c + k * n
            store(totals, i, load(totals, i, count) + v, count)
