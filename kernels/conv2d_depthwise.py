"""Depthwise convolution: each channel has a kernel of its own (groups = C), so there is no sum over channels.

A GEMM has nothing to do here: with K = 9 and one column, im2col writes nine numbers to use each of them once. What
remains is 9 multiply-adds for a pixel that is read and one that is written, 18 operations for 8 bytes: the speed of
memory is all there is to win. The channels are the vector axis. Eight outputs of a row make a tile in registers; for
each tap, one vector of weights meets eight vectors of pixels, so the loads and the multiply-adds keep pace and the rows
of the image come from memory once, then from cache for the other taps. (Zhang et al. 2020, "High performance depthwise
and pointwise convolutions on mobile devices", discuss the same choice on ARM.)

Which pixel an output meets at a tap is a question to its row and one to its column, so a plan holds two small tables:
-1 where the pixel is outside (zeros are read instead) or where there is none. With that the gradient of the image is
the same sweep from gy to x, for any stride; columns that meet the same taps share a tile. The gradient of the weights
keeps nine taps of a vector of channels in registers while a row passes, and reads x and gy once.

With several outputs a channel, each channel is repeated as often: the copy costs as much as writing the result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from . import threads
from .conv2d import conv2d, conv2d_grad_w, conv2d_grad_x
from .conv2d_direct import conv2d_direct  # noqa: F401 (the rung before this one on the ladder)
from .dispatch import plain_floats
from .epilogue import finish
from .im2col import output_shape
from .memory import empty
from .simd import distance, fma, lanes, load, splat, store, unrolled, zeros
from .tile import clip, part

TILE = 8  # outputs; as many multiply-adds as are under way at once (4 cycles, 2 a cycle)
TAPS = 9  # of the weights' gradient that stay in registers; 3x3, or about a third of 5x5

# ------------------------------------------------------------------ who meets whom


class Plan(NamedTuple):
    """The geometry of a call, as tables. -1 stands for no pixel."""

    rows: np.ndarray  # (OH, KH): the row that output row r meets at tap i
    tiles: np.ndarray  # (tiles, TILE): the columns of each tile; the last one is repeated where there are fewer
    columns: np.ndarray  # (tiles, KW, TILE): the column that each of them meets at tap j
    live: np.ndarray  # (tiles, KW): the taps at which any of them meets one, first; then -1


@lru_cache(maxsize=256)
def _meets(outputs, inputs, kernel, stride, padding, dilation, backwards):
    """(outputs, kernel): along one axis, the input that an output meets at each tap; -1 for none."""
    first, tap = np.arange(outputs)[:, None], np.arange(kernel) * dilation
    if backwards:
        reach = first + padding - tap
        index = np.where(reach % stride == 0, reach // stride, -1)
    else:
        index = first * stride - padding + tap
    return np.where((index >= 0) & (index < inputs), index, -1)


@lru_cache(maxsize=256)
def _plan(outputs, inputs, kernel, stride, padding, dilation, backwards):
    """The plan for pairs of sizes; `backwards` for the gradient of the image, whose outputs are the image's pixels."""
    rows, columns = (
        _meets(*axis, backwards) for axis in zip(outputs, inputs, kernel, stride, padding, dilation, strict=True)
    )
    classes = [range(k, outputs[1], stride[1] if backwards else 1) for k in range(stride[1] if backwards else 1)]
    tiles = np.array(
        [[c[min(k, len(c) - 1)] for k in range(i, i + TILE)] for c in classes for i in range(0, len(c), TILE)]
    )
    columns = np.ascontiguousarray(columns[tiles].transpose(0, 2, 1))
    live = np.full((len(tiles), kernel[1]), -1)
    for row, of_tile in zip(live, columns, strict=True):
        taps = np.flatnonzero((of_tile >= 0).any(axis=1))
        row[: len(taps)] = taps
    return Plan(rows, tiles, columns, live)


# ------------------------------------------------------------------ forward, and the gradient of the image


@njit(parallel=True, cache=True)
def _sweep(plan, x, w, y, bias, floor, residual, has_residual, blank, tables):
    """Every output by workers over rows of `y`. `w` is (KH, KW, C), `blank` a page of zeros."""
    workers = tables.shape[0]
    for worker in prange(workers):
        share = part(worker, workers, y.shape[0] * y.shape[1])
        _sweep_share(plan, x, w, y, bias, floor, residual, has_residual, blank, share, tables[worker])


