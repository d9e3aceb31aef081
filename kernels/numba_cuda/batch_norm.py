"""The reduction of batch norm in Numba CUDA: a block adds up its channels, its threads put their sums together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numba import float64

from ..batch_norm import batch_norm_stats
from ..elementwise import as_rows
from ..narrow import sum_dtype
from .launch import RUNG, empty, floats, jit

if TYPE_CHECKING:
    from numba import cuda

COLUMNS, ROWS = 32, 8  # threads of a block: a warp takes 32 neighbouring channels, eight warps share the rows


@batch_norm_stats.variant("numba_cuda", supports=floats, **RUNG)
def batch_norm_stats_numba_cuda(x):
    """the mean, and then the squared distances from it: two launches, a block for each 32 channels"""
    x = as_rows(x)
    columns, dtype = x.shape[1], sum_dtype(x.dtype)
    statistics = empty(x, (3, columns), np.float64)
    statistics[0] = 0
    for power in (1, 2):  # the second launch begins when all blocks of the first have ended
        launch = math.ceil(columns / COLUMNS), (COLUMNS, ROWS)
        _mean_of_power[launch](x, statistics[power - 1], power, statistics[power])
    return statistics[1].astype(dtype), statistics[2].astype(dtype)


@jit
def _mean_of_power(x, center, power, means):
    """The mean of (x - center)^power of each channel, in float64: slow on small GPUs, and exact."""
    space = cuda.shared.array((ROWS, COLUMNS), float64)
    tx, ty = cuda.threadIdx.x, cuda.threadIdx.y
    column = cuda.blockIdx.x * COLUMNS + tx
    total = 0.0
    if column < x.shape[1]:
        for r in range(ty, x.shape[0], ROWS):
            d = x[r, column] - center[column]
            total += d * d if power == 2 else d
    space[ty, tx] = total
    half = ROWS // 2
    while half > 0:  # half of the warps add the sums of the other half to theirs, until one has them all
        cuda.syncthreads()
        if ty < half:
            space[ty, tx] += space[ty + half, tx]
        half //= 2
    if ty == 0 and column < x.shape[1]:
        means[column] = space[0, tx] / x.shape[0]
