"""The register tile: the innermost loop of every GEMM and convolution of our own.

A tile of C, ROWS x VECTORS vectors, stays in registers while `depth` columns of A and rows of B pass:

    for k in range(depth): tile += A[:, k] B[k, :]           one broadcast a row, ROWS x VECTORS fused multiply-adds

Two loads of B and eight broadcasts feed sixteen multiply-adds: with AVX-512 that is 5 cycles of loading for 8 of
arithmetic, so the arithmetic never waits (Goto & van de Geijn 2008). Eight rows divide the usual numbers of channels;
where there are 16 registers, six rows are what fits, and where other files say eight they mean ROWS.
B comes in *panels*: PANEL columns wide, each row of a panel one or two cache lines, padded with zeros at the edge.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .simd import REGISTERS, WIDTH, broadcast, fma, lanes, load, minimum, prefetch, select, store, unrolled, zeros

ROWS, VECTORS = (8, 2) if REGISTERS == 32 else (6, 2)  # accumulators, two vectors of B and a broadcast must fit


def panel_width(dtype) -> int:
    """Columns of a panel for a NumPy dtype."""
    return VECTORS * WIDTH // dtype.itemsize


@unrolled
def panel(like):
    """The same inside compiled code: a constant."""
    return VECTORS * lanes(like)


@unrolled
def row_offsets(rows, stride):
    """Where the tile's rows begin. Rows beyond `rows` repeat the last one, and leave no tail."""
    return [minimum(r, rows - 1) * stride for r in range(ROWS)]


@unrolled
def zero_tile(like):
    """A tile of zeros."""
    return [[zeros(like) for _ in range(VECTORS)] for _ in range(ROWS)]


@unrolled
def load_tile(c, i, offsets):
    """The tile at element `i` of `c`."""
    return [[load(c, i + row + k * lanes(c)) for k in range(VECTORS)] for row in offsets]


@unrolled
def store_tile(c, i, offsets, tile):
    """Write the tile to element `i` of `c`; last row first: whatever rows beyond the last one hold is overwritten."""
    for row, vectors in reversed(list(zip(offsets, tile, strict=True))):
        for k, v in enumerate(vectors):
            store(c, i + row + k * lanes(c), v)


@unrolled
def load_tile_edge(c, i, offsets, columns):
    """load_tile where only `columns` of the panel exist."""
    return [[load(c, i + row + k * lanes(c), columns - k * lanes(c)) for k in range(VECTORS)] for row in offsets]


@unrolled
def store_tile_edge(c, i, offsets, columns, tile):
    """store_tile where only `columns` of the panel exist."""
    for row, vectors in reversed(list(zip(offsets, tile, strict=True))):
        for k, v in enumerate(vectors):
            store(c, i + row + k * lanes(c), v, columns - k * lanes(c))


@unrolled
def rank_one(tile, a, i, offsets, b, j):
    """tile + column of A at element `i` times row of B at element `j`."""
    row = [load(b, j + k * lanes(b)) for k in range(VECTORS)]
    return [
        [fma(broadcast(a, i + o), v, t) for v, t in zip(row, line, strict=True)]
        for o, line in zip(offsets, tile, strict=True)
    ]


@njit(forceinline=True)
def multiply(tile, a, i, offsets, step, b, j, width, depth):
    """tile + A B: A's rows at `i + offsets` with `step` between columns, B's rows `width` apart from `j` on."""
    for k in range(depth):
        tile = rank_one(tile, a, i + k * step, offsets, b, j + k * width)
    return tile


STEPS = 8


@njit(forceinline=True)
def multiply_and_ask(tile, a, i, offsets, step, b, j, depth, soon, lines):
    """tile + A B, B in panels; meanwhile what lies at `soon` in B comes into the cache, `lines` lines in STEPS steps.

    Asked for at once, they would help nothing: a core waits for a few at a time.
    """
    width, n = panel(b), lanes(b)
    for k in range(0, depth, STEPS):
        for line in range(lines):
            prefetch(b, soon + (k // STEPS * lines + line) * n)
        tile = multiply(tile, a, i + k * step, offsets, step, b, j + k * width, width, min(STEPS, depth - k))
    return tile


@unrolled
def add_tiles(a, b):
    """The sum of two tiles."""
    return [[v + w for v, w in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True)]


@unrolled
def finish_tile(tile, bias, j, floor):
    """The epilogue in registers: plus `bias` from element `j` on (padded to whole panels), then at least `floor`."""
    row = [load(bias, j + k * lanes(bias)) for k in range(VECTORS)]
    return [[clip(v + b, floor) for v, b in zip(line, row, strict=True)] for line in tile]


@unrolled
def clip(v, floor):
    """ReLU for floor 0, nothing for minus infinity; a NaN stays one, because it compares as false."""
    return select(v < floor, floor, v)


@njit(cache=True)
def part(index, count, size):
    """(first, end) of the index-th of `count` equal parts of range(size)."""
    index = np.int64(index)  # prange counts in unsigned integers, which do not mix with signed ones
    return index * size // count, (index + 1) * size // count