@njit(cache=True)
def _sweep_share(plan, x, w, y, bias, floor, residual, has_residual, blank, share, table):
    h, width, c = x.shape[1], x.shape[2], x.shape[3]
    n, kh, kw = lanes(x), w.shape[0], w.shape[1]
    outside, low = distance(x, blank), splat(floor, y)
    weights, to = table[kh * kw * TILE :], table[kh * kw * (TILE + 1) :]
    for row in range(share[0], share[1]):
        image, r = row // y.shape[1], row % y.shape[1]
        for t in range(plan.tiles.shape[0]):
            taps = 0
            for i in range(kh):
                if plan.rows[r, i] < 0:
                    continue
                base = (image * h + plan.rows[r, i]) * width * c
                for j in plan.live[t]:
                    if j < 0:
                        break
                    _place(table[taps * TILE :], plan.columns[t, j], base, c, outside)
                    weights[taps] = (i * kw + j) * c
                    taps += 1
            _place(to, plan.tiles[t], row * y.shape[2] * c, c, 0)
            for at in range(0, c - n + 1, n):
                tile = _start(y)
                for k in range(taps):
                    tile = _add_tap(tile, x, table, k * TILE, at, w, weights[k] + at)
                if has_residual:
                    tile = _add(tile, residual, to, at)
                _finish(tile, bias, low, y, to, at)
            at = c // n * n
            if at < c:
                tile = _start(y)
                for k in range(taps):
                    tile = _add_tap(tile, x, table, k * TILE, at, w, weights[k] + at, c - at)
                if has_residual:
                    tile = _add(tile, residual, to, at, c - at)
                _finish(tile, bias, low, y, to, at, c - at)


@njit(cache=True)
def _place(table, columns, base, c, outside):
    """Offsets of a tile's pixels: base + column c, or `outside`."""
    for k in range(TILE):
        table[k] = base + columns[k] * c if columns[k] >= 0 else outside


@unrolled
def _start(like):
    return [zeros(like)] * TILE


@unrolled
def _add_tap(tile, x, table, k, at, w, weight, count=None):
    """tile + one vector of weights times the pixels at `table` + at."""
    weights = load(w, weight, count)
    return [fma(load(x, table[k + i] + at, count), weights, v) for i, v in enumerate(tile)]


@unrolled
def _add(tile, residual, to, at, count=None):
    return [v + load(residual, to[i] + at, count) for i, v in enumerate(tile)]


@unrolled
def _finish(tile, bias, low, y, to, at, count=None):
    """Plus bias, at least `low`, to memory."""
    add = load(bias, at, count)
    for i, v in enumerate(tile):
        store(y, to[i] + at, clip(v + add, low), count)


def _run(plan, x, w, y, bias=None, residual=None, relu=False):
    if not y.size:
        return y
    c, taps = x.shape[3], w.shape[0] * w.shape[1]
    workers = min(threads.count(), y.shape[0] * y.shape[1])
    tables = np.empty((workers, taps * (TILE + 1) + 2 * TILE), np.int64)
    blank, floor = np.zeros(c, y.dtype), y.dtype.type(0 if relu else -np.inf)
    plus = y if residual is None else np.ascontiguousarray(residual)
    bias = blank if bias is None else np.ascontiguousarray(bias)
    _sweep(plan, x, w, y, bias, floor, plus, residual is not None, blank, tables)
    return y


# ------------------------------------------------------------------ the gradient of the weights


@njit(parallel=True, cache=True)
def _gather(rows, columns, x, gy, u, blank, tables):
    """Each worker sums its share of the rows of gy into u (workers, taps rounded up, C), which begins as zeros."""
    workers = u.shape[0]
    for worker in prange(workers):
        share = part(worker, workers, gy.shape[0] * gy.shape[1])
        _gather_share(rows, columns, x, gy, u[worker], blank, share, tables[worker])


