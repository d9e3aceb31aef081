"""Winograd's convolution, driven, forward and to the gradient of the image; see winograd.py for the algorithms.

Each worker takes a block of tiles through all steps, transform, GEMMs, transform back, while its planes stay in cache;
or, where there are few tiles and many weights, all tiles and a part of the output channels (`by_panels`). Memory
traffic is the image once in and once out, and the transformed weights once a block; arithmetic falls by the algorithm's
factor. The gradient of the image is the same code, on the weights turned by 180 degrees.

conv2d_winograd_grad_w.py has the gradient of the weights, conv2d_parity.py the rung for stride 2.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import threads
from .constant import derived, is_constant
from .conv2d import conv2d, conv2d_grad_x
from .conv2d_few_channels import FEW
from .dispatch import plain_floats
from .epilogue import padded_bias
from .im2col import output_shape
from .memory import LINE, contiguous, empty, past_caches, scratch
from .pack import swap_channels
from .parallel_for import parallel_for
from .simd import distance, lanes, splat
from .tile import (
    ROWS,
    STEPS,
    VECTORS,
    multiply,
    multiply_and_ask,
    panel,
    panel_width,
    part,
    row_offsets,
    store_tile,
    zero_tile,
)
from .winograd import (
    F2,
    F4,
    TABLE,
    TEMP,
    fetch,
    input_to_planes,
    output_column,
    output_row,
    output_row_plus,
    weights_column,
    weights_row,
)

# ------------------------------------------------------------------ where a tile lies


@njit(cache=True)
def pixels_of(table, tile, across, size, step, first, shape, outside):
    """Offsets of the `size` x `size` pixels of tile (row, column), `step` apart from (first, first); `outside` beyond.

    `shape` is (H, W, C) of an image; tiles are numbered through rows, then images, `across` = (rows, columns) of one.
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
MOST_TILES = 256  # whose planes all workers keep while each goes through its panels of weights
GAP = 16  # a cache line between planes: strides of a power of two would share a few cache sets


# ------------------------------------------------------------------ weights


@njit(cache=True)
def _transform_weights(algorithm, w, u):
    """(3, 3, C, O) -> planes of panels of (C, PANEL), flat, with a line between planes."""
    panels = (w.shape[3] + panel(w) - 1) // panel(w)
    parallel_for(w.shape[2], _transform_channel, (algorithm, w, (0, panels), u))


@njit(cache=True)
def _transform_channel(i, algorithm, w, panels, u):
    _transform_weights_of(algorithm, w, (i, i + 1), panels, u)


