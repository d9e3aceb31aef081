"""Winograd's convolution read backwards: the gradient of 3x3 weights; see winograd.py for the algorithms.

The planes of x times the planes of gy are summed over all tiles, and G^T takes the sum back to 3x3. As in
conv2d_winograd.py each worker takes blocks of tiles through all steps, into sums of its own, which are added up at the
end; or, where those would fill the cache, all tiles for a part of the output channels (`by_panels`).
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import threads
from .caches import L3
from .conv2d import conv2d_grad_w
from .conv2d_winograd import (
    BLOCK,
    ENOUGH,
    GAP,
    MOST_TILES,
    ONE,
    input_planes,
    input_share,
    is_3x3,
    pays,
    pixels_of,
    room,
)
from .dispatch import plain_floats
from .memory import clear, contiguous, empty, into
from .parallel_for import parallel_for
from .simd import distance, lanes
from .tile import (
    ROWS,
    VECTORS,
    load_tile,
    multiply,
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
    add_vectors,
    fetch_grad,
    gather_column,
    gathered_column,
    gathered_row,
    grad_to_planes,
)

MOST_SUMS = 1 << 30  # bytes of the workers' own sums of weights' gradients, on a machine of many cores


@njit(cache=True)
def _gather_weights(algorithm, u, gw):
    """The sum over workers of the planes u (workers, planes (C, O rounded up)), through G^T, to (3, 3, C, O)."""
    panels = (gw.shape[3] + panel(gw) - 1) // panel(gw)
    parallel_for(gw.shape[2], _gather_channel, (algorithm, u, gw, (0, panels)))


@njit(cache=True)
def _gather_channel(i, algorithm, u, gw, panels):
    _gather_weights_of(algorithm, u, gw, (i, i + 1), panels)


@njit(cache=True)
def _gather_weights_of(algorithm, u, gw, channels, panels):
    """Those of some input channels and of some panels; `u` begins with the first of these panels."""
    c, o = gw.shape[2], gw.shape[3]
    n, temp, begin = lanes(gw), np.empty(TEMP, gw.dtype), panels[0] * panel(gw)
    line = (panels[1] - panels[0]) * panel(gw)
    stride = c * line + GAP
    for i in range(channels[0], channels[1]):
        for first in range(begin, min(o, begin + line), n):
            at = i * line + first - begin
            for column in range(algorithm.planes):
                vectors = gather_column(algorithm, u, at, stride, column)
                for worker in range(1, u.shape[0]):
                    more = gather_column(algorithm, u, worker * u.shape[1] + at, stride, column)
                    vectors = add_vectors(vectors, more)
                gathered_column(algorithm, vectors, column, temp)
            for row in range(3):
                if first + n <= o:
                    gathered_row(algorithm, temp, row, gw, i * o + first, c * o)
                else:
                    gathered_row(algorithm, temp, row, gw, i * o + first, c * o, o - first)


@njit(cache=True)
def _grad_w(algorithm, x, gy, u, gw, first, block, by_panels, own, v, work):
    """Each worker sums over its share of the tiles, into planes of its own, or over all tiles for its panels.

    `u` holds the planes of all weights, for each worker or for all, or, with `own`, those of a panel for each worker,
    which are gathered into `gw` at once.
    """
    rows = (gy.shape[1] + algorithm.outputs - 1) // algorithm.outputs
    columns = (gy.shape[2] + algorithm.outputs - 1) // algorithm.outputs
    across, tiles = (rows, columns), gy.shape[0] * rows * columns
    for begin in range(0, tiles, block if by_panels else tiles):
        share = begin, min(tiles, begin + block) if by_panels else tiles
        if by_panels:
            parallel_for(len(work), input_share, (algorithm, x, first, across, share, v, work))
        parallel_for(
            len(work), _grad_w_share,
            (algorithm, x, gy, u, gw, first, across, share, block, by_panels, own, v, work),
        )  # fmt: skip


@njit(cache=True)
def _grad_w_share(worker, algorithm, x, gy, all_u, gw, first, across, share, block, by_panels, own, all_v, all_work):
    """With `by_panels`, `share` is the tiles whose planes are in `v`, and those before them are summed already."""
    workers, v, work = len(all_work), all_v[worker % len(all_v)], all_work[worker]
    planes_of_u, panels = all_u[worker % len(all_u) :][:1], (0, (gy.shape[3] + panel(gy) - 1) // panel(gy))
    done = share[0]
    if by_panels:
        panels = part(worker, workers, panels[1])
    else:
        share = part(worker, workers, share[1])
    work[: max(x.shape[3], gy.shape[3]) + lanes(x)] = 0
    c, o = x.shape[3], gy.shape[3]
    n, width = lanes(x), panel(x)
    depth = (c + n - 1) // n * n
    square = algorithm.planes * algorithm.planes
    zeros_x, zeros_gy = distance(x, work), distance(gy, work)
    v_stride, d_panel = v.shape[1], block * width
    d = (max(c, o) + width - 1) // width * width + width  # behind a page of zeros
    d_stride = (panels[1] - panels[0]) * d_panel + GAP
    line, u = width if own else (o + width - 1) // width * width, planes_of_u[0]
    u_stride = c * line + GAP
    temp, table, coming = np.empty(TEMP, x.dtype), np.empty(TABLE, np.int64), np.empty(TABLE, np.int64)
    out = (gy.shape[1], gy.shape[2], gy.shape[3])
    for begin in range(share[0], share[1], block):
        count = min(block, share[1] - begin)
        if not by_panels:
            input_planes(algorithm, x, first, across, (begin, begin + count), v, np.int64(0), zeros_x)
        pixels_of(coming, begin, across, algorithm.outputs, algorithm.outputs, (0, 0), out, zeros_gy)
        for t in range(count):
            table, coming = coming, table
            following = begin + min(t + 1, count - 1)
            pixels_of(coming, following, across, algorithm.outputs, algorithm.outputs, (0, 0), out, zeros_gy)
            for i in range(panels[0] * width, panels[1] * width, n):
                to = d + (i // width - panels[0]) * d_panel + t * width + i % width
                if i < o:
                    fetch_grad(algorithm, gy, coming, i)
                grad_to_planes(algorithm, gy, table, min(i, o), max(0, o - i), temp, work, to, d_stride)
        for p in range(panels[0], panels[1]):
            for plane in range(square):
                for row in range(0, c, ROWS):
                    to = plane * u_stride + row * line + (0 if own else p * width)
                    offsets = row_offsets(c - row, line)  # rows beyond c multiply what lies there, and are overwritten
                    tile = load_tile(u, to, offsets) if done > 0 else zero_tile(x)
                    tile = multiply(
                        tile, v, plane * v_stride + row, row_offsets(ROWS, 1), depth,
                        work, d + plane * d_stride + (p - panels[0]) * d_panel, width, count,
                    )  # fmt: skip
                    store_tile(u, to, offsets, tile)
            if own:
                _gather_weights_of(algorithm, planes_of_u, gw, (np.int64(0), c), (p, p + 1))
        done += count


def run_grad_w(algorithm, gy, x, w_shape, padding, out):
    """The gradient of 3x3 weights, into `out` or new memory: the algorithm applied to `gy` and `x`."""
    gy, x, first = contiguous(gy), contiguous(x), (-padding[0], -padding[1])
    gw = into(out, w_shape, gy.dtype)
    c, o = w_shape[2:]
    width = panel_width(gy.dtype)
    panels, square = -(-o // width), algorithm.planes**2
    tiles = gy.shape[0] * -(-gy.shape[1] // algorithm.outputs) * -(-gy.shape[2] // algorithm.outputs)
    if not gw.size or not tiles or not x.size:
        clear(gw)
        return gw
    workers = min(threads.count(), tiles)
    planes_of_u = square * (c * panels * width + GAP)
    # As in conv2d_winograd.run: few tiles, many weights. Else workers sum for themselves, unless that fills the cache.
    own = panels >= workers and tiles <= min(MOST_TILES, o)
    by_panels = own or (workers * planes_of_u * gy.itemsize > L3 // 2 and panels >= workers)
    if not by_panels:
        workers = max(1, min(workers, MOST_SUMS // (planes_of_u * gy.itemsize)))
    lane = width // VECTORS
    depth = -(-c // lane) * lane
    mine = -(-panels // workers) * width if by_panels else panels * width
    block = -(-min(tiles, MOST_TILES if by_panels else BLOCK) // ROWS) * ROWS
    if own:
        u = empty((workers, square * (c * width + GAP)), gy.dtype)
    else:
        u = empty((1 if by_panels else workers, planes_of_u), gy.dtype)
    page = -(-max(c, o) // width) * width + width
    v, work = room(
        (1 if by_panels else workers, square, block * depth + GAP),
        (workers, page + square * (block * mine + GAP)),
        gy.dtype,
    )
    _grad_w(algorithm, x, gy, u, gw, first, block, by_panels, own, v, work)
    if not own:
        _gather_weights(algorithm, u, gw)
    return gw


def _able(gy, x, w_shape, *geometry, **out):
    return is_3x3(ONE, w_shape[:2], *geometry) and plain_floats(gy, x, **out)


def _grad_w_pays(gy, x, *rest, **out):
    return pays(ENOUGH, gy.shape[0], gy.shape[1:3], x.shape[3])


@conv2d_grad_w.variant("winograd2", supports=_able, auto=False)
def conv2d_grad_w_winograd2(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """F(2x2, 3x3) read backwards"""
    return run_grad_w(F2(), gy, x, w_shape, padding, out)


@conv2d_grad_w.variant("winograd4", supports=_able, auto=_grad_w_pays)
def conv2d_grad_w_winograd4(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """F(4x4, 3x3) read backwards"""
    return run_grad_w(F4(), gy, x, w_shape, padding, out)