@njit(cache=True)
def _gather_share(rows, columns, x, gy, u, blank, share, table):
    h, width, c = x.shape[1], x.shape[2], x.shape[3]
    n, kh, kw, across = lanes(x), rows.shape[1], columns.shape[0], gy.shape[2]
    outside = distance(x, blank)
    for row in range(share[0], share[1]):
        image, r = row // gy.shape[1], row % gy.shape[1]
        for first in range(0, u.shape[0], TAPS):
            for k in range(TAPS):
                i = min((first + k) // kw, kh - 1)  # beyond the last tap: anything, nobody reads that sum
                _place_row(
                    table[k * across :], columns[(first + k) % kw], (image * h + rows[r, i]) * width * c, c,
                    outside, rows[r, i] >= 0,
                )  # fmt: skip
            for at in range(0, c - n + 1, n):
                sums = _start_sums(gy)
                for q in range(across):
                    sums = _add_position(sums, x, table, q, across, at, gy, (row * across + q) * c + at)
                _keep(sums, u, first * c + at, c)
            at = c // n * n
            if at < c:
                sums = _start_sums(gy)
                for q in range(across):
                    sums = _add_position(sums, x, table, q, across, at, gy, (row * across + q) * c + at, c - at)
                _keep(sums, u, first * c + at, c, c - at)


@njit(cache=True)
def _place_row(table, columns, base, c, outside, inside):
    """Offsets of what one tap meets along a row of gy."""
    for q in range(columns.size):
        table[q] = base + columns[q] * c if inside and columns[q] >= 0 else outside


@unrolled
def _start_sums(like):
    return [zeros(like)] * TAPS


@unrolled
def _add_position(sums, x, table, q, across, at, gy, position, count=None):
    """sums + gy at one position times the pixel that each tap meets there."""
    grad = load(gy, position, count)
    return [fma(load(x, table[q + k * across] + at, count), grad, v) for k, v in enumerate(sums)]


@unrolled
def _keep(sums, u, at, c, count=None):
    """Add the sums of a row to those of the rows before: short sums of short sums keep their precision."""
    for k, v in enumerate(sums):
        store(u, at + k * c, load(u, at + k * c, count) + v, count)


# ------------------------------------------------------------------ the variants


def _each_output(x, outputs):
    """x with each channel repeated so that there is one for each output."""
    return np.ascontiguousarray(x if x.shape[3] == outputs else np.repeat(x, outputs // x.shape[3], axis=3))


def _depthwise(array, other, channels, groups, **epilogue):
    return groups == channels > 0 and plain_floats(array, other, **epilogue)


@conv2d.variant(
    "depthwise",
    supports=lambda x, w, s, p, d, groups, **e: _depthwise(x, w, x.shape[3], groups, **e),
    auto=lambda x, w, s, p, d, groups, **e: groups > 1,
)
def conv2d_depthwise(x, w, stride, padding, dilation, groups, **epilogue):
    """a kernel of its own for each channel: eight outputs of a row in registers, at the speed of memory"""
    n, oh, ow = output_shape(x.shape, w.shape[:2], stride, padding, dilation)
    y = empty((n, oh, ow, w.shape[3]), x.dtype)
    plan = _plan((oh, ow), x.shape[1:3], w.shape[:2], tuple(stride), tuple(padding), tuple(dilation), False)
    return _run(plan, _each_output(x, w.shape[3]), _without_depth(w), y, **epilogue)


@conv2d_grad_x.variant(
    "depthwise",
    supports=lambda gy, w, x_shape, s, p, d, groups, **e: _depthwise(gy, w, x_shape[3], groups, **e),
    auto=lambda gy, w, x_shape, s, p, d, groups, **e: groups > 1,
)
def conv2d_grad_x_depthwise(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """the same sweep from gy to x: each pixel gathers what it gave"""
    o = w.shape[3]
    gx = empty((*x_shape[:3], o), gy.dtype)
    geometry = tuple(stride), tuple(padding), tuple(dilation)
    plan = _plan(tuple(x_shape[1:3]), gy.shape[1:3], w.shape[:2], *geometry, True)
    _run(plan, np.ascontiguousarray(gy), _without_depth(w), gx)
    return finish(gx if o == groups else gx.reshape(*x_shape, o // groups).sum(axis=-1), residual=residual)


@conv2d_grad_w.variant(
    "depthwise",
    supports=lambda gy, x, w_shape, s, p, d, groups: _depthwise(gy, x, x.shape[3], groups),
    auto=lambda gy, x, w_shape, s, p, d, groups: groups > 1,
)
def conv2d_grad_w_depthwise(gy, x, w_shape, stride, padding, dilation, groups):
    """nine taps of a vector of channels in registers while a row of x and of gy passes"""
    kh, kw, _, o = w_shape
    rows = gy.shape[0] * gy.shape[1]
    if not rows or not o:
        return np.zeros(w_shape, gy.dtype)
    (oh, ow), size = gy.shape[1:3], x.shape[1:3]
    row_of, column_of = (
        _meets(*axis, False) for axis in zip((oh, ow), size, (kh, kw), stride, padding, dilation, strict=True)
    )
    workers = min(threads.count(), rows)
    u = np.zeros((workers, -(-kh * kw // TAPS) * TAPS, o), gy.dtype)
    tables, blank = np.empty((workers, TAPS * ow), np.int64), np.zeros(o, gy.dtype)
    x, columns = _each_output(x, o), np.ascontiguousarray(column_of.T)
    _gather(row_of, columns, x, np.ascontiguousarray(gy), u, blank, tables)
    return u.sum(axis=0)[: kh * kw].reshape(w_shape)


def _without_depth(w):
    """(KH, KW, 1, O) -> (KH, KW, O)."""
    return np.ascontiguousarray(w[:, :, 0])
