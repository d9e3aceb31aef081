"""The matrix product in Numba CUDA: tiles in shared memory, which a block loads together and all its threads read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..epilogue import finish
from ..matmul import matmul
from .launch import RUNG, empty, floats, jit

if TYPE_CHECKING:
    from numba import cuda

TILE = 16  # threads along each side of a block: each number that is loaded serves as many sums
MOST_Y = 65535  # blocks along y of a grid, on every GPU


def _matrices(a, b, out=None, *, bias=None, relu=False):
    fits = floats(a, b) and a.ndim == b.ndim == 2 and a.shape[1] == b.shape[0]
    return fits and a.shape[0] <= MOST_Y * TILE and (out is None or out.dtype == a.dtype)


@matmul.variant("numba_cuda", supports=_matrices, **RUNG)
def matmul_numba_cuda(a, b, out=None, **epilogue):
    """tiles of 16 x 16 in shared memory: each number from global memory serves 16 sums"""
    c = empty(a, (a.shape[0], b.shape[1])) if out is None else out
    blocks = math.ceil(c.shape[1] / TILE), math.ceil(c.shape[0] / TILE)
    _tiled[blocks, (TILE, TILE)](a, b, c)
    return finish(c, **epilogue)


@jit
def _tiled(a, b, c):
    # Each on a line of its own: the simulator knows shared arrays by their lines.
    tile_a = cuda.shared.array((TILE, TILE), a.dtype)
    tile_b = cuda.shared.array((TILE, TILE), b.dtype)
    (m, k), n = a.shape, b.shape[1]
    x, y = cuda.threadIdx.x, cuda.threadIdx.y
    column, row = cuda.grid(2)  # neighbours (x) take neighbouring columns
    zero = a.dtype.type(0)
    total = zero
    for first in range(0, k, TILE):
        tile_a[y, x] = a[row, first + x] if row < m and first + x < k else zero
        tile_b[y, x] = b[first + y, column] if first + y < k and column < n else zero
        cuda.syncthreads()
        for i in range(TILE):
            total += tile_a[y, i] * tile_b[i, x]
        cuda.syncthreads()  # before anybody overwrites what others still read
    if row < m and column < n:
        c[row, column] = total
