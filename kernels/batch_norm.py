"""Batch norm in four passes, two forward and two backward: statistics, then one multiply-add an element.

Each pass reads what it needs once. What happens between the passes concerns (C,) numbers and is calculus, which lives
in functional/norm.py. Sums over a batch are long (128 x 32 x 32 rows): they are added up in float64, over blocks of
rows that the shape alone determines, and then block by block, so that the result does not depend on the threads.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, xp_of
from .elementwise import as_rows, block_of, blocks_of_rows


def statistics_dtype(x):
    """float64 for float64, float32 for anything narrower."""
    return np.dtype(np.float64 if x.dtype == np.float64 else np.float32)


@Primitive
def batch_norm_stats(x):
    """(..., C) -> mean (C,), variance (C,): of each channel, the variance biased (divided by the number of rows)."""
    x = as_rows(x)
    mean = x.mean(axis=0, dtype=np.float64)
    var = xp_of(x).square(x - mean).mean(axis=0)
    return mean.astype(statistics_dtype(x)), var.astype(statistics_dtype(x))


@batch_norm_stats.variant("numba")
def batch_norm_stats_numba(x):
    """one pass: sums of x - k and of its square, k being the first row, so that a large mean cancels before squaring"""
    x = as_rows(np.ascontiguousarray(x))
    partial = np.zeros((blocks_of_rows(*x.shape), 2, x.shape[1]), np.float64)
    _moments(x, x[0], partial)
    shifted, squares = partial.sum(axis=0) / len(x)
    return (x[0] + shifted).astype(x.dtype), np.maximum(squares - shifted**2, 0).astype(x.dtype)


@njit(parallel=True, cache=True)
def _moments(x, k, partial):
    for b in prange(partial.shape[0]):
        first, last = block_of(x.shape[0], partial.shape[0], b)
        _add_moments(x[first:last], k, partial[b, 0], partial[b, 1])


@njit(cache=True, fastmath={"contract"})
def _add_moments(x, k, total, squares):
    # Four rows at a time in x's precision, before the float64 totals are touched.
    whole = x.shape[0] - x.shape[0] % 4
    for r in range(0, whole, 4):
        for c in range(k.size):
            d0, d1, d2, d3 = x[r, c] - k[c], x[r + 1, c] - k[c], x[r + 2, c] - k[c], x[r + 3, c] - k[c]
            total[c] += (d0 + d1) + (d2 + d3)
            squares[c] += (d0 * d0 + d1 * d1) + (d2 * d2 + d3 * d3)
    for r in range(whole, x.shape[0]):
        for c in range(k.size):
            d0 = x[r, c] - k[c]
            total[c] += d0
            squares[c] += d0 * d0


@batch_norm_stats.work
def _(x):
    return 4 * x.size, x.nbytes


@Primitive
def batch_norm_apply(x, mean, scale, shift):
    """(x - mean) scale + shift, each (C,): (..., C) -> (..., C)."""
    return ((x - mean) * scale + shift).astype(x.dtype, copy=False)


@batch_norm_apply.variant("numba")
def batch_norm_apply_numba(x, mean, scale, shift):
    """one pass, parallel over rows"""
    y = np.empty(x.shape, x.dtype)
    _apply(as_rows(np.ascontiguousarray(x)), mean, scale, shift, as_rows(y))
    return y


@njit(parallel=True, cache=True, fastmath={"contract"})
def _apply(x, mean, scale, shift, y):
    for r in prange(x.shape[0]):
        for c in range(x.shape[1]):
            y[r, c] = (x[r, c] - mean[c]) * scale[c] + shift[c]


@batch_norm_apply.work
def _(x, mean, scale, shift):
    return 3 * x.size, 2 * x.nbytes


@Primitive
def batch_norm_grad_stats(gy, x, mean):
    """Two sums over the rows, (C,) each: of gy, and of gy (x - mean)."""
    gy, x = as_rows(gy), as_rows(x)
    sums = gy.sum(axis=0, dtype=np.float64), (gy * (x - mean)).sum(axis=0, dtype=np.float64)
    return tuple(s.astype(statistics_dtype(x)) for s in sums)


@batch_norm_grad_stats.variant("numba")
def batch_norm_grad_stats_numba(gy, x, mean):
    """one pass over both arrays"""
    gy, x = as_rows(np.ascontiguousarray(gy)), as_rows(np.ascontiguousarray(x))
    partial = np.zeros((blocks_of_rows(*x.shape), 2, x.shape[1]), np.float64)
    _products(gy, x, mean, partial)
    return tuple(partial.sum(axis=0).astype(x.dtype))


@njit(parallel=True, cache=True)
def _products(gy, x, mean, partial):
    for b in prange(partial.shape[0]):
        first, last = block_of(x.shape[0], partial.shape[0], b)
        _add_products(gy[first:last], x[first:last], mean, partial[b, 0], partial[b, 1])


@njit(cache=True, fastmath={"contract"})
def _add_products(gy, x, mean, total, products):
    whole = x.shape[0] - x.shape[0] % 4
    for r in range(0, whole, 4):
        for c in range(mean.size):
            g0, g1, g2, g3, m = gy[r, c], gy[r + 1, c], gy[r + 2, c], gy[r + 3, c], mean[c]
            total[c] += (g0 + g1) + (g2 + g3)
            low = g0 * (x[r, c] - m) + g1 * (x[r + 1, c] - m)
            products[c] += low + (g2 * (x[r + 2, c] - m) + g3 * (x[r + 3, c] - m))
    for r in range(whole, x.shape[0]):
        for c in range(mean.size):
            total[c] += gy[r, c]
            products[c] += gy[r, c] * (x[r, c] - mean[c])


@batch_norm_grad_stats.work
def _(gy, x, mean):
    return 4 * x.size, 2 * x.nbytes


@Primitive
def batch_norm_grad(gy, x, mean, scale, a, b):
    """(gy - a - (x - mean) b) scale, with (C,) arrays mean, scale, a, b: (..., C) -> (..., C)."""
    return ((gy - a - (x - mean) * b) * scale).astype(x.dtype, copy=False)


@batch_norm_grad.variant("numba")
def batch_norm_grad_numba(gy, x, mean, scale, a, b):
    """one pass, parallel over rows"""
    gx = np.empty(x.shape, x.dtype)
    _grad(as_rows(np.ascontiguousarray(gy)), as_rows(np.ascontiguousarray(x)), mean, scale, a, b, as_rows(gx))
    return gx


@njit(parallel=True, cache=True, fastmath={"contract"})
def _grad(gy, x, mean, scale, a, b, gx):
    for r in prange(x.shape[0]):
        for c in range(x.shape[1]):
            gx[r, c] = (gy[r, c] - a[c] - (x[r, c] - mean[c]) * b[c]) * scale[c]


@batch_norm_grad.work
def _(gy, x, mean, scale, a, b):
    return 5 * x.size, 3 * x.nbytes
