"""C = A B with the register tile (Goto & van de Geijn 2008): both operands in panels, blocks of them in cache.

The tile reads a panel of A and a panel of B from end to end, one cache line after the other. So a block of each is
first copied into panels: a block of B (DEPTH rows, COLUMNS columns) and one of A (ROWS_HELD rows, DEPTH columns) stay
in L2 while all their tiles pass. Copying a number costs little beside the hundreds of multiply-adds that use it, and it
is where a transposed operand is turned: by squares of vectors, in registers. Without it, the rows of a 4096 x 4096
matrix, 16 KB apart, fall into the same few sets of the cache (36 ms in place of 9).

A constant B (constant.py) is packed once and for all, in panels as deep as itself, and read from memory as they lie.
Memory and arithmetic would take turns there: a panel comes in while its first tile waits, and fifteen others pass
without touching memory. So each tile asks for its part of the next panel, one cache line every few steps. (Asked for at
once, the lines help nothing: a core waits for a few at a time.) 4096 x 4096 and 128 rows: 13.3 -> 11.4 ms.

Workers share the columns of B or the rows of A, whichever operand is larger: that one is read once in all.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from . import threads
from .caches import L2
from .constant import derived, is_constant
from .epilogue import padded_bias
from .memory import contiguous, scratch
from .pack import panels_of, swap_square
from .parallel_for import parallel_for
from .simd import WIDTH, lanes, load, splat, store, unrolled
from .tile import (
    ROWS,
    STEPS,
    VECTORS,
    finish_tile,
    load_tile,
    load_tile_edge,
    multiply,
    multiply_and_ask,
    panel,
    panel_width,
    part,
    row_offsets,
    store_tile,
    store_tile_edge,
    zero_tile,
)

# Of float32: 128 KB of B and up to 512 KB of A in an L2 of 1 MB or more, else up to 256 KB of each. The deeper a block,
# the more of a row is read at once, and the less often a tile of C comes and goes.
DEPTH, COLUMNS = (512, 64) if L2 >= 1 << 20 else (256, 256)
ROWS_HELD = 256 // math.lcm(WIDTH // 4, ROWS) * math.lcm(WIDTH // 4, ROWS)  # whole panels of A; float64's divide them


def gemm(a, b, out, bias=None, relu=False):
    """(M, K) @ (K, N) into `out` (M, N), C-contiguous; plus `bias` (N,); ReLU. Transposed views are fast, too."""
    (m, k), n = a.shape, b.shape[1]
    a, a_row, a_step = _memory(a)
    packed = is_constant(b)
    if packed:
        b = derived(b, "panels", lambda: panels_of(b[None]).reshape(-1, panel_width(b.dtype)))
    b, b_row, b_step = _memory(b)
    width = panel_width(out.dtype)
    padded = padded_bias(bias, -(-n // width) * width, out.dtype)
    by_columns = n >= m
    units = -(-n // width) if by_columns else -(-m // ROWS)
    workers = max(1, min(threads.count(), units))
    work = scratch((workers, DEPTH * (COLUMNS + ROWS_HELD)), out.dtype)
    floor = out.dtype.type(0 if relu else -np.inf)
    _gemm(a, (a_row, a_step), b, (b_row, b_step), out, (m, n, k), padded, floor, by_columns, packed, work)
    return out


def _memory(x):
    """A matrix as flat memory, with the distances between rows and between columns."""
    if x.T.flags.c_contiguous and not x.flags.c_contiguous and x.flags.aligned:
        return x.T.reshape(x.size), 1, x.shape[0]
    return contiguous(x).reshape(x.size), x.shape[1], 1


@unrolled
def _panel_of_a(like):
    """Rows of A in a panel, a constant: whole vectors, and whole tiles."""
    return math.lcm(lanes(like), ROWS)


@njit(cache=True)
def _gemm(a, a_strides, b, b_strides, c, sizes, bias, floor, by_columns, packed, work):
    parallel_for(len(work), _share, (a, a_strides, b, b_strides, c, sizes, bias, floor, by_columns, packed, work))


@njit(cache=True)
def _share(worker, a, a_strides, b, b_strides, c, sizes, bias, floor, by_columns, packed, works):
    workers, work = len(works), works[worker]
    width, of_tiles, low = panel(work), _panel_of_a(work), splat(floor, work)
    (m, n, _), rows, columns = sizes, (0, sizes[0]), (0, sizes[1])
    if by_columns:
        left, right = part(worker, workers, (n + width - 1) // width)
        columns = left * width, min(n, right * width)
    else:
        top, bottom = part(worker, workers, (m + ROWS - 1) // ROWS)
        rows = top * ROWS, min(m, bottom * ROWS)
    depth_of_all, line = sizes[2], sizes[1]
    of_a = DEPTH * COLUMNS  # where A's block begins in `work`; B's is at the beginning
    for k0 in range(0, depth_of_all, DEPTH):
        k = min(DEPTH, depth_of_all - k0)
        for m0 in range(rows[0], rows[1], ROWS_HELD):
            m = min(ROWS_HELD, rows[1] - m0)
            # A's panels are those of its transpose: a column of A is a row of them
            _pack_a(a, m0 * a_strides[0] + k0 * a_strides[1], a_strides[1], a_strides[0], k, m, work, of_a)
            for n0 in range(columns[0], columns[1], COLUMNS):
                n = min(COLUMNS, columns[1] - n0)
                if not packed:
                    _pack_b(b, k0 * b_strides[0] + n0 * b_strides[1], b_strides[0], b_strides[1], k, n, work, 0)
                for p in range(0, n, width):
                    for r in range(0, m, ROWS):
                        at, to = (m0 + r) * line + n0 + p, row_offsets(m - r, line)
                        tile = zero_tile(work)
                        if k0 > 0:
                            tile = load_tile(c, at, to) if p + width <= n else load_tile_edge(c, at, to, n - p)
                        i, offsets = of_a + r // of_tiles * DEPTH * of_tiles + r % of_tiles, row_offsets(ROWS, 1)
                        if packed:
                            j = (n0 + p) * depth_of_all + k0 * width
                            soon = j + (depth_of_all + r // ROWS * (DEPTH // STEPS // VECTORS)) * width
                            tile = multiply_and_ask(tile, work, i, offsets, of_tiles, b, j, k, soon, 1)
                        else:
                            tile = multiply(tile, work, i, offsets, of_tiles, work, p * DEPTH, width, k)
                        if k0 + k == depth_of_all:
                            tile = finish_tile(tile, bias, n0 + p, low)
                        if p + width <= n:
                            store_tile(c, at, to, tile)
                        else:
                            store_tile_edge(c, at, to, n - p, tile)


def _packer(width_of):
    """A compiled function for panels of a width that the compiler knows: as an argument, it would be divided by for
    every vector."""

    @njit(cache=True)
    def pack(x, at, row, step, depth, count, work, to):
        """The (depth, count) block of x that begins at `at` into panels, DEPTH rows each, padded with zeros.

        Rows of the block lie `row` apart, columns `step`; one of them is 1.
        """
        n, width = lanes(work), width_of(work)
        if step == 1:
            for k in range(depth):
                for i in range(0, count, n):
                    place = to + i // width * width * DEPTH + k * width + i % width
                    if i + n <= count:
                        store(work, place, load(x, at + k * row + i))
                    else:
                        store(work, place, load(x, at + k * row + i, count - i))
                for i in range((count + n - 1) // n * n, (count + width - 1) // width * width, n):
                    store(work, to + i // width * width * DEPTH + k * width + i % width, splat(0.0, work))
            return
        for first in range(0, count, width):
            for i in range(0, width, n):
                for k in range(0, depth, n):
                    place = to + first * DEPTH + k * width + i
                    if first + i + n <= count and k + n <= depth:
                        swap_square(x, at + k + (first + i) * step, step, work, place, width)
                    else:
                        for r in range(min(n, depth - k)):
                            for s in range(n):
                                inside = first + i + s < count
                                from_x = at + k + r + (first + i + s) * step
                                work[place + r * width + s] = x[from_x] if inside else work.dtype.type(0)

    return pack


_pack_a, _pack_b = _packer(_panel_of_a), _packer(panel)
