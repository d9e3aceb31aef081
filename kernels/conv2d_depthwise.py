"""Depthwise convolution: each channel has a kernel of its own (groups = C), so there is no sum over channels.

A GEMM has nothing to do here: with K = 9 and one column, im2col writes nine numbers to use each of them once. What
remains is 9 multiply-adds for a pixel that is read and one that is written, 18 operations for 8 bytes: the speed of
memory is all there is to win. So every image is read once and written once, and all else happens in the L1 cache.

The channels are the vector axis. A worker takes one vector of channels of a few rows and copies their pixels together,
with zeros around the image: now neighbours are a vector apart, addresses are constants, borders are no case of their
own, and no two pixels compete for a cache set, as they do where the number of channels is a power of two. Eight outputs
of a row are a tile in registers. A row of a 3x3 kernel takes 10 vectors of pixels and 3 of weights for 24 operations;
any other kernel, stride or dilation takes tap by tap, 8 and 1 for 8.

The gradient of the image is the same sweep from gy to x. With stride s, the pixels of one residue class modulo s meet
the same taps: s x s sweeps of stride 1. The gradient of the weights keeps the sums of a row of taps in registers while
the rows of gy pass over the copied pixels.

With several outputs a channel, each channel is repeated as often: the copy costs as much as writing the result.
"""

from __future__ import annotations

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
from .memory import contiguous, empty, scratch
from .simd import REGISTERS, WIDTH, fma, lanes, load, minimum, splat, store, unrolled, zeros
from .tile import clip, part

TILE = 8 if REGISTERS == 32 else 4  # outputs; with the pixels that they meet in a row they fit into the registers
CHAINS = TILE // 2  # sums of the weights' gradient for each tap, which wait for one another otherwise
VECTORS = 8  # of channels a task takes, at most: long enough stretches of memory
BUDGET = L1 * 3 // 4  # bytes of the copied pixels


# ------------------------------------------------------------------ a few channels of a few rows, copied together


@njit(cache=True)
def _copy(x, image, top, left, c, work, to, vectors, rows, columns):
    """`rows` x `columns` pixels from (top, left) on, `vectors` of channels from c on: a plane each; zeros outside."""
    h, w, channels = x.shape[1], x.shape[2], x.shape[3]
    n, plane = lanes(x), rows * columns * lanes(x)
    for i in range(rows):
        inside = 0 <= top + i < h
        begin = min(columns, max(0, -left)) if inside else columns
        end = max(begin, min(columns, w - left))
        line, at = to + i * columns * n, ((image * h + top + i) * w + left) * channels + c
        for j in range(columns):
            if j < begin or j >= end:
                for v in range(vectors):
                    store(work, line + v * plane + j * n, 0)
            elif c + vectors * n <= channels:
                for v in range(vectors):
                    store(work, line + v * plane + j * n, load(x, at + j * channels + v * n))
            else:
                for v in range(vectors):
                    store(work, line + v * plane + j * n, load(x, at + j * channels + v * n, channels - c - v * n))


class Room(NamedTuple):
    """How much a task takes, so that it fits into the L1 cache."""

    block: int  # rows of outputs
    rows: int  # rows of pixels
    columns: int  # columns of pixels; the last tile of a row may read too far
    vectors: int  # of channels


