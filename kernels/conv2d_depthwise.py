"""Depthwise convolution: each channel has a kernel of its own (groups = C), so there is no sum over channels.

A GEMM has nothing to do here: with K = 9 and one column, im2col writes nine numbers to use each of them once. What
remains is 9 multiply-adds for a pixel that is read and one that is written, 18 operations for 8 bytes: the speed of
memory is all there is to win. The channels are the vector axis. Eight outputs of a row make a tile in registers; for
each tap, one vector of weights meets eight vectors of pixels, so that loads and multiply-adds keep pace. A few rows of
outputs are made together, a few channels at a time, as many as leave their pixels in the L1 cache: there each pixel is
read for all its taps, after it came from memory once.

Which pixel an output meets at a tap is a question to its row and one to its column, so a plan holds two small tables:
-1 where the pixel is outside (zeros are read instead) or where there is none. With that the gradient of the image is
the same sweep from gy to x, for any stride; columns that meet the same taps share a tile. The gradient of the weights
keeps nine taps of a vector of channels in registers while the rows pass, and reads x and gy once.

With several outputs a channel, each channel is repeated as often: the copy costs as much as writing the result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numba import njit, prange

from . import threads
from .caches import L1
from .conv2d import conv2d, conv2d_grad_w, conv2d_grad_x
from .conv2d_direct import conv2d_direct  # noqa: F401 (the rung before this one on the ladder)
from .dispatch import plain_floats
from .epilogue import finish
from .im2col import output_shape
from .memory import contiguous, empty
from .simd import WIDTH, distance, fma, lanes, load, splat, store, unrolled, zeros
from .tile import clip, part

TILE = 8  # outputs; as many multiply-adds as are under way at once (4 cycles, 2 a cycle)
TAPS = 9  # of the weights' gradient that stay in registers; 3x3, or about a third of 5x5
ROWS = 8  # outputs' rows made together, at most

# ------------------------------------------------------------------ who meets whom


class Plan(NamedTuple):
    """The geometry of a sweep, as tables. -1 stands for no pixel."""

    rows: np.ndarray  # (OH, KH): the row that output row r meets at tap i
    tiles: np.ndarray  # (tiles, TILE): the columns of each tile; the last one is repeated where there are fewer
    columns: np.ndarray  # (tiles, KW, TILE): the column that each of them meets at tap j
    live: np.ndarray  # (tiles, KW): whether any of them meets one
    whole: np.ndarray  # (tiles,): whether all of them do, at live taps


@lru_cache(maxsize=256)
def _meets(outputs, inputs, kernel, stride, padding, dilation, backwards=False):
    """(outputs, kernel): along one axis, the input that an output meets at each tap; -1 for none.

    `backwards` for the gradient of the image, whose outputs are the image's pixels.
    """
    first, tap = np.arange(outputs)[:, None], np.arange(kernel) * dilation
    if backwards:
        reach = first + padding - tap
        index = np.where(reach % stride == 0, reach // stride, -1)
    else:
        index = first * stride - padding + tap
    return np.where((index >= 0) & (index < inputs), index, -1)


@lru_cache(maxsize=256)
def _plan(outputs, inputs, kernel, stride, padding, dilation, backwards):
    """The plan for pairs of sizes."""
    rows, columns = (
        _meets(*axis, backwards) for axis in zip(outputs, inputs, kernel, stride, padding, dilation, strict=True)
    )
    step = stride[1] if backwards else 1
    classes = [range(k, outputs[1], step) for k in range(min(step, outputs[1]))]
    tiles = np.array(
        [[c[min(k, len(c) - 1)] for k in range(i, i + TILE)] for c in classes for i in range(0, len(c), TILE)]
    )
    columns = np.ascontiguousarray(columns[tiles].transpose(0, 2, 1))
    live = (columns >= 0).any(axis=2)
    return Plan(rows, tiles, columns, live, ((columns >= 0).all(axis=2) == live).all(axis=1))


def _block(rows, width, reach, stride, itemsize):
    """(rows of outputs, channels) to make together so that their pixels, `reach` rows a row, stay in L1."""
    line = width * WIDTH  # bytes of a row of one vector of channels
    room = L1 * 3 // 4
    together = max(1, min(ROWS, rows, (room // line - reach) // stride + 1))
    return together, max(1, room // (line * ((together - 1) * stride + reach))) * (WIDTH // itemsize)


# ------------------------------------------------------------------ forward, and the gradient of the image


@njit(parallel=True, cache=True)
def _sweep(plan, x, w, y, bias, floor, residual, has_residual, blank, block, offsets, taps):
    """Every output, by workers over blocks of rows. `w` is (KH, KW, C), `blank` zeros; the rest is room for tables."""
    workers = taps.shape[0]
    blocks = (y.shape[1] + block[0] - 1) // block[0]
    for worker in prange(workers):
        share = part(worker, workers, y.shape[0] * blocks)
        for number in range(share[0], share[1]):
            image, first = number // blocks, number % blocks * block[0]
            rows = (first, min(y.shape[1], first + block[0]))
            _list_taps(plan, x, w, image, rows, distance(x, blank), offsets[worker], taps[worker])
            for c in range(0, x.shape[3], block[1]):
                channels = (c, min(x.shape[3], c + block[1]))
                _sweep_block(
                    plan, x, w, y, bias, floor, residual, has_residual, image, rows, channels, offsets[worker],
                    taps[worker],
                )  # fmt: skip


@njit(cache=True)
def _list_taps(plan, x, w, image, rows, outside, offsets, taps):
    """What each tile of these rows meets: for each tap, where its TILE offsets begin, what to add, which weights.

    Tiles that lie inside the image share their offsets, counted from the image's row: what to add tells the row.
    Others get offsets of their own, with the zeros at `outside`.
    """
    h, width, c = x.shape[1], x.shape[2], x.shape[3]
    kh, kw, tiles = w.shape[0], w.shape[1], plan.tiles.shape[0]
    free = 0
    for t in range(tiles):
        for j in range(kw):
            for k in range(TILE):
                offsets[free + k] = plan.columns[t, j, k] * c
            free += TILE
    at = 0
    for r in range(rows[0], rows[1]):
        for t in range(tiles):
            count = at
            at += 1
            for i in range(kh):
                if plan.rows[r, i] < 0:
                    continue
                base = (image * h + plan.rows[r, i]) * width * c
                for j in range(kw):
                    if not plan.live[t, j]:
                        continue
                    shared = (t * kw + j) * TILE
                    if plan.whole[t]:
                        taps[at], taps[at + 1] = shared, base
                    else:
                        for k in range(TILE):
                            offset = offsets[shared + k]
                            offsets[free + k] = base + offset if offset >= 0 else outside
                        taps[at], taps[at + 1] = free, 0
                        free += TILE
                    taps[at + 2] = (i * kw + j) * c
                    at += 3
            taps[count] = at


@njit(cache=True)
def _sweep_block(plan, x, w, y, bias, floor, residual, has_residual, image, rows, channels, offsets, taps):
    n, low, at, c = lanes(x), splat(floor, y), 0, y.shape[3]
    for r in range(rows[0], rows[1]):
        base = (image * y.shape[1] + r) * y.shape[2] * c
        for t in range(plan.tiles.shape[0]):
            begin, at = at + 1, taps[at]
            for first in range(channels[0], channels[1], n):
                tile = _start(y)
                if first + n <= c:
                    for tap in range(begin, at, 3):
                        tile = _add_tap(tile, x, offsets, taps[tap], taps[tap + 1] + first, w, taps[tap + 2] + first)
                    if has_residual:
                        tile = _add(tile, residual, plan.tiles, t * TILE, c, base + first)
                    _finish(tile, bias, first, low, y, plan.tiles, t * TILE, c, base + first)
                else:
                    rest = c - first
                    for tap in range(begin, at, 3):
                        tile = _add_tap(
                            tile, x, offsets, taps[tap], taps[tap + 1] + first, w, taps[tap + 2] + first, rest
                        )
                    if has_residual:
                        tile = _add(tile, residual, plan.tiles, t * TILE, c, base + first, rest)
                    _finish(tile, bias, first, low, y, plan.tiles, t * TILE, c, base + first, rest)


@unrolled
def _start(like):
    return [zeros(like)] * TILE


@unrolled
def _add_tap(tile, x, offsets, k, base, w, weight, count=None):
    """tile + one vector of weights times the pixels at `offsets` from number k on, all `base` further."""
    weights = load(w, weight, count)
    return [fma(load(x, offsets[k + i] + base, count), weights, v) for i, v in enumerate(tile)]


@unrolled
def _add(tile, residual, columns, t, c, base, count=None):
    return [v + load(residual, columns[t + i] * c + base, count) for i, v in enumerate(tile)]


@unrolled
def _finish(tile, bias, first, low, y, columns, t, c, base, count=None):
    """Plus bias, at least `low`, to the tile's columns of `y`."""
    add = load(bias, first, count)
    for i, v in enumerate(tile):
        store(y, columns[t + i] * c + base, clip(v + add, low), count)