@njit(cache=True)
def _transform_weights_of(algorithm, w, channels, panels, u):
    """Those of some input channels and of some panels; `u` begins with the first of these panels."""
    c, o = w.shape[2], w.shape[3]
    width, n, temp = panel(w), lanes(w), np.empty(TEMP, w.dtype)
    stride = (panels[1] - panels[0]) * c * width + GAP
    for i in range(channels[0], channels[1]):
        for first in range(panels[0] * width, panels[1] * width, n):
            for column in range(3):
                if first + n <= o:
                    weights_column(algorithm, w, i * o + first, c * o, column, temp)
                else:
                    weights_column(algorithm, w, i * o + min(first, o), c * o, column, temp, max(0, o - first))
            at = ((first // width - panels[0]) * c + i) * width + first % width
            for row in range(algorithm.planes):
                weights_row(algorithm, temp, row, u, at, stride)


def _planes_of(algorithm, w):
    """All weights transformed: (1, planes of panels of (C, PANEL))."""
    width = panel_width(w.dtype)
    u = empty((1, algorithm.planes**2 * (-(-w.shape[3] // width) * w.shape[2] * width + GAP)), w.dtype)
    _transform_weights(algorithm, contiguous(w), u[0])
    return u


# ------------------------------------------------------------------ forward, and the gradient of the image


@njit(cache=True)
def input_planes(algorithm, x, first, across, tiles, v, place, zeros):
    """Tiles tiles[0] to tiles[1] of x, transformed, into the planes v, as their tile number `place` and those after it.

    `zeros` is where x has zeros, for pixels outside of an image.
    """
    c, n, stride = x.shape[3], lanes(x), v.shape[1]
    depth = (c + n - 1) // n * n  # channels of the planes, whole vectors
    temp, table, coming = np.empty(TEMP, x.dtype), np.empty(TABLE, np.int64), np.empty(TABLE, np.int64)
    image = (x.shape[1], x.shape[2], x.shape[3])
    pixels_of(coming, tiles[0], across, algorithm.inputs, algorithm.advance, first, image, zeros)
    for t in range(tiles[1] - tiles[0]):
        table, coming = coming, table
        following = min(tiles[0] + t + 1, tiles[1] - 1)
        pixels_of(coming, following, across, algorithm.inputs, algorithm.advance, first, image, zeros)
        for i in range(0, c, n):
            fetch(algorithm, x, coming, i)
            input_to_planes(algorithm, x, table, i, c - i, temp, v, (place + t) * depth + i, stride)


@njit(cache=True)
def input_share(worker, algorithm, x, first, across, tiles, v, work):
    """A worker's part of these tiles into v[0]."""
    zeros = work[worker]
    zeros[: x.shape[3] + lanes(x)] = 0
    begin, end = part(worker, len(work), tiles[1] - tiles[0])
    input_planes(algorithm, x, first, across, (tiles[0] + begin, tiles[0] + end), v[0], begin, distance(x, zeros))


@njit(cache=True)
def _forward(algorithm, x, w, u, y, bias, floor, residual, has_residual, first, block, by_panels, own, past, v, work):
    """Each worker takes its share of the tiles through all steps; or of the panels, once all tiles are transformed.

    `u` holds the planes of all weights, or, with `own`, room for each worker to transform those of a panel.
    `v` has room for the planes of a block of tiles, for each worker or for all. With `past`, y is written past the
    caches.
    """
    rows = (y.shape[1] + algorithm.outputs - 1) // algorithm.outputs
    columns = (y.shape[2] + algorithm.outputs - 1) // algorithm.outputs
    across, tiles = (rows, columns), (0, y.shape[0] * rows * columns)
    if by_panels:
        parallel_for(len(work), input_share, (algorithm, x, first, across, tiles, v, work))
    parallel_for(
        len(work), _forward_share,
        (algorithm, x, w, u, y, bias, floor, residual, has_residual, first, across, tiles, block, by_panels, own, past,
         v, work),
    )  # fmt: skip


@njit(cache=True)
def _forward_share(
    worker, algorithm, x, w, all_u, y, bias, floor, residual, has_residual, first, across, share, block, by_panels, own,
    past, all_v, all_work,
):  # fmt: skip
    workers, u, v, work = len(all_work), all_u[worker % len(all_u)], all_v[worker % len(all_v)], all_work[worker]
    work[: max(x.shape[3], y.shape[3]) + lanes(x)] = 0
    panels = 0, (y.shape[3] + panel(y) - 1) // panel(y)
    if by_panels:
        panels = part(worker, workers, panels[1])
    else:
        share = part(worker, workers, share[1])
    c, o = x.shape[3], y.shape[3]
    n, width = lanes(x), panel(x)
    depth = (c + n - 1) // n * n
    square = algorithm.planes * algorithm.planes
    # work: zeros for pixels outside, a page that takes what is written outside, the planes of the output
    page = (max(c, o) + width - 1) // width * width
    zeros, sink, blank = distance(x, work), distance(y, work) + page, distance(residual, work)
    m, v_stride, m_stride = 2 * page, v.shape[1], block * width + GAP
    u_panel = c * width
    u_stride = (1 if own else (o + width - 1) // width) * u_panel + GAP
    temp, table, others = np.empty(TEMP, x.dtype), np.empty(TABLE, np.int64), np.empty(TABLE, np.int64)
    low = splat(floor, x)
    out = (y.shape[1], y.shape[2], y.shape[3])
    for begin in range(share[0], share[1], block):
        count = min(block, share[1] - begin)
        few = count <= 2 * ROWS and not own  # then each plane of a panel is read once or twice, and the next asked for
        halves = (count + ROWS - 1) // ROWS
        lines = STEPS * VECTORS // halves
        if not by_panels:
            input_planes(algorithm, x, first, across, (begin, begin + count), v, np.int64(0), zeros)
        for p in range(panels[0], panels[1]):
            if own:
                _transform_weights_of(algorithm, w, (np.int64(0), c), (p, p + 1), u)
            for plane in range(square):
                at = plane * u_stride + (0 if own else p * u_panel)
                for t in range(0, count, ROWS):
                    a, offsets = plane * v_stride + t * depth, row_offsets(count - t, depth)
                    if few:
                        soon = at + u_stride + t // ROWS * c // halves * width
                        tile = multiply_and_ask(zero_tile(x), v, a, offsets, 1, u, at, c, soon, lines)
                    else:
                        tile = multiply(zero_tile(x), v, a, offsets, 1, u, at, width, c)
                    store_tile(work, m + plane * m_stride + t * width, row_offsets(count - t, width), tile)
            for t in range(count):
                pixels_of(table, begin + t, across, algorithm.outputs, algorithm.outputs, (0, 0), out, sink)
                if has_residual:
                    pixels_of(others, begin + t, across, algorithm.outputs, algorithm.outputs, (0, 0), out, blank)
                for i in range(p * width, min(o, p * width + width), n):
                    at = m + t * width + i - p * width
                    for column in range(algorithm.planes):
                        output_column(algorithm, work, at, m_stride, column, temp)
                    for row in range(algorithm.outputs):
                        if has_residual and past:
                            output_row_plus(
                                algorithm, temp, row, bias, i, low, residual, others, y, table, i, None, True
                            )
                        elif has_residual:
                            output_row_plus(
                                algorithm, temp, row, bias, i, low, residual, others, y, table, i, min(n, o - i)
                            )
                        elif past:
                            output_row(algorithm, temp, row, bias, i, low, y, table, i, None, True)
                        elif i + n <= o:
                            output_row(algorithm, temp, row, bias, i, low, y, table, i)
                        else:
                            output_row(algorithm, temp, row, bias, i, low, y, table, i, o - i)


def run(algorithm, x, w, y, first, bias=None, residual=None, relu=False):
    """`y` = the algorithm applied to `x` and `w`; `first` is the input pixel where the first tile begins."""
    o = y.shape[3]
    if not y.size:
        return y
    width = panel_width(y.dtype)
    panels = -(-o // width)
    square = algorithm.planes**2
    padded = padded_bias(bias, panels * width, y.dtype)
    tiles = y.shape[0] * -(-y.shape[1] // algorithm.outputs) * -(-y.shape[2] // algorithm.outputs)
    lane = width // VECTORS
    depth = -(-x.shape[3] // lane) * lane
    workers = threads.count()
    # Few tiles and many weights: the workers transform all tiles together, and each the weights of its own panels, one
    # panel at a time, which stays in its cache. Else all weights are transformed once, and each takes its own tiles.
    own = panels >= workers and tiles <= min(MOST_TILES, o) and not is_constant(w)
    by_panels = own or (panels >= workers and tiles < workers * ROWS)
    block = -(-(tiles if by_panels else min(tiles, BLOCK)) // ROWS) * ROWS
    if own:
        u = empty((workers, square * (w.shape[2] * width + GAP)), y.dtype)
    else:
        u = derived(w, type(algorithm), lambda: _planes_of(algorithm, w))
    w = contiguous(w)
    page = -(-max(x.shape[3], o) // width) * width
    v, work = room(
        (1 if by_panels else workers, square, block * depth + GAP),
        (workers, 2 * page + square * (block * width + GAP)),
        y.dtype,
    )
    floor = y.dtype.type(0 if relu else -np.inf)
    plus = y if residual is None else contiguous(residual)
    past = past_caches(y) and o % lane == 0 and lane * y.itemsize == LINE  # no half lines
    _forward(
        algorithm, x, w, u, y, padded, floor, plus, residual is not None, first, block, by_panels, own, past, v, work
    )
    return y


def room(of_v, of_work, dtype):
    """Scratch memory for the planes v and for the workers."""
    size = math.prod(of_v)
    memory = scratch((size + math.prod(of_work),), dtype)
    return memory[:size].reshape(of_v), memory[size:].reshape(of_work)


# ------------------------------------------------------------------ the variants


def is_3x3(steps, kernel, stride, padding, dilation, groups):
    """Whether the geometry is that of a 3x3 kernel at stride `steps`, undilated, in one group."""
    return tuple(kernel) == (3, 3) and tuple(stride) == steps and tuple(dilation) == (1, 1) and groups == 1


def pays(enough, images, size, channels):
    """The fixed rule of "fastest": `enough` tiles of 4x4 outputs; `size` is (OH, OW). Few channels fill no vector.

    Weights that are not constant are transformed at every call. With few tiles that, and reading 36 or 81 planes of
    them instead of 9, costs more than the multiplications saved.
    """
    return channels > FEW and images * -(-size[0] // 4) * -(-size[1] // 4) >= enough


def forward(algorithm, x, w, stride, padding, epilogue):
    """A variant of conv2d: the algorithm for 3x3 kernels at `stride`."""
    y = empty((*output_shape(x.shape, (3, 3), stride, padding, (1, 1)), w.shape[3]), x.dtype)
    return run(algorithm, contiguous(x), w, y, (-padding[0], -padding[1]), **epilogue)


def _grad_x(algorithm, gy, w, x_shape, padding, residual):
    """The convolution of gy, padded by 2 - padding, with the weights turned."""
    turned, first = swap_channels(w, turn=True), (padding[0] - 2, padding[1] - 2)
    return run(algorithm, contiguous(gy), turned, empty(x_shape, gy.dtype), first, residual=residual)


ONE = (1, 1)  # stride
ENOUGH = 8  # tiles; measured with one image


def _able(x, w, *geometry, **epilogue):
    return is_3x3(ONE, w.shape[:2], *geometry) and plain_floats(x, w, **epilogue)


def _able_grad_x(gy, w, x_shape, *geometry, **residual):
    return is_3x3(ONE, w.shape[:2], *geometry) and plain_floats(gy, w, **residual)


def _forward_pays(x, w, stride, padding, dilation, groups, **epilogue):
    images, *size = output_shape(x.shape, w.shape[:2], stride, padding, dilation)
    return pays(ENOUGH, images, size, w.shape[2])


def _grad_x_pays(gy, w, *rest, **residual):
    return pays(ENOUGH, gy.shape[0], gy.shape[1:3], gy.shape[3])


@conv2d.variant("winograd2", supports=_able, auto=False)
def conv2d_winograd2(x, w, stride, padding, dilation, groups, **epilogue):
    """F(2x2, 3x3): 4 multiplications an output instead of 9, as precise as direct convolution"""
    return forward(F2(), x, w, stride, padding, epilogue)


@conv2d.variant("winograd4", supports=_able, auto=_forward_pays)
def conv2d_winograd4(x, w, stride, padding, dilation, groups, **epilogue):
    """F(4x4, 3x3): 2.25 multiplications an output instead of 9"""
    return forward(F4(), x, w, stride, padding, epilogue)


@conv2d_grad_x.variant("winograd2", supports=_able_grad_x, auto=False)
def conv2d_grad_x_winograd2(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """F(2x2, 3x3) with the weights turned"""
    return _grad_x(F2(), gy, w, x_shape, padding, residual)


@conv2d_grad_x.variant("winograd4", supports=_able_grad_x, auto=_grad_x_pays)
def conv2d_grad_x_winograd4(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """F(4x4, 3x3) with the weights turned"""
    return _grad_x(F4(), gy, w, x_shape, padding, residual)
