"""Convolution of images of few channels, as in the first layer: a row of the kernel is one run of memory.

A pixel of three channels is no vector, and eight addresses for three numbers each cost more than the arithmetic. But in
a row of an image the pixels lie side by side: a row of a 3x3 kernel meets nine numbers in a row, and the output beside
it the nine that begin `stride` pixels further. So the register tile takes eight outputs side by side (ROWS of them),
and each row of the kernel is one short product with a fixed distance between the tile's rows; no table, no columns.

What stands in the way is the border. A band of the image, a few rows, is copied into L1 with its padding around it:
3 numbers are copied for the 64 outputs that are computed from them. The gradient of the weights reads the same band;
its tile is eight numbers of the kernel.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from . import threads
from .caches import L1
from .constant import derived
from .conv2d import add_up, conv2d, conv2d_grad_w
from .dispatch import aside, plain_floats
from .epilogue import finish, padded_bias
from .im2col import output_shape
from .memory import clear, contiguous, empty, into, scratch
from .pack import panels_of
from .parallel_for import parallel_for
from .simd import lanes, load, minimum, prefetch, splat, store, unrolled
from .tile import (
    ROWS,
    finish_tile,
    load_tile,
    multiply,
    panel,
    panel_width,
    part,
    rank_one,
    row_offsets,
    store_tile,
    store_tile_edge,
    zero_tile,
)

FEW = 8  # channels; a vector holds 16


# ------------------------------------------------------------------ the band


def _bands(x_shape, kernel, stride, padding, out_rows, itemsize):
    """(rows of output in a band, room for its padded rows of input: whole cache lines, no two workers share one)."""
    line = (x_shape[2] + 2 * padding[1]) * x_shape[3]
    room = max(1, L1 // 2 // max(1, line * itemsize))  # rows of input: half of L1 is for weights and outputs
    rows = min(out_rows, max(1, (room - kernel[0]) // stride[0] + 1))
    return rows, -(-((rows - 1) * stride[0] + kernel[0]) * line // 16) * 16


@njit(cache=True)
def _copy_band(x, image, top, rows, padding, band):
    """`rows` rows of an image from `top` on, which may lie outside, with the padding around them."""
    _, h, w, c = x.shape
    n, flat = lanes(x), x.reshape(x.size)
    left, line = padding[1] * c, (w + 2 * padding[1]) * c
    for i in range(rows):
        row, at = top + i, i * line
        if row < 0 or row >= h:
            band[at : at + line] = 0
            continue
        for k in range(left):
            band[at + k] = 0
        for k in range(0, w * c, n):  # by vectors: number by number, copying takes most of the time of multiplying
            source = (image * h + row) * w * c + k
            if k + n <= w * c:
                store(band, at + left + k, load(flat, source))
            else:
                store(band, at + left + k, load(flat, source, w * c - k), w * c - k)
        for k in range(left + w * c, line):
            band[at + k] = 0


# ------------------------------------------------------------------ forward


@njit(cache=True)
def _forward(x, w, kernel, stride, padding, y, bias, floor, rows, work):
    parallel_for(len(work), _forward_share, (x, w, kernel, stride, padding, y, bias, floor, rows, work))


@njit(cache=True)
def _forward_share(worker, x, w, kernel, stride, padding, y, bias, floor, rows, work):
    bands = (y.shape[1] + rows - 1) // rows
    first, last = part(worker, len(work), y.shape[0] * bands)
    for number in range(first, last):
        place = number // bands, number % bands * rows
        _forward_band(x, w, kernel, stride, padding, y, bias, floor, place, rows, work[worker])


@njit(cache=True)
def _forward_band(x, w, kernel, stride, padding, y, bias, floor, place, rows, band):
    """`rows` rows of y from `place`, (image, row), on, or as many as there are."""
    (image, top), c, (_, oh, ow, o) = place, x.shape[3], y.shape
    width, low = panel(y), splat(floor, y)
    run, line, step = kernel[1] * c, (x.shape[2] + 2 * padding[1]) * c, stride[1] * c
    rows = min(rows, oh - top)
    _copy_band(x, image, top * stride[0] - padding[0], (rows - 1) * stride[0] + kernel[0], padding, band)
    for row in range(rows):
        for column in range(0, ow, ROWS):
            here, there = row_offsets(ow - column, step), row_offsets(ow - column, o)
            at = ((image * oh + top + row) * ow + column) * o
            for p in range(0, o, width):
                tile = zero_tile(y)
                for i in range(kernel[0]):
                    begin = (row * stride[0] + i) * line + column * step
                    tile = multiply(tile, band, begin, here, 1, w, (p * kernel[0] + i * width) * run, width, run)
                tile = finish_tile(tile, bias, p, low)
                if p + width <= o:
                    store_tile(y, at + p, there, tile)
                else:
                    store_tile_edge(y, at + p, there, o - p, tile)


def _few_channels(x, w_shape, stride, padding, dilation, groups):
    return w_shape[2] <= FEW and tuple(dilation) == (1, 1) and groups == 1


def _pays(columns):
    """The fixed rule of "fastest": outputs side by side fill at least half of the tile's rows."""
    return columns >= ROWS // 2


def _forward_pays(x, w, stride, padding, dilation, groups, **epilogue):
    return w.shape[3] > 1 and _pays(output_shape(x.shape, w.shape[:2], stride, padding, dilation)[2])


