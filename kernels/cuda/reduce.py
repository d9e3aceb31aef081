"""How sums over the rows of (M, C) arrays are shared out to blocks and threads; the device's part is in reduce.cuh.

What the blocks have found is added up by a second small kernel. Who adds what, and in which order, follows from the
shape alone: the bits of a sum are the same in each run.
"""

from __future__ import annotations

from ..narrow import sum_dtype
from .launch import empty
from .source import macros
from .tunable import Tunable

# each: rows that a thread adds up, at least; most: blocks, about
ROWS = Tunable(
    "256 threads, eight rows a thread or more; and no more blocks than keep all multiprocessors busy, whose parts a "
    "second kernel adds up",
    {**macros("reduce.cuh", "THREADS"), "each": 8, "most": 1024},
    dict(THREADS=128),
    dict(THREADS=512),
    dict(each=2),
    dict(each=32),
    dict(most=256),
)


def over_rows(rows, columns):
    """Grid, block, and the rows of a block. Its columns are a power of 2, and 8 (a sector) or more if there are 8."""
    able = (w for w in (32, 16, 8, 4, 2, 1) if w >= min(8, columns))
    width = min(able, key=lambda w: -(-columns // w) * w)  # as few threads without a column as can be
    depth, across = ROWS["THREADS"] // width, -(-columns // width)
    each = max(ROWS["each"] * depth, -(-rows // max(1, ROWS["most"] // across)))
    return (across, -(-rows // each)), (width, depth), each


def partials(x, sums, grid, columns):
    """Room for what each block adds up, in the type that the kernels call `sum`."""
    return empty(x, (sums, grid[1], columns), sum_dtype(x.dtype))


def add_up(kernel, partial, totals, *args):
    """Run the second kernel: `partial` (sums, blocks, C) to `totals` (sums, C), which is returned."""
    sums, blocks, columns = partial.shape
    (across, _), block, _ = over_rows(1, columns)
    kernel((across, sums), block, partial, totals, blocks, columns, *args)
    return totals