def _room(outputs, kernel, gap, step, channels, itemsize):
    columns = (-(-outputs[1] // TILE) * TILE - 1) * step[1] + max(0, kernel[1] - 1) * gap[1] + 1
    reach = max(0, kernel[0] - 1) * gap[0] + 1
    vectors = -(-channels * itemsize // WIDTH)
    vectors = max(1, min(vectors, VECTORS, BUDGET // (columns * WIDTH) // (reach + 3 * step[0])))
    block = max(1, min(outputs[0], (BUDGET // (vectors * columns * WIDTH) - reach) // step[0] + 1))
    return Room(block, (block - 1) * step[0] + reach, columns, vectors)


@njit(cache=True)
def _task(number, shape, outputs, room, width):
    """(image, first row of outputs, first channel) of the number-th task: channels, then blocks of rows, then images."""
    parts = (shape[3] + room.vectors * width - 1) // (room.vectors * width)
    blocks = (outputs + room.block - 1) // room.block
    return number // parts // blocks, number // parts % blocks * room.block, number % parts * room.vectors * width


def _tasks(shape, outputs, room, width):
    return shape[0] * -(-outputs // room.block) * -(-shape[3] // (room.vectors * width))


# ------------------------------------------------------------------ forward, and the gradient of the image


@njit(parallel=True, cache=True)
def _sweep(
    x, w, y, bias, floor, residual, has_residual, outputs, step, first, gap, y_first, y_step, room, kind, tasks, work
):
    """y[y_first + y_step (i, j)] = epilogue(sum over taps k of x[step (i, j) + first + gap k] w[k]), by workers.

    `outputs` is the number of (i, j) along each axis.
    """
    workers = work.shape[0]
    for worker in prange(workers):
        share = part(worker, workers, tasks)
        for number in range(share[0], share[1]):
            _sweep_task(
                x, w, y, bias, floor, residual, has_residual, outputs, step, first, gap, y_first, y_step, room, kind,
                _task(number, x.shape, outputs[0], room, lanes(x)), work[worker],
            )  # fmt: skip


@njit(cache=True)
def _sweep_task(
    x, w, y, bias, floor, residual, has_residual, outputs, step, first, gap, y_first, y_step, room, kind, task, work
):
    image, top, c = task
    n, channels, kh, kw, columns = lanes(x), y.shape[3], w.shape[0], w.shape[1], room.columns
    vectors = min(room.vectors, (channels - c + n - 1) // n)
    _copy(x, image, top * step[0] + first[0], first[1], c, work, 0, vectors, room.rows, columns)
    plane, weights = room.rows * columns * n, room.vectors * room.rows * columns * n
    for v in range(vectors):
        for k in range(kh * kw):
            store(work, weights + (v * kh * kw + k) * n, load(w, k * channels + c + v * n, channels - c - v * n))
    low, line, across = splat(floor, y), gap[0] * columns * n, y_step[1] * channels
    for i in range(top, min(outputs[0], top + room.block)):
        row = ((image * y.shape[1] + y_first[0] + i * y_step[0]) * y.shape[2] + y_first[1]) * channels + c
        for j in range(0, outputs[1], TILE):
            for v in range(vectors):
                at = v * plane + ((i - top) * step[0] * columns + j * step[1]) * n
                tap, to, rest = weights + v * kh * kw * n, row + j * across + v * n, channels - c - v * n
                tile = _start(y)
                if kind == 31:
                    for k in range(kh):
                        tile = _add_taps(tile, work, at + k * line, tap + k * 3 * n, 3, 1)
                elif kind == 32:
                    for k in range(kh):
                        tile = _add_taps(tile, work, at + k * line, tap + k * 3 * n, 3, 2)
                elif kind == 51:
                    for k in range(kh):
                        tile = _add_taps(tile, work, at + k * line, tap + k * 5 * n, 5, 1)
                elif kind == 52:
                    for k in range(kh):
                        tile = _add_taps(tile, work, at + k * line, tap + k * 5 * n, 5, 2)
                else:
                    for k in range(kh * kw):
                        pixels = at + k // kw * line + k % kw * gap[1] * n
                        tile = _add_taps(tile, work, pixels, tap + k * n, 1, step[1])
                add = load(bias, c + v * n, rest)
                if rest >= n and j + TILE <= outputs[1]:
                    if has_residual:
                        tile = _add(tile, residual, to, across)
                    _finish(tile, add, low, y, to, across)
                else:
                    if has_residual:
                        tile = _add_some(tile, residual, to, across, rest, outputs[1] - j)
                    _finish_some(tile, add, low, y, to, across, rest, outputs[1] - j)


@unrolled
def _start(like):
    return [zeros(like)] * TILE


@unrolled
def _add_taps(tile, work, at, weights, taps, step):
    """tile + neighbouring taps times the pixels that they meet, those of the next output `step` further."""
    n = lanes(work)
    for k in range(taps):
        weight = load(work, weights + k * n)
        tile = [fma(load(work, at + (i * step + k) * n), weight, v) for i, v in enumerate(tile)]
    return tile


@unrolled
def _add(tile, residual, at, across):
    return [v + load(residual, at + i * across) for i, v in enumerate(tile)]


@unrolled
def _finish(tile, add, low, y, at, across):
    """Plus bias, at least `low`, to memory."""
    for i, v in enumerate(tile):
        store(y, at + i * across, clip(v + add, low))


@unrolled
def _add_some(tile, residual, at, across, rest, outputs):
    """_add for the first outputs of a tile, and the first `rest` lanes: no memory beyond them is touched."""
    n = lanes(residual)
    return [v + load(residual, at + i * across, minimum(rest, (outputs - i) * n)) for i, v in enumerate(tile)]


@unrolled
def _finish_some(tile, add, low, y, at, across, rest, outputs):
    """_finish for the first outputs of a tile, and the first `rest` lanes."""
    for i, v in enumerate(tile):
        store(y, at + i * across, clip(v + add, low), minimum(rest, (outputs - i) * lanes(y)))


def _run(x, w, y, axes, bias=None, residual=None, relu=False):
    """One sweep; `w` is (KH, KW, C), and `axes` says for rows and columns (step, first, gap, y_first, y_step)."""
    step, first, gap, y_first, y_step = zip(*axes, strict=True)
    outputs = tuple(-(-(size - a) // b) for size, a, b in zip(y.shape[1:3], y_first, y_step, strict=True))
    if not y.size or min(outputs) < 1:
        return
    c, (kh, kw), lane = x.shape[3], w.shape[:2], WIDTH // y.itemsize
    room = _room(outputs, (kh, kw), gap, step, c, y.itemsize)
    tasks = _tasks(x.shape, outputs[0], room, lane)
    workers = min(threads.count(), tasks)
    work = scratch((workers, room.vectors * (room.rows * room.columns + kh * kw) * lane), y.dtype)
    bias, floor = np.zeros(c, y.dtype) if bias is None else contiguous(bias), y.dtype.type(0 if relu else -np.inf)
    plus, kind = y if residual is None else contiguous(residual), _kind(kw, gap[1], step[1])
    _sweep(
        x, w, y, bias, floor, plus, residual is not None, outputs, step, first, gap, y_first, y_step, room, kind,
        tasks, work,
    )  # fmt: skip


def _kind(taps, gap, step):
    """Which code of its own a row of taps has: 10 x taps + stride, or 0 for none."""
    return 10 * taps + step if gap == 1 and taps in (3, 5) and step in (1, 2) else 0


# ------------------------------------------------------------------ the gradient of the weights


@njit(parallel=True, cache=True)
def _gather(x, gy, u, kernel, step, first, gap, room, kind, tasks, work):
    """Each worker sums its share of the tasks into u (workers, taps, C), which begins as zeros."""
    workers = work.shape[0]
    for worker in prange(workers):
        share = part(worker, workers, tasks)
        for number in range(share[0], share[1]):
            task = _task(number, x.shape, gy.shape[1], room, lanes(x))
            _gather_task(x, gy, u[worker], kernel, step, first, gap, room, kind, task, work[worker])


@njit(cache=True)
def _gather_task(x, gy, u, kernel, step, first, gap, room, kind, task, work):
    image, top, c = task
    n, columns, across, size = lanes(x), room.columns, gy.shape[3], gy.shape[2]
    vectors = min(room.vectors, (across - c + n - 1) // n)
    grads, rows = room.vectors * room.rows * columns * n, min(gy.shape[1] - top, room.block)
    size = (gy.shape[2] + CHAINS - 1) // CHAINS * CHAINS
    _copy(x, image, top * step[0] + first[0], first[1], c, work, 0, vectors, room.rows, columns)
    _copy(gy, image, top, 0, c, work, grads, vectors, rows, size)
    line = step[0] * columns * n
    for v in range(vectors):
        gradient, to, rest = (grads + v * rows * size * n, rows, size), c + v * n, across - c - v * n
        for i in range(kernel[0]):
            at = (v * room.rows + i * gap[0]) * columns * n
            if kind == 31:
                _keep(_sum_taps(work, gradient, at, line, 3, 1), u, i * 3 * across + to, across, rest)
            elif kind == 32:
                _keep(_sum_taps(work, gradient, at, line, 3, 2), u, i * 3 * across + to, across, rest)
            elif kind == 51:
                _keep(_sum_taps(work, gradient, at, line, 5, 1), u, i * 5 * across + to, across, rest)
            elif kind == 52:
                _keep(_sum_taps(work, gradient, at, line, 5, 2), u, i * 5 * across + to, across, rest)
            else:
                for j in range(kernel[1]):
                    sums = _sum_taps(work, gradient, at + j * gap[1] * n, line, 1, step[1])
                    _keep(sums, u, (i * kernel[1] + j) * across + to, across, rest)


@njit(inline="always")  # so that the numbers of taps and steps are literals
def _sum_taps(work, gradient, at, line, taps, step):
    """The sums of neighbouring taps; `at` is the first pixel, `line` one row of gy further."""
    n, sums = lanes(work), _start_sums(work, taps)
    grad, rows, size = gradient
    for r in range(rows):
        for j in range(0, size, CHAINS):
            sums = _add_outputs(sums, work, at + r * line + j * step * n, step, grad + (r * size + j) * n)
    return sums


@unrolled
def _start_sums(like, taps):
    return [[zeros(like)] * taps] * CHAINS


@unrolled
def _add_outputs(sums, work, at, step, grad):
    """sums + gy of CHAINS outputs times the pixels that each tap meets there; each output adds to sums of its own."""
    n, result = lanes(work), []
    for i, of_output in enumerate(sums):
        g = load(work, grad + i * n)
        result.append([fma(load(work, at + (i * step + k) * n), g, v) for k, v in enumerate(of_output)])
    return result


@unrolled
def _keep(sums, u, to, across, rest):
    """Add the sums of a few rows to those of the rows before: short sums of short sums keep their precision."""
    for i in range(len(sums[0])):
        total = sums[0][i]
        for chain in sums[1:]:
            total = total + chain[i]
        store(u, to + i * across, load(u, to + i * across, rest) + total, rest)


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
    y = empty((*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3]), x.dtype)
    axes = [(s, -p, d, 0, 1) for s, p, d in zip(stride, padding, dilation, strict=True)]
    _run(_each_output(x, w.shape[3]), contiguous(w[:, :, 0]), y, axes, **epilogue)
    return y


@conv2d_grad_x.variant(
    "depthwise",
    supports=lambda gy, w, x_shape, s, p, d, groups, **e: _depthwise(gy, w, x_shape[3], groups, **e),
    auto=lambda gy, w, x_shape, s, p, d, groups, **e: groups > 1,
)
def conv2d_grad_x_depthwise(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """the same sweep from gy to x, one residue class of pixels modulo the stride at a time"""
    gy, single = contiguous(gy), w.shape[3] == groups
    gx = empty((*x_shape[:3], w.shape[3]), gy.dtype)
    geometry = list(zip(stride, padding, dilation, w.shape[:2], strict=True))
    for a in range(stride[0]):
        for b in range(stride[1]):
            (rows, of_rows), (columns, of_columns) = (
                _class_of(r, *axis) for r, axis in zip((a, b), geometry, strict=True)
            )
            taps = np.ascontiguousarray(w[rows][:, columns, 0])
            _run(gy, taps, gx, (of_rows, of_columns), residual=residual if single else None)
    return gx if single else finish(gx.reshape(*x_shape, -1).sum(axis=-1), residual=residual)


def _class_of(r, stride, padding, dilation, kernel):
    """Along one axis, for the pixels r modulo stride: the taps that they meet, and (step, first, gap, r, stride).

    Pixel i stride + r meets tap k of gy[i + (r + padding - k dilation) / stride] where that is whole.
    """
    reach = r + padding - np.arange(kernel) * dilation
    which = np.flatnonzero(reach % stride == 0)[::-1]  # so that gy is met in its order
    met = reach[which] // stride
    return which, (1, int(met[0]) if len(met) else 0, int(met[1] - met[0]) if len(met) > 1 else 1, r, stride)


@conv2d_grad_w.variant(
    "depthwise",
    supports=lambda gy, x, w_shape, s, p, d, groups: _depthwise(gy, x, x.shape[3], groups),
    auto=lambda gy, x, w_shape, s, p, d, groups: groups > 1,
)
def conv2d_grad_w_depthwise(gy, x, w_shape, stride, padding, dilation, groups):
    """a row of taps in registers while the rows of gy pass over the copied pixels"""
    kh, kw, _, o = w_shape
    if not gy.size:
        return np.zeros(w_shape, gy.dtype)
    stride, gap, first, lane = tuple(stride), tuple(dilation), (-padding[0], -padding[1]), WIDTH // gy.itemsize
    room = _room(gy.shape[1:3], (kh, kw), gap, stride, o, gy.itemsize)
    tasks = _tasks(gy.shape, gy.shape[1], room, lane)
    workers = min(threads.count(), tasks)
    places = room.vectors * (room.rows * room.columns + room.block * -(-gy.shape[2] // CHAINS) * CHAINS)
    u, work = np.zeros((workers, kh * kw, o), gy.dtype), scratch((workers, places * lane), gy.dtype)
    x, kind = _each_output(x, o), _kind(kw, gap[1], stride[1])
    _gather(x, contiguous(gy), u, (kh, kw), stride, first, gap, room, kind, tasks, work)
    return u.sum(axis=0).reshape(w_shape)