def _run(plan, x, w, y, stride, bias=None, residual=None, relu=False):
    """`stride` is that of the rows of x from one row of y to the next: the least that is not less."""
    if not y.size:
        return y
    c, (kh, kw) = x.shape[3], w.shape[:2]
    block = _block(y.shape[1], x.shape[2], kh, stride, y.itemsize)
    workers = min(threads.count(), y.shape[0] * -(-y.shape[1] // block[0]))
    size = block[0] * len(plan.tiles) * kh * kw
    offsets = np.empty((workers, (size + len(plan.tiles) * kw + 1) * TILE), np.int64)
    taps = np.empty((workers, 3 * size + block[0] * len(plan.tiles) + TILE), np.int64)
    blank, floor = np.zeros(c, y.dtype), y.dtype.type(0 if relu else -np.inf)
    plus = y if residual is None else contiguous(residual)
    bias = blank if bias is None else contiguous(bias)
    _sweep(plan, x, w, y, bias, floor, plus, residual is not None, blank, block, offsets, taps)
    return y


# ------------------------------------------------------------------ the gradient of the weights


@njit(parallel=True, cache=True)
def _gather(rows, columns, inside, step, x, gy, u, blank, block, tables):
    """Each worker sums its share of the rows of gy into u (workers, taps rounded up, C), which begins as zeros.

    rows (OH, KH) and columns (OW, KW) say who meets whom; columns `inside` of gy meet pixels at all taps, `step` apart.
    """
    workers = u.shape[0]
    blocks = (gy.shape[1] + block[0] - 1) // block[0]
    for worker in prange(workers):
        share = part(worker, workers, gy.shape[0] * blocks)
        for number in range(share[0], share[1]):
            image, first = number // blocks, number % blocks * block[0]
            several = (first, min(gy.shape[1], first + block[0]))
            for tap in range(0, u.shape[1], TAPS):
                _list_pixels(rows, columns, inside, x, image, several, tap, distance(x, blank), tables[worker])
                for c in range(0, x.shape[3], block[1]):
                    channels = (c, min(x.shape[3], c + block[1]))
                    _gather_block(inside, step, x, gy, u[worker], image, several, channels, tap, tables[worker])


@njit(cache=True)
def _list_pixels(rows, columns, inside, x, image, several, first, outside, table):
    """Offsets of what gy meets at TAPS taps from number `first` on.

    For each row: TAPS offsets for all columns inside, as of column 0, then TAPS for each other column. A row at the
    border, where whole rows of taps are outside, has none inside.
    """
    h, width, c, kw = x.shape[1], x.shape[2], x.shape[3], columns.shape[1]
    last = rows.shape[1] * kw - 1
    at = 0
    for r in range(several[0], several[1]):
        at += 1
        table[at - 1] = inside[0] if rows[r].min() >= 0 else columns.shape[0]
        for q in range(columns.shape[0]):
            if table[at - 1] == inside[0] and inside[0] < q < inside[1]:
                continue
            for k in range(first, first + TAPS):
                i, j = min(k, last) // kw, min(k, last) % kw  # beyond the last tap: anything, nobody reads that sum
                meets = rows[r, i] >= 0 and columns[q, j] >= 0
                table[at] = ((image * h + rows[r, i]) * width + columns[q, j]) * c if meets else outside
                at += 1


@njit(cache=True)
def _gather_block(inside, step, x, gy, u, image, several, channels, tap, table):
    n, c, across = lanes(x), gy.shape[3], gy.shape[2]
    for first in range(channels[0], channels[1], n):
        sums, at = _start_sums(gy), 0
        for r in range(several[0], several[1]):
            base, begin = (image * gy.shape[1] + r) * across * c + first, table[at]
            at += 1
            for q in range(across):
                shift = first
                if begin < q < inside[1]:  # as the column before, a step further
                    at -= TAPS
                    shift += (q - begin) * step
                if first + n <= c:
                    sums = _add_position(sums, x, table, at, shift, gy, base + q * c)
                else:
                    sums = _add_position(sums, x, table, at, shift, gy, base + q * c, c - first)
                at += TAPS
        if first + n <= c:
            _keep(sums, u, tap * c + first, c)
        else:
            _keep(sums, u, tap * c + first, c, c - first)


@unrolled
def _start_sums(like):
    return [zeros(like)] * TAPS


@unrolled
def _add_position(sums, x, table, at, shift, gy, position, count=None):
    """sums + gy at one position times the pixel that each tap meets there."""
    grad = load(gy, position, count)
    return [fma(load(x, table[at + k] + shift, count), grad, v) for k, v in enumerate(sums)]


@unrolled
def _keep(sums, u, at, c, count=None):
    """Add the sums of a few rows to those of the rows before: short sums of short sums keep their precision."""
    for k, v in enumerate(sums):
        store(u, at + k * c, load(u, at + k * c, count) + v, count)


# ------------------------------------------------------------------ the variants


def _each_output(x, outputs):
    """x with each channel repeated so that there is one for each output."""
    return contiguous(x) if x.shape[3] == outputs else np.repeat(x, outputs // x.shape[3], axis=3)


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
    return _run(plan, _each_output(x, w.shape[3]), contiguous(w[:, :, 0]), y, stride[0], **epilogue)


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
    single = o == groups
    _run(plan, contiguous(gy), contiguous(w[:, :, 0]), gx, 1, residual=residual if single else None)
    return gx if single else finish(gx.reshape(*x_shape, o // groups).sum(axis=-1), residual=residual)


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
    row_of, column_of = (
        _meets(*axis) for axis in zip(gy.shape[1:3], x.shape[1:3], (kh, kw), stride, padding, dilation, strict=True)
    )
    all_taps = np.flatnonzero((column_of >= 0).all(axis=1))
    inside = (int(all_taps[0]), int(all_taps[-1]) + 1) if len(all_taps) else (0, 0)
    block = _block(gy.shape[1], x.shape[2], kh, stride[0], gy.itemsize)
    workers = min(threads.count(), gy.shape[0] * -(-gy.shape[1] // block[0]))
    u = np.zeros((workers, -(-kh * kw // TAPS) * TAPS, o), gy.dtype)
    tables, blank = np.empty((workers, block[0] * (gy.shape[2] * TAPS + 1)), np.int64), np.zeros(o, gy.dtype)
    x = _each_output(x, o)
    _gather(row_of, column_of, inside, stride[1] * o, x, contiguous(gy), u, blank, block, tables)
    return u.sum(axis=0)[: kh * kw].reshape(w_shape)
