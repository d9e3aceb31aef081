"""3x3 convolution with fewer multiplications: Winograd's algorithm (Lavin & Gray 2016) at stride 1, by parity at stride 2.

The image is cut into overlapping tiles. Each tile is transformed (B), multiplied with the transformed weights (G), one
GEMM for each of the tile's values, here called planes, and transformed back (A):

    input tile -> planes,   planes x weights (GEMMs over channels),   planes -> output tile

| | outputs a tile | planes | multiplications an output | instead of |
| F2: F(2x2, 3x3) |  4 |  16 | 4    | 9 |
| F4: F(4x4, 3x3) | 16 |  36 | 2.25 | 9 |
| S4: stride 2    | 16 |  81 | 5.06 | 9 |

Stride 2 by parity: along one axis, output i is w0 x[2i] + w2 x[2i + 2] + w1 x[2i + 1]. The even pixels meet two taps, a
convolution of stride 1 with F(4, 2), 5 multiplications for 4 outputs; the odd ones meet one tap, 4 multiplications: 9 in
place of 12, and 81 in place of 144 in two dimensions. Written as matrices it is the same algorithm once more.

The gradient of the image is the same again: at stride 1, a convolution of gy with the weights turned by 180 degrees; at
stride 2, its even and odd pixels are convolutions of gy with one and with two taps (S4X). The gradient of the weights
multiplies the planes of x with those of gy, and G^T takes the sum back to 3x3.

Blocking: each worker takes a block of tiles through all steps while its planes stay in cache. Memory traffic is the
image once in and once out, and the transformed weights once a block; arithmetic falls by the factors above.

Rounding: the transforms add and subtract numbers of different size. Largest error over largest value, against float64:
direct 1e-6, F2 up to 1e-6, F4 up to 2e-5.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit, prange

from . import threads
from .caches import L3
from .conv2d import conv2d, conv2d_grad_w, conv2d_grad_x
from .cook_toom import combine, cook_toom, transposed
from .dispatch import plain_floats
from .im2col import output_shape
from .memory import empty, scratch
from .pack import swap_channels
from .simd import distance, lanes, load, prefetch, splat, store, unrolled
from .tile import (
    ROWS,
    VECTORS,
    clip,
    load_tile,
    multiply,
    panel,
    panel_width,
    part,
    row_offsets,
    store_tile,
    zero_tile,
)

# ------------------------------------------------------------------ the algorithms: a class each, with its matrices


class F2(NamedTuple):
    """F(2x2, 3x3)."""

    inputs: int = 4  # pixels of the input that a tile reads, along each axis
    planes: int = 4
    outputs: int = 2  # pixels of the output that it writes
    step: int = 2  # pixels of the input from one tile to the next


class F4(NamedTuple):
    """F(4x4, 3x3)."""

    inputs: int = 6
    planes: int = 6
    outputs: int = 4
    step: int = 4


class S4(NamedTuple):
    """4x4 outputs of a 3x3 convolution of stride 2."""

    inputs: int = 9
    planes: int = 9
    outputs: int = 4
    step: int = 8


class S4X(NamedTuple):
    """The gradient of the image under S4, odd padding: 8x8 pixels from 5x5 of gy."""

    inputs: int = 5
    planes: int = 9
    outputs: int = 8
    step: int = 4


class S4XEven(NamedTuple):
    """S4X for even padding, where odd and even pixels change places."""

    inputs: int = 5
    planes: int = 9
    outputs: int = 8
    step: int = 4


def _place(rows, columns, *blocks):
    """A matrix of zeros with `blocks` placed in it: (matrix, its rows, its columns) each."""
    out = np.zeros((rows, columns))
    for block, at_rows, at_columns in blocks:
        out[np.ix_(at_rows, at_columns)] = block
    return tuple(map(tuple, out.tolist()))


def _by_parity():
    """The matrices of S4, S4X and S4XEven: planes 0-4 hold F(4, 2) of the two taps, planes 5-8 the tap in the middle."""
    a, g, b = cook_toom(4, 2)
    two, one, four = range(5), range(5, 9), np.eye(4)
    middle = (np.ones((4, 1)), one, [1])
    S4.A = _place(4, 9, (a, range(4), two), (four, range(4), one))
    S4.G = _place(9, 3, (g, two, [0, 2]), middle)
    S4.B = _place(9, 9, (b, two, range(0, 9, 2)), (four, one, range(1, 9, 2)))
    S4X.G = S4XEven.G = _place(9, 3, (g, two, [2, 0]), middle)
    S4X.A = _place(8, 9, (a, range(1, 8, 2), two), (four, range(0, 8, 2), one))
    S4X.B = _place(9, 5, (b, two, range(5)), (four, one, range(4)))
    S4XEven.A = _place(8, 9, (a, range(0, 8, 2), two), (four, range(1, 8, 2), one))
    S4XEven.B = _place(9, 5, (b, two, range(5)), (four, one, range(1, 5)))


F2.A, F2.G, F2.B = cook_toom(2, 3)
F4.A, F4.G, F4.B = cook_toom(4, 3)
_by_parity()

# ------------------------------------------------------------------ transforms of one tile, a vector of channels at a time
#
# A square of vectors does not fit into the registers, a column of it does: first every column is transformed, into a
# small array `temp` that stays in L1, then every row of that.


@unrolled
def _input_column(algorithm, x, table, column, c, temp, count=None):
    """Pixels of `x` at `table` + c, through B, to a column of `temp`."""
    n = len(algorithm.B[0])
    pixels = [load(x, table[row * n + column] + c, count) for row in range(n)]
    for row, vector in enumerate(combine(algorithm.B, pixels)):
        store(temp, (row * n + column) * lanes(x), vector)


@unrolled
def _input_row(algorithm, temp, row, v, i, stride):
    """A row of `temp`, through B, to the planes `v` from element `i` on, `stride` apart."""
    n = len(algorithm.B[0])
    numbers = [load(temp, (row * n + k) * lanes(v)) for k in range(n)]
    for k, vector in enumerate(combine(algorithm.B, numbers)):
        store(v, i + (row * len(algorithm.B) + k) * stride, vector)


@unrolled
def _grad_column(algorithm, gy, table, column, c, temp, count=None):
    """Pixels of `gy` at `table` + c, through A^T, to a column of `temp`."""
    n = len(algorithm.A)
    pixels = [load(gy, table[row * n + column] + c, count) for row in range(n)]
    for row, vector in enumerate(combine(transposed(algorithm.A), pixels)):
        store(temp, (row * n + column) * lanes(gy), vector)


@unrolled
def _grad_row(algorithm, temp, row, v, i, stride):
    """A row of `temp`, through A^T, to the planes `v`."""
    n, planes = len(algorithm.A), len(algorithm.B)
    numbers = [load(temp, (row * n + k) * lanes(v)) for k in range(n)]
    for k, vector in enumerate(combine(transposed(algorithm.A), numbers)):
        store(v, i + (row * planes + k) * stride, vector)


@unrolled
def _output_column(algorithm, m, i, stride, column, temp):
    """A column of the planes `m` from element `i` on, through A, to `temp`."""
    n = len(algorithm.B)
    numbers = [load(m, i + (row * n + column) * stride) for row in range(n)]
    for row, vector in enumerate(combine(algorithm.A, numbers)):
        store(temp, (row * n + column) * lanes(m), vector)


def _output(algorithm, temp, row):
    n = len(algorithm.B)
    return combine(algorithm.A, [load(temp, (row * n + k) * lanes(temp)) for k in range(n)])


@unrolled
def _output_row(algorithm, temp, row, bias, b, floor, y, table, c, count=None):
    """A row of `temp`, through A, plus bias, to the pixels of `y` at `table` + c."""
    add = load(bias, b)
    for k, vector in enumerate(_output(algorithm, temp, row)):
        store(y, table[row * len(algorithm.A) + k] + c, clip(vector + add, floor), count)


@unrolled
def _output_row_plus(algorithm, temp, row, bias, b, floor, residual, others, y, table, c, count):
    """The same plus the pixels of `residual` at `others` + c."""
    add = load(bias, b)
    for k, vector in enumerate(_output(algorithm, temp, row)):
        at = row * len(algorithm.A) + k
        vector = vector + add + load(residual, others[at] + c, count)
        store(y, table[at] + c, clip(vector, floor), count)


@unrolled
def _weights_column(algorithm, w, i, tap, column, temp, count=None):
    """A column of 3x3 weights from element `i` on, `tap` apart, through G, to `temp`."""
    taps = [load(w, i + (row * 3 + column) * tap, count) for row in range(3)]
    for row, vector in enumerate(combine(algorithm.G, taps)):
        store(temp, (row * 3 + column) * lanes(w), vector)


@unrolled
def _weights_row(algorithm, temp, row, u, j, stride):
    """A row of `temp`, through G, to the planes `u` from element `j` on, `stride` apart."""
    numbers = [load(temp, (row * 3 + k) * lanes(u)) for k in range(3)]
    for k, vector in enumerate(combine(algorithm.G, numbers)):
        store(u, j + (row * len(algorithm.G) + k) * stride, vector)


@unrolled
def _gather_column(algorithm, u, i, stride, column):
    """A column of the planes `u` from element `i` on."""
    n = len(algorithm.G)
    return [load(u, i + (row * n + column) * stride) for row in range(n)]


@unrolled
def _add(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


@unrolled
def _gathered_column(algorithm, vectors, column, temp):
    """A column of planes, through G^T, to `temp`."""
    n = len(algorithm.G)
    for row, vector in enumerate(combine(transposed(algorithm.G), list(vectors))):
        store(temp, (row * n + column) * lanes(temp), vector)


@unrolled
def _gathered_row(algorithm, temp, row, w, i, tap, count=None):
    """A row of `temp`, through G^T, to 3x3 weights from element `i` on, `tap` apart."""
    n = len(algorithm.G)
    numbers = [load(temp, (row * n + k) * lanes(w)) for k in range(n)]
    for k, vector in enumerate(combine(transposed(algorithm.G), numbers)):
        store(w, i + (row * 3 + k) * tap, vector, count)


@unrolled
def _fetch(algorithm, x, table, c):
    """Ask for the pixels that the next tile does not share with this one: the hardware foresees rows, not tiles."""
    tile = type(algorithm)()
    for k in range(tile.inputs**2):
        if k % tile.inputs >= tile.inputs - tile.step:
            prefetch(x, table[k] + c)


@unrolled
def _fetch_grad(algorithm, gy, table, c):
    """The same for a tile of gy, where none are shared."""
    for k in range(type(algorithm)().outputs ** 2):
        prefetch(gy, table[k] + c)


@njit(cache=True)
def _input_to_planes(algorithm, x, table, c, count, temp, v, i, stride):
    """A tile of `x`, a vector of channels from `c` on of which `count` exist, to the planes `v`."""
    for column in range(algorithm.inputs):
        if count < lanes(x):
            _input_column(algorithm, x, table, column, c, temp, count)
        else:
            _input_column(algorithm, x, table, column, c, temp)
    for row in range(algorithm.planes):
        _input_row(algorithm, temp, row, v, i, stride)


@njit(cache=True)
def _grad_to_planes(algorithm, gy, table, c, count, temp, v, i, stride):
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

# ------------------------------------------------------------------ where a tile lies


@njit(cache=True)
def _pixels_of(table, tile, across, size, step, first, shape, outside):
    """Offsets of the `size` x `size` pixels of tile (row, column), `step` apart from (first, first); `outside` beyond.

    `shape` is (H, W, C) of one image; tiles are numbered through rows, then images, `across` = (rows, columns) an image.
    """
    rows, columns = across
    h, w, c = shape
    image, rest = tile // (rows * columns), tile % (rows * columns)
    top, left = rest // columns * step + first[0], rest % columns * step + first[1]
    base = image * h * w * c
    for i in range(size):
        for j in range(size):
            inside = 0 <= top + i < h and 0 <= left + j < w
            table[i * size + j] = base + ((top + i) * w + left + j) * c if inside else outside


BLOCK = 64  # tiles that a worker takes through all steps: the weights' planes are read once for each block
LINE = 16  # a cache line between planes: strides of a power of two would share a few cache sets


# ------------------------------------------------------------------ weights


@njit(parallel=True, cache=True)
def _transform_weights(algorithm, w, u):
    """(3, 3, C, O) -> planes of panels of (C, PANEL), flat, with a line between planes."""
    c, o = w.shape[2], w.shape[3]
    width = panel(w)
    panels = (o + width - 1) // width
    stride = panels * c * width + LINE
    for i in prange(c):
        _transform_weights_of(algorithm, w, u, i, stride)


@njit(cache=True)
def _transform_weights_of(algorithm, w, u, i, stride):
    c, o = w.shape[2], w.shape[3]
    width, n, temp = panel(w), lanes(w), np.empty(TEMP, w.dtype)
    for first in range(0, (o + width - 1) // width * width, n):
        for column in range(3):
            if first + n <= o:
                _weights_column(algorithm, w, i * o + first, c * o, column, temp)
            else:
                _weights_column(algorithm, w, i * o + min(first, o), c * o, column, temp, max(0, o - first))
        for row in range(algorithm.planes):
            _weights_row(algorithm, temp, row, u, (first // width * c + i) * width + first % width, stride)


@njit(parallel=True, cache=True)
def _gather_weights(algorithm, u, gw):
    """The sum over workers of the planes u (workers, planes (C, O rounded up)), through G^T, to (3, 3, C, O)."""
    for i in prange(gw.shape[2]):
        _gather_weights_of(algorithm, u, gw, i)


@njit(cache=True)
def _gather_weights_of(algorithm, u, gw, i):
    c, o = gw.shape[2], gw.shape[3]
    n, temp = lanes(gw), np.empty(TEMP, gw.dtype)
    line = (o + panel(gw) - 1) // panel(gw) * panel(gw)
    stride = c * line + LINE
    for first in range(0, o, n):
        for column in range(algorithm.planes):
            vectors = _gather_column(algorithm, u, i * line + first, stride, column)
            for worker in range(1, u.shape[0]):
                at = worker * u.shape[1] + i * line + first
                vectors = _add(vectors, _gather_column(algorithm, u, at, stride, column))
            _gathered_column(algorithm, vectors, column, temp)
        for row in range(3):
            if first + n <= o:
                _gathered_row(algorithm, temp, row, gw, i * o + first, c * o)
            else:
                _gathered_row(algorithm, temp, row, gw, i * o + first, c * o, o - first)


# ------------------------------------------------------------------ forward, and the gradient of the image


@njit(parallel=True, cache=True)
def _forward(algorithm, x, u, y, bias, floor, residual, has_residual, first, block, by_panels, work):
    """Each worker takes its share of the tiles, or of the panels, through all steps."""
    workers = work.shape[0]
    rows = (y.shape[1] + algorithm.outputs - 1) // algorithm.outputs
    columns = (y.shape[2] + algorithm.outputs - 1) // algorithm.outputs
    tiles = y.shape[0] * rows * columns
    panels = (y.shape[3] + panel(y) - 1) // panel(y)
    for worker in prange(workers):
        _forward_share(
            algorithm, x, u, y, bias, floor, residual, has_residual, first, (rows, columns),
            (0, tiles) if by_panels else part(worker, workers, tiles),
            part(worker, workers, panels) if by_panels else (0, panels), block, work[worker],
        )  # fmt: skip


@njit(cache=True)
def _forward_share(
    algorithm, x, u, y, bias, floor, residual, has_residual, first, across, share, panels, block, work
):
    c, o = x.shape[3], y.shape[3]
    n, width = lanes(x), panel(x)
    depth = (c + n - 1) // n * n  # channels of the planes, whole vectors
    square = algorithm.planes * algorithm.planes
    # work: zeros for pixels outside, a page that takes what is written outside, planes in, planes out
    page = (max(c, o) + width - 1) // width * width
    for i in range(page):
        work[i] = 0
    zeros, sink, blank = distance(x, work), distance(y, work) + page, distance(residual, work)
    v = 2 * page
    v_stride, m_stride = block * depth + LINE, block * width + LINE
    m = v + square * v_stride
    u_stride = (o + width - 1) // width * c * width + LINE
    temp = np.empty(TEMP, x.dtype)
    table, coming, others = np.empty(TABLE, np.int64), np.empty(TABLE, np.int64), np.empty(TABLE, np.int64)
    low = splat(floor, x)
    image, out = (x.shape[1], x.shape[2], x.shape[3]), (y.shape[1], y.shape[2], y.shape[3])
    for begin in range(share[0], share[1], block):
        count = min(block, share[1] - begin)
        _pixels_of(coming, begin, across, algorithm.inputs, algorithm.step, first, image, zeros)
        for t in range(count):
            table, coming = coming, table
            following = begin + min(t + 1, count - 1)
            _pixels_of(coming, following, across, algorithm.inputs, algorithm.step, first, image, zeros)
            for i in range(0, c, n):
                _fetch(algorithm, x, coming, i)
                _input_to_planes(algorithm, x, table, i, c - i, temp, work, v + t * depth + i, v_stride)
        for p in range(panels[0], panels[1]):
            for plane in range(square):
                for t in range(0, count, ROWS):
                    offsets = row_offsets(count - t, depth)
                    tile = multiply(
                        zero_tile(x), work, v + plane * v_stride + t * depth, offsets, 1,
                        u, plane * u_stride + p * c * width, width, c,
                    )  # fmt: skip
                    store_tile(work, m + plane * m_stride + t * width, row_offsets(count - t, width), tile)
            for t in range(count):
                _pixels_of(table, begin + t, across, algorithm.outputs, algorithm.outputs, (0, 0), out, sink)
                if has_residual:
                    _pixels_of(others, begin + t, across, algorithm.outputs, algorithm.outputs, (0, 0), out, blank)
                for i in range(p * width, min(o, p * width + width), n):
                    at = m + t * width + i - p * width
                    for column in range(algorithm.planes):
                        _output_column(algorithm, work, at, m_stride, column, temp)
                    for row in range(algorithm.outputs):
                        if has_residual:
                            _output_row_plus(
                                algorithm, temp, row, bias, i, low, residual, others, y, table, i, min(n, o - i)
                            )
                        elif i + n <= o:
                            _output_row(algorithm, temp, row, bias, i, low, y, table, i)
                        else:
                            _output_row(algorithm, temp, row, bias, i, low, y, table, i, o - i)


def _run(algorithm, x, w, y, first, bias=None, residual=None, relu=False):
    """`y` = the algorithm applied to `x` and `w`; `first` is the input pixel where the first tile begins."""
    o = y.shape[3]
    if not y.size:
        return y
    width = panel_width(y.dtype)
    panels = -(-o // width)
    square = algorithm.planes**2
    u = empty((square * (panels * w.shape[2] * width + LINE),), y.dtype)
    _transform_weights(algorithm, w, u)
    padded = np.zeros(panels * width, y.dtype)
    if bias is not None:
        padded[:o] = bias
    tiles = y.shape[0] * -(-y.shape[1] // algorithm.outputs) * -(-y.shape[2] // algorithm.outputs)
    lane = width // VECTORS
    depth = -(-x.shape[3] // lane) * lane
    workers = threads.count()
    by_panels = tiles < workers * ROWS and panels >= workers
    block = min(BLOCK, -(-tiles // ROWS) * ROWS)
    page = -(-max(x.shape[3], o) // width) * width
    size = 2 * page + square * (block * (depth + width) + 2 * LINE)
    work = scratch((workers, size), y.dtype)
    floor = y.dtype.type(0 if relu else -np.inf)
    plus = y if residual is None else np.ascontiguousarray(residual)
    _forward(algorithm, x, u, y, padded, floor, plus, residual is not None, first, block, by_panels, work)
    return y


# ------------------------------------------------------------------ the gradient of the weights


@njit(parallel=True, cache=True)
def _grad_w(algorithm, x, gy, u, first, block, by_panels, work):
    """Each worker sums over its share of the tiles, into planes of its own, or over all tiles for its panels."""
    workers = work.shape[0]
    rows = (gy.shape[1] + algorithm.outputs - 1) // algorithm.outputs
    columns = (gy.shape[2] + algorithm.outputs - 1) // algorithm.outputs
    tiles = gy.shape[0] * rows * columns
    panels = (gy.shape[3] + panel(gy) - 1) // panel(gy)
    for worker in prange(workers):
        _grad_w_share(
            algorithm, x, gy, u, 0 if by_panels else np.int64(worker) * u.shape[1], first, (rows, columns),
            (0, tiles) if by_panels else part(worker, workers, tiles),
            part(worker, workers, panels) if by_panels else (0, panels), block, work[worker],
        )  # fmt: skip


@njit(cache=True)
def _grad_w_share(algorithm, x, gy, u, at, first, across, share, panels, block, work):
    c, o = x.shape[3], gy.shape[3]
    n, width = lanes(x), panel(x)
    depth = (c + n - 1) // n * n
    square = algorithm.planes * algorithm.planes
    for i in range(max(depth, o + n)):  # a page of zeros
        work[i] = 0
    zeros_x, zeros_gy = distance(x, work), distance(gy, work)
    v = (max(depth, o + n) + n - 1) // n * n
    v_stride = block * depth + LINE
    d = v + square * v_stride
    d_panel = block * width
    d_stride = (panels[1] - panels[0]) * d_panel + LINE
    line = (o + width - 1) // width * width
    u_stride = c * line + LINE
    temp, table, coming = np.empty(TEMP, x.dtype), np.empty(TABLE, np.int64), np.empty(TABLE, np.int64)
    image, out = (x.shape[1], x.shape[2], x.shape[3]), (gy.shape[1], gy.shape[2], gy.shape[3])
    for begin in range(share[0], share[1], block):
        count = min(block, share[1] - begin)
        _pixels_of(coming, begin, across, algorithm.inputs, algorithm.step, first, image, zeros_x)
        for t in range(count):
            table, coming = coming, table
            following = begin + min(t + 1, count - 1)
            _pixels_of(coming, following, across, algorithm.inputs, algorithm.step, first, image, zeros_x)
            for i in range(0, c, n):
                _fetch(algorithm, x, coming, i)
                _input_to_planes(algorithm, x, table, i, c - i, temp, work, v + t * depth + i, v_stride)
        _pixels_of(coming, begin, across, algorithm.outputs, algorithm.outputs, (0, 0), out, zeros_gy)
        for t in range(count):
            table, coming = coming, table
            following = begin + min(t + 1, count - 1)
            _pixels_of(coming, following, across, algorithm.outputs, algorithm.outputs, (0, 0), out, zeros_gy)
            for i in range(panels[0] * width, panels[1] * width, n):
                to = d + (i // width - panels[0]) * d_panel + t * width + i % width
                if i < o:
                    _fetch_grad(algorithm, gy, coming, i)
                _grad_to_planes(algorithm, gy, table, min(i, o), max(0, o - i), temp, work, to, d_stride)
        for p in range(panels[0], panels[1]):
            for plane in range(square):
                for row in range(0, c, ROWS):
                    to = at + plane * u_stride + row * line + p * width
                    offsets = row_offsets(c - row, line)
                    tile = load_tile(u, to, offsets) if begin > share[0] else zero_tile(x)
                    tile = multiply(
                        tile, work, v + plane * v_stride + row, row_offsets(c - row, 1), depth,
                        work, d + plane * d_stride + (p - panels[0]) * d_panel, width, count,
                    )  # fmt: skip
                    store_tile(u, to, offsets, tile)


def _run_grad_w(algorithm, gy, x, w_shape, first):
    gw = empty(w_shape, gy.dtype)
    c, o = w_shape[2:]
    width = panel_width(gy.dtype)
    panels, square = -(-o // width), algorithm.planes**2
    tiles = gy.shape[0] * -(-gy.shape[1] // algorithm.outputs) * -(-gy.shape[2] // algorithm.outputs)
    if not gw.size or not tiles or not x.size:
        gw[...] = 0
        return gw
    workers = min(threads.count(), tiles)
    planes_of_u = square * (c * panels * width + LINE)
    by_panels = workers * planes_of_u * gy.itemsize > L3 and panels >= workers
    lane = width // VECTORS
    depth = -(-c // lane) * lane
    mine = -(-panels // workers) * width if by_panels else panels * width
    block = min(2 * BLOCK if by_panels else BLOCK, -(-tiles // ROWS) * ROWS)
    u = empty((1 if by_panels else workers, planes_of_u), gy.dtype)
    size = max(depth, o + lane) + lane + square * (block * (depth + mine) + 2 * LINE)
    _grad_w(algorithm, x, gy, u, first, block, by_panels, scratch((workers, size), gy.dtype))
    _gather_weights(algorithm, u, gw)
    return gw


# ------------------------------------------------------------------ the variants


def _is_3x3(kernel, stride, padding, dilation, groups, strides=((1, 1),)):
    return tuple(kernel) == (3, 3) and tuple(stride) in strides and tuple(dilation) == (1, 1) and groups == 1


def _forward_variant(algorithm, x, w, padding, stride, epilogue):
    x, w = np.ascontiguousarray(x), np.ascontiguousarray(w)
    y = empty((*output_shape(x.shape, (3, 3), stride, padding, (1, 1)), w.shape[3]), x.dtype)
    return _run(algorithm, x, w, y, (-padding[0], -padding[1]), **epilogue)


def _grad_x_variant(algorithm, gy, w, x_shape, padding):
    """Stride 1: the convolution of gy, padded by 2 - padding, with the weights turned."""
    first = (padding[0] - 2, padding[1] - 2)
    return _run(algorithm, np.ascontiguousarray(gy), swap_channels(w, turn=True), empty(x_shape, gy.dtype), first)


def _grad_x_by_parity(gy, w, x_shape, padding):
    """Stride 2: pixels x[2i + padding - k] meet tap k of gy[i]."""
    odd = padding[0] % 2 == 1
    first = tuple((p - 1) // 2 if odd else p // 2 - 1 for p in padding)
    algorithm = S4X() if odd else S4XEven()
    return _run(algorithm, np.ascontiguousarray(gy), swap_channels(w), empty(x_shape, gy.dtype), first)


def _same_parity(padding):
    return padding[0] % 2 == padding[1] % 2


@conv2d.variant("winograd2", supports=lambda x, w, *g, **e: _is_3x3(w.shape[:2], *g) and plain_floats(x, w, **e), auto=False)
def conv2d_winograd2(x, w, stride, padding, dilation, groups, **epilogue):
    """F(2x2, 3x3): 4 multiplications an output instead of 9, as precise as direct convolution"""
    return _forward_variant(F2(), x, w, padding, stride, epilogue)


@conv2d.variant(
    "winograd4",
    supports=lambda x, w, *g, **e: _is_3x3(w.shape[:2], *g, strides=((1, 1), (2, 2))) and plain_floats(x, w, **e),
)
def conv2d_winograd4(x, w, stride, padding, dilation, groups, **epilogue):
    """F(4x4, 3x3): 2.25 multiplications an output instead of 9; at stride 2, by parity, 5.06"""
    return _forward_variant(F4() if stride[0] == 1 else S4(), x, w, padding, stride, epilogue)


@conv2d_grad_x.variant("winograd2", supports=lambda gy, w, s, *g: _is_3x3(w.shape[:2], *g) and plain_floats(gy, w), auto=False)
def conv2d_grad_x_winograd2(gy, w, x_shape, stride, padding, dilation, groups):
    """F(2x2, 3x3) with the weights turned"""
    return _grad_x_variant(F2(), gy, w, x_shape, padding)


@conv2d_grad_x.variant(
    "winograd4",
    supports=lambda gy, w, shape, s, p, d, g: (
        _is_3x3(w.shape[:2], s, p, d, g, ((1, 1), (2, 2))) and (s[0] == 1 or _same_parity(p)) and plain_floats(gy, w)
    ),
)
def conv2d_grad_x_winograd4(gy, w, x_shape, stride, padding, dilation, groups):
    """F(4x4, 3x3) with the weights turned; at stride 2, even and odd pixels each by their taps"""
    if stride[0] == 2:
        return _grad_x_by_parity(gy, w, x_shape, padding)
    return _grad_x_variant(F4(), gy, w, x_shape, padding)


@conv2d_grad_w.variant("winograd2", supports=lambda gy, x, *g: _is_3x3(g[0][:2], *g[1:]) and plain_floats(gy, x), auto=False)
def conv2d_grad_w_winograd2(gy, x, w_shape, stride, padding, dilation, groups):
    """F(2x2, 3x3) read backwards"""
    gy, x = np.ascontiguousarray(gy), np.ascontiguousarray(x)
    return _run_grad_w(F2(), gy, x, w_shape, (-padding[0], -padding[1]))


@conv2d_grad_w.variant(
    "winograd4",
    supports=lambda gy, x, *g: _is_3x3(g[0][:2], *g[1:], strides=((1, 1), (2, 2))) and plain_floats(gy, x),
)
def conv2d_grad_w_winograd4(gy, x, w_shape, stride, padding, dilation, groups):
    """F(4x4, 3x3) read backwards; at stride 2, by parity"""
    gy, x = np.ascontiguousarray(gy), np.ascontiguousarray(x)
    return _run_grad_w(F4() if stride[0] == 1 else S4(), gy, x, w_shape, (-padding[0], -padding[1]))
