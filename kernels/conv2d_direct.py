"""Direct convolution with our own micro-kernel: any kernel, stride, padding, dilation and groups, in all directions.

A row of the im2col matrix is a handful of pixels, each contiguous in memory. The register tile (tile.py) takes its
eight rows from eight addresses, so the columns need not be written at all: for each tap of the kernel the tile reads
eight pixels where they lie, in cache. Pixels outside the image are read from a page of zeros. The arithmetic is that of
im2col; the memory traffic is the image once, the result once, and the weights, packed into panels, once for each block
of rows. (An implicit GEMM, as cuDNN calls it: Chetlur et al. 2014, section 3.1.) With a few positions only, as for one
image, the weights are what there is to read: then all tiles use a tap's part of a panel, and meanwhile ask for the
next. Where pixels have few channels, as in the first layer, eight addresses for three numbers each do not pay, and a
block of columns is written after all.

The gradient of the image is the same loop from gy to x. With stride s, the pixels of one residue class modulo s meet
the same taps: s x s convolutions of stride 1, none of which multiplies by a zero. The gradient of the weights
accumulates tiles of weights, eight channels by a panel, over blocks of pixels, for each worker in memory of its own.
"""

from __future__ import annotations

import operator

import numpy as np
from numba import njit

from . import threads
from .caches import L2
from .constant import derived, is_constant
from .conv2d import conv2d, conv2d_grad_w, conv2d_grad_x, is_pointwise
from .dispatch import aside
from .epilogue import finish, padded_bias
from .im2col import output_shape
from .memory import clear, contiguous, empty, into, scratch
from .pack import panels_of, swap_channels
from .parallel_for import parallel_for
from .simd import distance, lanes, load, minimum, splat, store, unrolled
from .tile import (
    ROWS,
    STEPS,
    VECTORS,
    add_tiles,
    finish_tile,
    load_tile,
    load_tile_edge,
    multiply,
    multiply_and_ask,
    panel,
    panel_width,
    part,
    rank_one,
    row_offsets,
    store_tile,
    store_tile_edge,
    zero_tile,
)

FEW_CHANNELS = 16  # below it, columns are written: 16 floats of a pixel are a cache line
BLOCK = 128  # positions whose pixels and gradients stay in L1 and L2 while all tiles of weights pass
FEW_ROWS = 4 * ROWS  # below it, weights are read where they lie: packing them costs as much as using them;
# and below it for each worker, the weights are what there is to read: workers share panels of them, not positions


@unrolled
def _offsets(table, row, count, tap, taps):
    """Offsets of the tile's rows in `table` (rows, taps); rows beyond `count` repeat the last."""
    return [table[minimum(row + r, count - 1) * taps + tap] for r in range(ROWS)]


# ------------------------------------------------------------------ where pixels lie


@njit(cache=True)
def _pixels_of(table, first, count, across, taps, step, at, shape, outside):
    """Offsets of what `count` positions from number `first` on meet at each tap; `outside` the image, that.

    Positions are numbered through images, rows and columns, `across` = (rows, columns) of them an image; position
    (i, j) meets pixel (i step + at) + tap for each row and column of `taps`. `shape` is (H, W, C).
    """
    rows, columns = across
    h, w, c = shape
    image, row, column = first // (rows * columns), first // columns % rows, first % columns
    k = 0
    for _ in range(count):
        top, left = row * step[0] + at[0], column * step[1] + at[1]
        column += 1
        if column == columns:
            row, column = row + 1, 0
        for i in taps[0]:
            for j in taps[1]:
                inside = 0 <= top + i < h and 0 <= left + j < w
                table[k] = ((image * h + top + i) * w + left + j) * c if inside else outside
                k += 1
        if row == rows:
            image, row = image + 1, 0


@njit(cache=True)
def _gather(x, table, runs, taps, first, c, columns, at):
    """Columns after all: c channels from `first` on of each pixel, one behind the other, into `columns` from `at` on.

    The table holds `runs` times `taps` pixels, a run being a row of the kernel; its pixels are often neighbours in
    memory, and then one copy takes them all. A copy may write a vector too far: the next one overwrites it.
    """
    n = lanes(x)
    for run in range(runs):
        k, to = run * taps, at + run * taps * c
        whole = table[k + taps - 1] - table[k] == (taps - 1) * c
        size = taps * c if whole else c
        for tap in range(1 if whole else taps):
            for i in range(0, size, n):
                store(columns, to + tap * c + i, load(x, table[k + tap] + first + i, size - i))


# ------------------------------------------------------------------ forward, and the gradient of the image