@conv2d.variant(
    "few_channels",
    supports=lambda x, w, *g, **e: _few_channels(x, w.shape, *g) and plain_floats(x, w, **e),
    auto=_forward_pays,
)
def conv2d_few_channels(x, w, stride, padding, dilation, groups, *, bias=None, residual=None, relu=False):
    """up to 8 channels: a row of the kernel is one run of memory, in a band of the image with its border"""
    kernel, o = w.shape[:2], w.shape[3]
    y = empty((*output_shape(x.shape, kernel, stride, padding, dilation), o), x.dtype)
    if not y.size:
        return y
    after = residual is not None  # then bias and ReLU come after, too
    padded = padded_bias(None if after else bias, -(-o // panel_width(y.dtype)) * panel_width(y.dtype), y.dtype)
    panels = derived(w, "panels", lambda: panels_of(contiguous(w).reshape(1, -1, o)))
    rows, size = _bands(x.shape, kernel, stride, padding, y.shape[1], y.itemsize)
    workers = max(1, min(threads.count(), y.shape[0] * -(-y.shape[1] // rows)))
    floor = y.dtype.type(0 if relu and not after else -np.inf)
    work = scratch((workers, size), y.dtype)
    _forward(
        contiguous(x), panels.reshape(panels.size), kernel, tuple(stride), tuple(padding), y, padded, floor, rows, work
    )
    return finish(y, bias, residual, relu) if after else y


# ------------------------------------------------------------------ the gradient of the weights


@unrolled
def _kernel_offsets(table, k, depth):
    """Where ROWS numbers of the kernel from number `k` on lie in the band; beyond the end, the last."""
    return [table[minimum(k + r, depth - 1)] for r in range(ROWS)]


@njit(cache=True)
def _grad_w(x, gy, u, kernel, stride, padding, rows, table, work):
    """Each worker sums its share of the bands into (depth, O rounded up) of its own."""
    parallel_for(len(work), _grad_w_share, (x, gy, u, kernel, stride, padding, rows, table, work))


@njit(cache=True)
def _grad_w_share(worker, x, gy, u, kernel, stride, padding, rows, table, work):
    bands = (gy.shape[1] + rows - 1) // rows
    first, last = part(worker, len(work), gy.shape[0] * bands)
    u[worker] = 0
    for number in range(first, last):
        place = number // bands, number % bands * rows
        _grad_w_band(x, gy, u[worker], kernel, stride, padding, place, rows, table, work[worker])


@njit(cache=True)
def _grad_w_band(x, gy, u, kernel, stride, padding, place, rows, table, band):
    """What `rows` rows of gy from `place`, (image, row), on add to u."""
    (image, top), c, (_, oh, ow, o) = place, x.shape[3], gy.shape
    width = panel(gy)
    line, step, depth = (x.shape[2] + 2 * padding[1]) * c, stride[1] * c, u.shape[0]
    rows = min(rows, oh - top)
    _copy_band(x, image, top * stride[0] - padding[0], (rows - 1) * stride[0] + kernel[0], padding, band)
    flat = gy.reshape(gy.size)
    tiles = u.shape[1] // width * ((depth + ROWS - 1) // ROWS)
    soon, share = (image * oh + top + rows) * ow * o, (o + tiles - 1) // tiles  # tiles ask for the next band, in shares
    for p in range(0, u.shape[1], width):
        for k in range(0, depth, ROWS):
            taps, to = _kernel_offsets(table, k, depth), row_offsets(depth - k, u.shape[1])
            at = k * u.shape[1] + p
            tile = load_tile(u, at, to)
            for row in range(rows):
                here, there = row * stride[0] * line, ((image * oh + top + row) * ow) * o + p
                for column in range(ow):
                    tile = rank_one(tile, band, here + column * step, taps, flat, there + column * o)
                    prefetch(flat, soon)
                    soon += share
            store_tile(u, at, to, tile)


@conv2d_grad_w.variant(
    "few_channels",
    supports=lambda gy, x, shape, *g, **out: _few_channels(x, shape, *g) and plain_floats(gy, x, **out),
    auto=lambda gy, x, shape, *g, **out: _pays(gy.shape[2]),
)
def conv2d_grad_w_few_channels(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """up to 8 channels: the tile is eight numbers of the kernel (ROWS), and gy passes once for each eight"""
    gw = into(out, w_shape, gy.dtype)
    if not gy.size or not gw.size:
        clear(gw)
        return gw
    kernel, c, o = w_shape[:2], w_shape[2], w_shape[3]
    rest = -o % panel_width(gy.dtype)
    gy = contiguous(gy)
    if rest:  # it is read in whole panels
        gy = aside(np.pad, gy, ((0, 0), (0, 0), (0, 0), (0, rest)))
    rows, size = _bands(x.shape, kernel, stride, padding, gy.shape[1], gy.itemsize)
    line = (x.shape[2] + 2 * padding[1]) * c
    table = (np.arange(kernel[0])[:, None] * line + np.arange(kernel[1] * c)).reshape(-1)
    workers = max(1, min(threads.count(), gy.shape[0] * -(-gy.shape[1] // rows)))
    u = empty((workers, len(table), o + rest), gy.dtype)
    work = scratch((workers, size), gy.dtype)
    _grad_w(contiguous(x), gy, u, tuple(kernel), tuple(stride), tuple(padding), rows, table, work)
    add_up(u, gw)
    return gw
