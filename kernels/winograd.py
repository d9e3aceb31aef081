"""3x3 convolution with fewer multiplications: Winograd's algorithm (Lavin & Gray 2016), and by parity at stride 2.

The image is cut into overlapping tiles. Each tile is transformed (B), multiplied with the transformed weights (G), one
GEMM for each of the tile's values, here called planes, and transformed back (A):

    input tile -> planes,   planes x weights (GEMMs over channels),   planes -> output tile

| | outputs a tile | planes | multiplications an output | instead of |
| F2: F(2x2, 3x3) |  4 |  16 | 4    | 9 |
| F4: F(4x4, 3x3) | 16 |  36 | 2.25 | 9 |
| S4: stride 2    | 16 |  81 | 5.06 | 9 |

Stride 2 by parity: along one axis, output i is w0 x[2i] + w2 x[2i + 2] + w1 x[2i + 1]. The even pixels meet two taps,
a convolution of stride 1 with F(4, 2), 5 multiplications for 4 outputs; the odd ones meet one tap, 4 multiplications:
9 in place of 12, and 81 in place of 144 in two dimensions. Written as matrices it is the same algorithm once more.

The gradient of the image is the same again: at stride 1, a convolution of gy with the weights turned by 180 degrees; at
stride 2, its even and odd pixels are convolutions of gy with one and with two taps (S4X). The gradient of the weights
multiplies the planes of x with those of gy, and G^T takes the sum back to 3x3.

This file has the algorithms and their transforms; conv2d_winograd.py, conv2d_winograd_grad_w.py and conv2d_parity.py
drive them.

Rounding: the transforms add and subtract numbers of different size. Largest error over largest value, against float64:
direct 1e-6, F2 up to 1e-6, F4 up to 2e-5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from .cook_toom import Matrices, combine, cook_toom, transposed
from .simd import lanes, load, prefetch, store, stream, unrolled
from .tile import clip

# ------------------------------------------------------------------ stride 2 by parity: its matrices


def _place(rows, columns, *blocks):
    """A matrix of zeros with `blocks` placed in it: (matrix, its rows, its columns) each."""
    out = np.zeros((rows, columns))
    for block, at_rows, at_columns in blocks:
        out[np.ix_(at_rows, at_columns)] = block
    return tuple(map(tuple, out.tolist()))


def _by_parity():
    """(A, G, B) of S4, S4X and S4XEven: planes 0-4 hold F(4, 2) of the two taps, planes 5-8 the tap in the middle."""
    a, g, b = cook_toom(4, 2)
    two, one, four = range(5), range(5, 9), np.eye(4)
    even, odd = range(0, 8, 2), range(1, 8, 2)
    middle = (np.ones((4, 1)), one, [1])
    forward, backward = _place(9, 3, (g, two, [0, 2]), middle), _place(9, 3, (g, two, [2, 0]), middle)
    return (
        Matrices(
            _place(4, 9, (a, range(4), two), (four, range(4), one)),
            forward,
            _place(9, 9, (b, two, range(0, 9, 2)), (four, one, range(1, 9, 2))),
        ),
        Matrices(
            _place(8, 9, (a, odd, two), (four, even, one)),
            backward,
            _place(9, 5, (b, two, range(5)), (four, one, range(4))),
        ),
        Matrices(
            _place(8, 9, (a, even, two), (four, odd, one)),
            backward,
            _place(9, 5, (b, two, range(5)), (four, one, range(1, 5))),
        ),
    )


# ------------------------------------------------------------------ the algorithms: a class each
#
# Numba compiles for types. A named tuple's type is its class: an algorithm handed to a kernel is known to it while it
# is compiled, and its matrices become instructions.


class F2(NamedTuple):
    """F(2x2, 3x3)."""

    inputs: int = 4  # pixels of the input that a tile reads, along each axis
    planes: int = 4
    outputs: int = 2  # pixels of the output that it writes
    advance: int = 2  # pixels of the input from one tile to the next


class F4(NamedTuple):
    """F(4x4, 3x3)."""

    inputs: int = 6
    planes: int = 6
    outputs: int = 4
    advance: int = 4


class S4(NamedTuple):
    """4x4 outputs of a 3x3 convolution of stride 2."""

    inputs: int = 9
    planes: int = 9
    outputs: int = 4
    advance: int = 8


class S4X(NamedTuple):
    """The gradient of the image under S4, odd padding: 8x8 pixels from 5x5 of gy."""

    inputs: int = 5
    planes: int = 9
    outputs: int = 8
    advance: int = 4


class S4XEven(NamedTuple):
    """S4X for even padding, where odd and even pixels change places."""

    inputs: int = 5
    planes: int = 9
    outputs: int = 8
    advance: int = 4


MATRICES = {F2: cook_toom(2, 3), F4: cook_toom(4, 3), **dict(zip((S4, S4X, S4XEven), _by_parity(), strict=True))}


def _of(algorithm) -> Matrices:
    return MATRICES[type(algorithm)]


# ------------------------------------------------------------------ transforms of a tile, a vector of channels each
#
# A square of vectors does not fit into the registers, a column of it does: first every column is transformed, into a
# small array `temp` that stays in L1, then every row of that.


@unrolled
def _input_column(algorithm, x, table, column, c, temp, count=None):
    """Pixels of `x` at `table` + c, through B, to a column of `temp`."""
    n = len(_of(algorithm).B[0])
    pixels = [load(x, table[row * n + column] + c, count) for row in range(n)]
    for row, vector in enumerate(combine(_of(algorithm).B, pixels)):
        store(temp, (row * n + column) * lanes(x), vector)


@unrolled
def _input_row(algorithm, temp, row, v, i, stride):
    """A row of `temp`, through B, to the planes `v` from element `i` on, `stride` apart."""
    n = len(_of(algorithm).B[0])
    numbers = [load(temp, (row * n + k) * lanes(v)) for k in range(n)]
    for k, vector in enumerate(combine(_of(algorithm).B, numbers)):
        store(v, i + (row * len(_of(algorithm).B) + k) * stride, vector)


@unrolled
def _grad_column(algorithm, gy, table, column, c, temp, count=None):
    """Pixels of `gy` at `table` + c, through A^T, to a column of `temp`."""
    n = len(_of(algorithm).A)
    pixels = [load(gy, table[row * n + column] + c, count) for row in range(n)]
    for row, vector in enumerate(combine(transposed(_of(algorithm).A), pixels)):
        store(temp, (row * n + column) * lanes(gy), vector)


@unrolled
def _grad_row(algorithm, temp, row, v, i, stride):
    """A row of `temp`, through A^T, to the planes `v`."""
    n, planes = len(_of(algorithm).A), len(_of(algorithm).B)
    numbers = [load(temp, (row * n + k) * lanes(v)) for k in range(n)]
    for k, vector in enumerate(combine(transposed(_of(algorithm).A), numbers)):
        store(v, i + (row * planes + k) * stride, vector)


@unrolled
def output_column(algorithm, m, i, stride, column, temp):
    """A column of the planes `m` from element `i` on, through A, to `temp`."""
    n = len(_of(algorithm).B)
    numbers = [load(m, i + (row * n + column) * stride) for row in range(n)]
    for row, vector in enumerate(combine(_of(algorithm).A, numbers)):
        store(temp, (row * n + column) * lanes(m), vector)


def _output(algorithm, temp, row):
    n = len(_of(algorithm).B)
    return combine(_of(algorithm).A, [load(temp, (row * n + k) * lanes(temp)) for k in range(n)])


@unrolled
def output_row(algorithm, temp, row, bias, b, floor, y, table, c, count=None, past=False):
    """A row of `temp`, through A, plus bias, to the pixels of `y` at `table` + c; with `past`, past the caches."""
    add = load(bias, b)
    for k, vector in enumerate(_output(algorithm, temp, row)):
        _write(y, table[row * len(_of(algorithm).A) + k] + c, clip(vector + add, floor), count, past)


def _write(y, i, vector, count, past):
    if past:
        stream(y, i, vector)
    else:
        store(y, i, vector, count)


@unrolled
def output_row_plus(algorithm, temp, row, bias, b, floor, residual, others, y, table, c, count=None, past=False):
    """The same plus the pixels of `residual` at `others` + c."""
    add = load(bias, b)
    for k, vector in enumerate(_output(algorithm, temp, row)):
        at = row * len(_of(algorithm).A) + k
        vector = vector + add + load(residual, others[at] + c, count)
        _write(y, table[at] + c, clip(vector, floor), count, past)


@unrolled
def weights_column(algorithm, w, i, tap, column, temp, count=None):
    """A column of 3x3 weights from element `i` on, `tap` apart, through G, to `temp`."""
    taps = [load(w, i + (row * 3 + column) * tap, count) for row in range(3)]
    for row, vector in enumerate(combine(_of(algorithm).G, taps)):
        store(temp, (row * 3 + column) * lanes(w), vector)


@unrolled
def weights_row(algorithm, temp, row, u, j, stride):
    """A row of `temp`, through G, to the planes `u` from element `j` on, `stride` apart."""
    numbers = [load(temp, (row * 3 + k) * lanes(u)) for k in range(3)]
    for k, vector in enumerate(combine(_of(algorithm).G, numbers)):
        store(u, j + (row * len(_of(algorithm).G) + k) * stride, vector)


@unrolled
def gather_column(algorithm, u, i, stride, column):
    """A column of the planes `u` from element `i` on."""
    n = len(_of(algorithm).G)
    return [load(u, i + (row * n + column) * stride) for row in range(n)]


@unrolled
def add_vectors(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


@unrolled
def gathered_column(algorithm, vectors, column, temp):
    """A column of planes, through G^T, to `temp`."""
    n = len(_of(algorithm).G)
    for row, vector in enumerate(combine(transposed(_of(algorithm).G), list(vectors))):
        store(temp, (row * n + column) * lanes(temp), vector)


@unrolled
def gathered_row(algorithm, temp, row, w, i, tap, count=None):
    """A row of `temp`, through G^T, to 3x3 weights from element `i` on, `tap` apart."""
    n = len(_of(algorithm).G)
    numbers = [load(temp, (row * n + k) * lanes(w)) for k in range(n)]
    for k, vector in enumerate(combine(transposed(_of(algorithm).G), numbers)):
        store(w, i + (row * 3 + k) * tap, vector, count)


@unrolled
def fetch(algorithm, x, table, c):
    """Ask for the pixels that the next tile does not share with this one: the hardware foresees rows, not tiles."""
    tile = type(algorithm)()
    for k in range(tile.inputs**2):
        if k % tile.inputs >= tile.inputs - tile.advance:
            prefetch(x, table[k] + c)


@unrolled
def fetch_grad(algorithm, gy, table, c):
    """The same for a tile of gy, where none are shared."""
    for k in range(type(algorithm)().outputs ** 2):
        prefetch(gy, table[k] + c)


@njit(cache=True)
def input_to_planes(algorithm, x, table, c, count, temp, v, i, stride):
    """A tile of `x`, a vector of channels from `c` on of which `count` exist, to the planes `v`."""
    for column in range(algorithm.inputs):
        if count < lanes(x):
            _input_column(algorithm, x, table, column, c, temp, count)
        else:
            _input_column(algorithm, x, table, column, c, temp)
    for row in range(algorithm.planes):
        _input_row(algorithm, temp, row, v, i, stride)


@njit(cache=True)
def grad_to_planes(algorithm, gy, table, c, count, temp, v, i, stride):
    """The same for a tile of gy."""
    for column in range(algorithm.outputs):
        if count < lanes(gy):
            _grad_column(algorithm, gy, table, column, c, temp, count)
        else:
            _grad_column(algorithm, gy, table, column, c, temp)
    for row in range(algorithm.planes):
        _grad_row(algorithm, temp, row, v, i, stride)


# The largest tile, S4's, has 81 vectors of at most 16 lanes; its table, 81 entries.
TEMP, TABLE = 81 * 16, 81