@njit(cache=True)
def _convolve(
    x, w, groups, depth, packed, y, bias, floor, residual, has_residual, taps, step, y_first, y_step, by_panels,
    taps_first, block, work, tables,
):  # fmt: skip
    """y[y_first + y_step (i, j)] = epilogue(sum over taps of x[step (i, j) + tap] w[tap]).

    Workers share the positions, or the panels. `w` is flat: (groups, depth, O) as it lies, or its panels.
    """
    rows = (y.shape[1] - y_first[0] + y_step[0] - 1) // y_step[0]
    columns = (y.shape[2] - y_first[1] + y_step[1] - 1) // y_step[1]
    parallel_for(
        len(work), _convolve_share,
        (x, w, groups, depth, packed, y, bias, floor, residual, has_residual, taps, step, y_first, y_step,
         (rows, columns), by_panels, taps_first, block, work, tables),
    )  # fmt: skip


@njit(cache=True)
def _convolve_share(
    worker, x, w, groups, depth, packed, y, bias, floor, residual, has_residual, taps, step, y_first, y_step, across,
    by_panels, taps_first, block, works, tables,
):  # fmt: skip
    workers, work, table = len(works), works[worker], tables[worker]
    number = taps[0].size * taps[1].size
    channels, o = depth // max(1, number), y.shape[3] // groups
    width, low = panel(y), splat(floor, y)
    panels = (o + width - 1) // width
    share, of_worker = (0, y.shape[0] * across[0] * across[1]), (0, panels)
    if by_panels:
        of_worker = part(worker, workers, panels)
    else:
        share = part(worker, workers, share[1])
    image, out = (x.shape[1], x.shape[2], x.shape[3]), (y.shape[1], y.shape[2], y.shape[3])
    zero_tap = np.zeros(1, np.int64)
    source = x.reshape(x.size)
    for i in range(x.shape[3]):
        work[i] = 0
    zeros, columns = distance(source, work), x.shape[3]
    to = table[block * number :]
    few = channels < FEW_CHANNELS and number > 1
    for first in range(share[0], share[1], block):
        count = min(block, share[1] - first)
        _pixels_of(to, first, count, across, (zero_tap, zero_tap), y_step, y_first, out, 0)
        for group in range(groups):
            _pixels_of(table, first, count, across, taps, step, (0, 0), image, zeros)
            a, begin, each, c = source, group * channels, number, channels
            if few:
                _gather(source, table, count * taps[0].size, taps[1].size, begin, channels, work, columns)
                for r in range(count):
                    table[r] = columns + r * depth
                a, begin, each, c = work, 0, 1, depth
            if taps_first:
                _taps_first(
                    a, begin, w, y, bias, low, residual, has_residual, table, to, count, each, c,
                    (group * panels, group * o), of_worker,
                )  # fmt: skip
                continue
            for p in range(of_worker[0], of_worker[1]):
                wide = width if packed else o
                b = (group * panels + p) * depth * width if packed else p * width
                y_at, many = group * o + p * width, min(width, o - p * width)
                for r in range(0, count, ROWS):
                    tile = zero_tile(y)
                    for tap in range(each):
                        offsets = _offsets(table, r, count, tap, each)
                        tile = multiply(tile, a, begin, offsets, 1, w, b + tap * c * wide, wide, c)
                    offsets = _offsets(to, r, count, 0, 1)
                    if many == width:
                        if has_residual:
                            tile = add_tiles(tile, load_tile(residual, y_at, offsets))
                        store_tile(y, y_at, offsets, finish_tile(tile, bias, y_at, low))
                    else:
                        if has_residual:
                            tile = add_tiles(tile, load_tile_edge(residual, y_at, offsets, many))
                        store_tile_edge(y, y_at, offsets, many, finish_tile(tile, bias, y_at, low))


