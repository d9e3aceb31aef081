"""Layer norm: each row by its own mean and deviation, so that a row is read from memory once and stays in cache."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, xp_of
from .elementwise import as_rows
from .half import in_float32
from .memory import contiguous, empty_like
from .rows import add_up
from .vecmath import SUMS

ROWS = 32  # rows whose share of the weights' gradients one thread adds up before it is put down


@Primitive
@in_float32(sums=(1, 2))
def layer_norm(x, weight, bias, eps):
    """(..., C), (C,), (C,) -> y, mean, rstd: y = (x - mean) rstd weight + bias, the last two (rows,) for backward."""
    rows = as_rows(x)
    mean = rows.mean(axis=1, keepdims=True)
    rstd = 1 / xp_of(x).sqrt(rows.var(axis=1, keepdims=True) + eps)
    y = (rows - mean) * rstd * weight + bias
    return y.reshape(x.shape), mean[:, 0], rstd[:, 0]


@layer_norm.variant("numba")
def layer_norm_numba(x, weight, bias, eps):
    """parallel over rows, each in cache for its three passes"""
    y = empty_like(x)
    rows = as_rows(contiguous(x))
    mean, rstd = np.empty(len(rows), x.dtype), np.empty(len(rows), x.dtype)
    _layer_norm(rows, weight, bias, eps, as_rows(y), mean, rstd)
    return y, mean, rstd


@njit(parallel=True, cache=True, fastmath=SUMS, error_model="numpy")
def _layer_norm(x, weight, bias, eps, y, mean, rstd):
    zero = x.dtype.type(0)
    for r in prange(x.shape[0]):
        row, out = x[r], y[r]
        total, squares = zero, zero
        for c in range(row.size):
            total += row[c]
        m = x.dtype.type(total / row.size)
        for c in range(row.size):
            squares += (row[c] - m) * (row[c] - m)
        s = x.dtype.type(1 / np.sqrt(squares / row.size + eps))
        for c in range(row.size):
            out[c] = (row[c] - m) * s * weight[c] + bias[c]
        mean[r], rstd[r] = m, s


@layer_norm.work
def _(x, weight, bias, eps):
    return 8 * x.size, 2 * x.nbytes


@Primitive
@in_float32(sums=(1, 2))
def layer_norm_grad(gy, x, mean, rstd, weight):
    """-> gx (..., C), gw (C,), gb (C,), from mean and rstd (rows,).

    With h = (x - mean) rstd and g = gy weight: gx = rstd (g - mean(g) - h mean(g h)), means taken over the row.
    """
    gy_rows = as_rows(gy)
    h = (as_rows(x) - mean[:, None]) * rstd[:, None]
    g = gy_rows * weight
    gx = rstd[:, None] * (g - g.mean(axis=1, keepdims=True) - h * (g * h).mean(axis=1, keepdims=True))
    gw, gb = (gy_rows * h).sum(axis=0, dtype=np.float64), gy_rows.sum(axis=0, dtype=np.float64)
    return gx.reshape(x.shape), gw.astype(weight.dtype), gb.astype(weight.dtype)


@layer_norm_grad.variant("numba")
def layer_norm_grad_numba(gy, x, mean, rstd, weight):
    """one pass over gy and x for all three gradients, parallel over blocks of rows that are summed in order"""
    gx = empty_like(x)
    gy, x = as_rows(contiguous(gy)), as_rows(contiguous(x))
    partial = np.empty((-(-len(x) // ROWS), 2, x.shape[1]), x.dtype)
    _layer_norm_grad(gy, x, mean, rstd, weight, as_rows(gx), partial)
    gw, gb = add_up(partial, np.empty(partial.shape[1:], x.dtype))
    return gx, gw, gb


@njit(parallel=True, cache=True, fastmath=SUMS, error_model="numpy")
def _layer_norm_grad(gy, x, mean, rstd, weight, gx, partial):
    one = x.dtype.type(1)
    for b in prange(partial.shape[0]):
        partial[b] = 0
        gw, gb = partial[b, 0], partial[b, 1]
        for r in range(b * ROWS, min(x.shape[0], (b + 1) * ROWS)):
            g_row, row, out, m, s = gy[r], x[r], gx[r], mean[r], rstd[r]
            sum_g, sum_gh = x.dtype.type(0), x.dtype.type(0)
            for c in range(row.size):
                h, g = (row[c] - m) * s, g_row[c] * weight[c]
                sum_g += g
                sum_gh += g * h
            share = one / x.dtype.type(row.size)
            sum_g, sum_gh = sum_g * share, sum_gh * share
            for c in range(row.size):
                h = (row[c] - m) * s
                out[c] = s * (g_row[c] * weight[c] - sum_g - h * sum_gh)
                gw[c] += g_row[c] * h
                gb[c] += g_row[c]


@layer_norm_grad.work
def _(gy, x, mean, rstd, weight):
    return 14 * x.size, 3 * x.nbytes
