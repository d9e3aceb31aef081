"""The gradient of the weights of a 1x1 convolution with a stride: a product of two tall matrices, one in pieces.

gw = X^T GY, where X has the pixels that the stride meets and GY their gradients: a few hundred columns each, and as
many rows as there are positions. Each number that is read meets a hundred others at most, so half of the time goes by
waiting for memory. Two things help. A block of pixels and one of gradients are copied into panels, so that the tile
reads lines in order. And while one block is multiplied, the lines of the next are asked for: a position every few
steps. (Asked for at once they would help nothing: a core waits for a few at a time.) 64 -> 128 channels: 0.75 of the
time of `direct`, by `python -m nanocnn bench conv2d_grad_w --kernel 1 --stride 2 --padding 0 --out-channels 128`.
"""

from __future__ import annotations

from numba import njit

from . import threads
from .conv2d import add_up, conv2d_grad_w
from .dispatch import plain_floats
from .memory import clear, contiguous, empty, into, scratch
from .parallel_for import parallel_for
from .simd import lanes, load, prefetch, store
from .tile import (
    ROWS,
    STEPS,
    load_tile,
    multiply,
    panel,
    panel_width,
    part,
    row_offsets,
    store_tile,
    zero_tile,
)

BLOCK = 128  # positions: those of 256 channels and of 512 gradients are 384 KB, and so are the next, of L2's 1 MB


@njit(cache=True)
def _pixel(x, gy, stride, position):
    """Where the pixel of x begins that meets a position of gy; positions count through images, rows and columns."""
    _, h, w, c = x.shape
    rows, columns = gy.shape[1], gy.shape[2]
    image, row, column = position // (rows * columns), position // columns % rows, position % columns
    return ((image * h + row * stride[0]) * w + column * stride[1]) * c


@njit(cache=True)
def _copy(x, at, count, work, to):
    """A run of numbers, in whole vectors: the last one is filled up with zeros."""
    n = lanes(x)
    for i in range(0, count, n):
        if i + n <= count:
            store(work, to + i, load(x, at + i))
        else:
            store(work, to + i, load(x, at + i, count - i))


@njit(forceinline=True)
def _ask(x, at, count):
    """Have a run of numbers brought into the cache."""
    for i in range(0, count, lanes(x)):
        prefetch(x, at + i)


@njit(cache=True)
def _grad_w(x, gy, u, stride, work):
    """Each worker sums its share of the positions into (C, O rounded up) of its own."""
    parallel_for(len(work), _share, (x, gy, u, stride, work))


@njit(cache=True)
def _share(worker, x, gy, all_u, stride, works):
    u, work = all_u[worker], works[worker]
    positions = part(worker, len(works), gy.shape[0] * gy.shape[1] * gy.shape[2])
    c, o, line = x.shape[3], gy.shape[3], u.shape[1]
    n, width = lanes(x), panel(x)
    depth = (c + n - 1) // n * n
    behind, tiles = BLOCK * depth + n, line // width * ((c + ROWS - 1) // ROWS)  # gradients lie behind the pixels
    of_x, of_gy, u = x.reshape(x.size), gy.reshape(gy.size), u.reshape(u.size)
    for first in range(positions[0], positions[1], BLOCK):
        count = min(BLOCK, positions[1] - first)
        for r in range(count):
            _copy(of_x, _pixel(x, gy, stride, first + r), c, work, r * depth)
            for p in range(0, line, width):
                _copy(of_gy, (first + r) * o + p, min(width, o - p), work, behind + p * BLOCK + r * width)
        coming, due, steps = first + count, 0, tiles * ((count + STEPS - 1) // STEPS)
        for p in range(0, line, width):
            for row in range(0, c, ROWS):
                at, to = row * line + p, row_offsets(c - row, line)
                tile = load_tile(u, at, to) if first > positions[0] else zero_tile(x)
                for k in range(0, count, STEPS):
                    due += count
                    while due >= steps:
                        due -= steps
                        if coming < positions[1]:
                            _ask(of_x, _pixel(x, gy, stride, coming), c)
                            _ask(of_gy, coming * o, o)
                            coming += 1
                    tile = multiply(
                        tile, work, k * depth + row, row_offsets(ROWS, 1), depth,
                        work, behind + p * BLOCK + k * width, width, min(STEPS, count - k),
                    )  # fmt: skip
                store_tile(u, at, to, tile)


@conv2d_grad_w.variant(
    "subsampled",
    supports=lambda gy, x, shape, stride, padding, dilation, groups, **out: (
        tuple(shape[:2]) == (1, 1) and tuple(padding) == (0, 0) and groups == 1 and plain_floats(gy, x, **out)
    ),
    auto=lambda gy, x, shape, stride, *rest, **out: max(stride) > 1,  # else it is a plain GEMM
)
def conv2d_grad_w_subsampled(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """1x1 kernels with a stride: the pixels that it meets, gathered by blocks; the next block is asked for meanwhile"""
    gw = into(out, w_shape, gy.dtype)
    positions, (c, o) = gy.shape[0] * gy.shape[1] * gy.shape[2], w_shape[2:]
    if not positions or not gw.size:
        clear(gw)
        return gw
    width = panel_width(gy.dtype)
    line, depth = -(-o // width) * width, -(-c // width) * width
    workers = max(1, min(threads.count(), positions // ROWS))
    u = empty((workers, c, line), gy.dtype)
    work = scratch((workers, BLOCK * (depth + line) + 2 * width), gy.dtype)
    _grad_w(contiguous(x), contiguous(gy), u, tuple(stride), work)
    add_up(u, gw)
    return gw