@njit(cache=True)
def _taps_first(
    a, begin, w, y, bias, low, residual, has_residual, table, to, count, each, c, first, of_worker
):  # fmt: skip
    """The panels from memory, once: all tiles use a tap's part of one, and ask for the next part while they do."""
    width, tiles = panel(y), (count + ROWS - 1) // ROWS
    lines = (STEPS * VECTORS + tiles - 1) // tiles
    for p in range(of_worker[0], of_worker[1]):
        y_at = first[1] + p * width
        for tap in range(each):
            b = ((first[0] + p) * each + tap) * c * width
            for r in range(0, count, ROWS):
                rows = _offsets(to, r, count, 0, 1)
                tile = load_tile(y, y_at, rows) if tap > 0 else zero_tile(y)
                soon = b + (c + r // ROWS * c // tiles) * width
                tile = multiply_and_ask(tile, a, begin, _offsets(table, r, count, tap, each), 1, w, b, c, soon, lines)
                if tap == each - 1:
                    if has_residual:
                        tile = add_tiles(tile, load_tile(residual, y_at, rows))
                    tile = finish_tile(tile, bias, y_at, low)
                store_tile(y, y_at, rows, tile)


def _run(x, w, y, taps, step, y_first, y_step, bias=None, residual=None, relu=False):
    """One launch; `w` is (groups, taps * C, O) and `taps` a pair of arrays of row and column offsets."""
    width = panel_width(y.dtype)
    number, o = len(taps[0]) * len(taps[1]), w.shape[2]
    rows = y.shape[0] * -(-(y.shape[1] - y_first[0]) // y_step[0]) * -(-(y.shape[2] - y_first[1]) // y_step[1])
    if rows <= 0 or not y.size:
        return
    groups, depth = w.shape[:2]
    packed = rows > FEW_ROWS or o % width != 0 or groups > 1 or is_constant(w)
    if packed:
        w = derived(w, "panels", lambda: panels_of(w))
    padded = padded_bias(bias, y.shape[3] + width, y.dtype)
    by_panels = rows < threads.count() * FEW_ROWS and -(-o // width) >= 2 * threads.count()
    workers = threads.count() if by_panels else max(1, min(threads.count(), rows // ROWS))
    reach = max(1, number * x.shape[3]) * y.itemsize  # what a position reads, at most
    mine = rows if by_panels else -(-rows // workers)
    block = max(2 * ROWS, min(512, L2 // 4 // reach // ROWS * ROWS, -(-mine // ROWS) * ROWS))
    few = x.shape[3] // groups < FEW_CHANNELS
    size = x.shape[3] + width + block * number * FEW_CHANNELS * few
    taps_first = number > 0 and by_panels and packed and not few and block >= rows and o % width == 0
    work = scratch((workers, size), y.dtype)
    tables = np.empty((workers, block * (number + 1) + 1), np.int64)
    floor = y.dtype.type(0 if relu else -np.inf)
    plus = y if residual is None else contiguous(residual)
    _convolve(
        x, w.reshape(w.size), groups, depth, packed, y, padded, floor, plus, residual is not None, taps, step, y_first,
        y_step, by_panels, taps_first, block, work, tables,
    )  # fmt: skip


def _by_groups(w, groups):
    """(KH, KW, C/groups, O) -> (groups, KH KW C/groups, O/groups); the same memory for one group."""
    depth, o = w.shape[0] * w.shape[1] * w.shape[2], w.shape[3]
    w = contiguous(w).reshape(depth, groups, o // groups)
    return contiguous(w.transpose(1, 0, 2))


def _pays(w_shape, stride, padding, groups):
    """The fixed rule of "fastest": plain GEMMs and depthwise convolutions have rungs of their own."""
    depthwise = groups > 1 and w_shape[2] == 1
    return not depthwise and not is_pointwise(w_shape[:2], stride, padding, groups)


@conv2d.variant("direct", auto=lambda x, w, s, p, d, g, **e: _pays(w.shape, s, p, g))
def conv2d_direct(x, w, stride, padding, dilation, groups, **epilogue):
    """our own micro-kernel reads each tap's pixels where they lie: no columns"""
    y = empty((*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3]), x.dtype)
    taps = tuple(np.arange(k) * d - p for k, d, p in zip(w.shape[:2], dilation, padding, strict=True))
    by_groups = derived(w, ("by groups", groups), lambda: _by_groups(w, groups))
    _run(contiguous(x), by_groups, y, taps, tuple(stride), (0, 0), (1, 1), **epilogue)
    return y


@conv2d_grad_x.variant("direct", auto=lambda gy, w, shape, s, p, d, g, **e: _pays(w.shape, s, p, g))
def conv2d_grad_x_direct(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """the same loop from gy to x, one residue class of pixels modulo the stride at a time"""
    gx, gy = empty(x_shape, gy.dtype), contiguous(gy)
    if not gx.size or not gy.size:
        clear(gx)
        return finish(gx, residual=residual)
    parts = [swap_channels(part) for part in np.split(w, groups, axis=3)]  # (KH, KW, O/groups, C/groups)
    for a in range(min(stride[0], x_shape[1])):
        for b in range(min(stride[1], x_shape[2])):
            # pixel i stride + a meets tap k of gy[i + (a + padding - k dilation) / stride] where that is whole
            which, taps = zip(
                *(
                    _taps_of_class(r, *axis)
                    for r, axis in zip((a, b), zip(stride, padding, dilation, w.shape[:2], strict=True), strict=True)
                ),
                strict=True,
            )
            part = [aside(operator.getitem, p, np.ix_(*which)).reshape(-1, p.shape[3]) for p in parts]
            _run(
                gy,
                aside(np.stack, part) if groups > 1 else part[0][None],
                gx,
                taps,
                (1, 1),
                (a, b),
                tuple(stride),
                residual=residual,
            )
    return gx


def _taps_of_class(r, stride, padding, dilation, kernel):
    """Along one axis: which taps the pixels r modulo stride meet, and where in gy."""
    reach = r + padding - np.arange(kernel) * dilation
    which = np.flatnonzero(reach % stride == 0)
    return which, reach[which] // stride


# ------------------------------------------------------------------ the gradient of the weights


@njit(cache=True)
def _gather_grad(x, gy, u, taps, step, block, work, tables):
    """Each worker sums its share of the positions into (groups, taps C, O rounded up) of its own."""
    parallel_for(len(work), _grad_w_share, (x, gy, u, taps, step, block, work, tables))


@njit(cache=True)
def _grad_w_share(worker, x, gy, all_u, taps, step, block, works, tables):
    u, work, table = all_u[worker], works[worker], tables[worker]
    share = part(worker, len(works), gy.shape[0] * gy.shape[1] * gy.shape[2])
    groups, depth, line = u.shape
    number = taps[0].size * taps[1].size
    channels, o = depth // number, gy.shape[3] // groups
    width, n = panel(gy), lanes(gy)
    panels = line // width
    image, across = (x.shape[1], x.shape[2], x.shape[3]), (gy.shape[1], gy.shape[2])
    source, gy = x.reshape(x.size), gy.reshape(gy.size)
    for i in range(x.shape[3]):
        work[i] = 0
    zeros, d = distance(source, work), (x.shape[3] + n - 1) // n * n
    columns = d + block * width
    few = channels < FEW_CHANNELS and number > 1
    for first in range(share[0], share[1], block):
        count = min(block, share[1] - first)
        for group in range(groups):
            _pixels_of(table, first, count, across, taps, step, (0, 0), image, zeros)
            a, begin, each, c = source, group * channels, number, channels
            if few:
                _gather(source, table, count * taps[0].size, taps[1].size, begin, channels, work, columns)
                for r in range(count):
                    table[r] = columns + r * depth
                a, begin, each, c = work, 0, 1, depth
            for p in range(panels):
                for r in range(count):  # the block of gy as a panel: its rows are far apart
                    at = (first + r) * groups * o + group * o + p * width
                    for i in range(0, width, n):
                        store(work, d + r * width + i, load(gy, at + min(i, o - p * width), max(0, o - p * width - i)))
                for tap in range(each):
                    for row in range(0, c, ROWS):
                        to = (group * depth + tap * c + row) * line + p * width
                        rows = row_offsets(c - row, line)
                        tile = load_tile(u, to, rows) if first > share[0] else zero_tile(gy)
                        at = begin + row
                        if c - row >= ROWS:  # offsets known to the compiler are part of the instructions
                            tile = _over_pixels(tile, a, table, tap, each, at, row_offsets(ROWS, 1), work, d, count)
                        else:
                            tile = _over_pixels(tile, a, table, tap, each, at, row_offsets(c - row, 1), work, d, count)
                        store_tile(u, to, rows, tile)


@njit(forceinline=True)
def _over_pixels(tile, a, table, k, taps, at, offsets, b, j, count):
    """tile + the sum over `count` pixels, in `table` from k on, `taps` apart, of (channels from `at` on) (row of B)."""
    for _ in range(count):
        tile = rank_one(tile, a, table[k] + at, offsets, b, j)
        k += taps
        j += panel(b)
    return tile


@conv2d_grad_w.variant("direct", auto=lambda gy, x, shape, s, p, d, g, **out: _pays(shape, s, p, g))
def conv2d_grad_w_direct(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """tiles of weights stay in registers while a block of pixels and of gy passes"""
    gw = into(out, w_shape, gy.dtype)
    rows = gy.shape[0] * gy.shape[1] * gy.shape[2]
    if not rows or not gw.size:
        clear(gw)
        return gw
    kh, kw, c, o = w_shape
    taps = tuple(np.arange(k) * d - p for k, d, p in zip((kh, kw), dilation, padding, strict=True))
    width = panel_width(gy.dtype)
    workers = max(1, min(threads.count(), rows // ROWS))
    block = max(2 * ROWS, min(BLOCK, L2 // 4 // (x.shape[3] * gy.itemsize) // ROWS * ROWS))
    few = c < FEW_CHANNELS
    size = x.shape[3] + 2 * width + block * (width + kh * kw * FEW_CHANNELS * few)
    work, tables = scratch((workers, size), gy.dtype), np.empty((workers, block * kh * kw), np.int64)
    u = empty((workers, groups, kh * kw * c, -(-o // groups // width) * width), gy.dtype)
    _gather_grad(contiguous(x), contiguous(gy), u, taps, tuple(stride), block, work, tables)
    aside(_add_up, u, gw.reshape(kh * kw * c, groups, o // groups))
    return gw


def _add_up(u, gw):
    """What the workers have found: (workers, G, K, panels) -> (K, G, O/G)."""
    total = u.sum(axis=0) if len(u) > 1 else u[0]
    gw[...] = total[..., : gw.shape[2]].transpose(1, 0, 2)
