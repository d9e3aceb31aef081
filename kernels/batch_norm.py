"""Batch norm, with the residual and the ReLU that may follow it, in four passes: two forward, two backward.

Statistics, then one multiply-add an element, and the same backward. Each pass reads what it needs once. Between the
passes there is some calculus of (C,) numbers (functional/norm.py says why): nothing to compute, but each line of NumPy
costs 2 to 10 microseconds, more than the arithmetic of a whole image. So it is compiled, too.

ReLU's mask is kept nowhere. Backward finds it again from x, which it reads anyway: one multiply-add, where reading y
would be a third more traffic. With a residual in the sum y cannot be had from x; then the first pass backward reads y,
and writes the masked gradient, which the residual needs and from which the second pass goes on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit

from . import rows
from .dispatch import Primitive, xp_of
from .elementwise import as_rows, relu_grad
from .half import in_float32
from .memory import empty_like
from .narrow import sum_dtype
from .simd import fma, load, select, splat, store

# ------------------------------------------------------------------ forward


@Primitive
@in_float32(sums=(0, 1))
def batch_norm_stats(x):
    """(..., C) -> mean (C,), variance (C,): of each channel, the variance biased (divided by the number of rows)."""
    x = as_rows(x)
    mean = x.mean(axis=0, dtype=np.float64)
    var = xp_of(x).square(x - mean).mean(axis=0)
    return mean.astype(sum_dtype(x.dtype)), var.astype(sum_dtype(x.dtype))


@batch_norm_stats.variant("numba")
def batch_norm_stats_numba(x):
    """one pass: sums of x - k and of its square, k being the first row, so that a large mean cancels before squaring"""
    (x,) = rows.rows_of(x)
    mean, var = np.empty((2, x.shape[1]), x.dtype)
    _moments(x[0], rows.run(_Moments(x, x[0]), *x.shape, sums=2), len(x), mean, var)
    return mean, var


@njit(cache=True)
def _moments(k, totals, count, mean, var):
    for c in range(k.size):
        shifted = totals[0, c] / count
        mean[c] = k[c] + shifted
        var[c] = max(totals[1, c] / count - shifted * shifted, 0.0)


class _Moments(NamedTuple):
    x: np.ndarray
    k: np.ndarray

    def step(self, i, c, count, sums):
        d = load(self.x, i, count) - load(self.k, c, count)
        return sums[0] + d, fma(d, d, sums[1])


@batch_norm_stats.work
def _(x):
    return 4 * x.size, x.nbytes


@Primitive(inplace=True)
def batch_norm_running(running_mean, running_var, mean, var, momentum, rows):
    """running = (1 - momentum) running + momentum batch, in place: (C,); the variance unbiased, of `rows` rows."""
    running_mean += (momentum * (mean - running_mean)).astype(running_mean.dtype)
    running_var += (momentum * (var * (rows / (rows - 1)) - running_var)).astype(running_var.dtype)


@batch_norm_running.variant("numba")
def batch_norm_running_numba(running_mean, running_var, mean, var, momentum, rows):
    """one call"""
    _running(running_mean, running_var, mean, var, float(momentum), rows / (rows - 1))


@njit(cache=True)
def _running(running_mean, running_var, mean, var, momentum, unbiased):
    for c in range(mean.size):
        running_mean[c] += momentum * (mean[c] - running_mean[c])
        running_var[c] += momentum * (unbiased * var[c] - running_var[c])


@Primitive
def batch_norm_scale(var, weight, eps):
    """(C,) arrays -> rstd = 1 / sqrt(var + eps), and weight rstd."""
    rstd = 1 / xp_of(var).sqrt(var + eps)
    return rstd, weight * rstd


@batch_norm_scale.variant("numba")
def batch_norm_scale_numba(var, weight, eps):
    """one call"""
    rstd, scale = np.empty((2, var.size), var.dtype)
    _scale(var, weight, float(eps), rstd, scale)
    return rstd, scale


@njit(cache=True, error_model="numpy")
def _scale(var, weight, eps, rstd, scale):
    for c in range(var.size):
        rstd[c] = 1 / math.sqrt(var[c] + eps)
        scale[c] = weight[c] * rstd[c]


@Primitive
@in_float32
def batch_norm_apply(x, mean, scale, shift, residual=None, relu=False):
    """relu?((x - mean) scale + shift + residual): (..., C) -> (..., C), with (C,) arrays mean, scale, shift."""
    y = ((x - mean) * scale + shift).astype(x.dtype, copy=False)
    if residual is not None:
        y += residual
    return xp_of(y).maximum(y, 0) if relu else y


@batch_norm_apply.variant("numba")
def batch_norm_apply_numba(x, mean, scale, shift, residual=None, relu=False):
    """one pass"""
    y = empty_like(x)
    floor, adds = x.dtype.type(0 if relu else -np.inf), x.dtype.type(residual is not None)
    kind = _ApplyPast if rows.whole_and_past(y) else _Apply
    one_pass = kind(*rows.rows_of(x, mean, scale, shift, x if residual is None else residual, y), floor, adds)
    rows.run(one_pass, *one_pass.x.shape)
    return y


class _Apply(NamedTuple):
    x: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    shift: np.ndarray
    residual: np.ndarray  # x itself where there is none: it is in the cache already
    y: np.ndarray
    floor: float
    adds: float  # 1 with a residual, 0 without

    def write(self, i, v, count):
        store(self.y, i, v, count)

    def step(self, i, c, count, sums):
        d = load(self.x, i, count) - load(self.mean, c, count)
        y = fma(d, load(self.scale, c, count), load(self.shift, c, count))
        y = select(splat(self.adds, y) > 0, y + load(self.residual, i, count), y)
        self.write(i, select(y < self.floor, self.floor, y), count)  # a NaN stays one: it compares as false
        return ()


class _ApplyPast(_Apply):
    def write(self, i, v, count):
        rows.past(self.y, i, v, count)


@batch_norm_running.work
def _(running_mean, running_var, mean, var, momentum, rows):
    return 7 * mean.size, 6 * mean.nbytes


@batch_norm_scale.work
def _(var, weight, eps):
    return 4 * var.size, 4 * var.nbytes


@batch_norm_apply.work
def _(x, mean, scale, shift, residual=None, relu=False):
    return 3 * x.size, (3 if residual is not None else 2) * x.nbytes


# ------------------------------------------------------------------ backward


@Primitive
@in_float32(sums=(0, 1))
def batch_norm_grad_stats(gy, x, mean, scale=None, shift=None):
    """Two sums over the rows, (C,) each: of gy, and of gy (x - mean).

    Behind a ReLU `scale` and `shift` are given, and gy counts where (x - mean) scale + shift is not <= 0.
    """
    gy, x = as_rows(gy), as_rows(x)
    if shift is not None:
        gy = relu_grad(gy, batch_norm_apply(x, mean, scale, shift))
    sums = gy.sum(axis=0, dtype=np.float64), (gy * (x - mean)).sum(axis=0, dtype=np.float64)
    return tuple(s.astype(sum_dtype(x.dtype)) for s in sums)


@batch_norm_grad_stats.variant("numba")
def batch_norm_grad_stats_numba(gy, x, mean, scale=None, shift=None):
    """one pass over both arrays"""
    if shift is None:
        scale, shift = mean, _no_relu(mean)
    one_pass = _Products(*rows.rows_of(gy, x, mean, scale, shift))
    return tuple(rows.run(one_pass, *one_pass.x.shape, sums=2, dtype=x.dtype))


def _no_relu(like):
    """A shift after which nothing is negative, so that one kernel serves with ReLU and without."""
    return np.full(like.shape, np.inf, like.dtype)


class _Products(NamedTuple):
    gy: np.ndarray
    x: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    shift: np.ndarray

    def step(self, i, c, count, sums):
        d = load(self.x, i, count) - load(self.mean, c, count)
        y = fma(d, load(self.scale, c, count), load(self.shift, c, count))
        gy = select(y <= 0, 0, load(self.gy, i, count))
        return sums[0] + gy, fma(gy, d, sums[1])


@batch_norm_grad_stats.work
def _(gy, x, mean, scale=None, shift=None):
    return (4 if shift is None else 6) * x.size, 2 * x.nbytes


@Primitive
@in_float32(sums=(1, 2))
def batch_norm_residual_grad_stats(gy, y, x, mean):
    """gy where y > 0, which is the residual's gradient too, and its two sums: of it, and of it times (x - mean)."""
    gy = relu_grad(gy, y)
    return gy, *batch_norm_grad_stats(gy, x, mean)


@batch_norm_residual_grad_stats.variant("numba")
def batch_norm_residual_grad_stats_numba(gy, y, x, mean):
    """one pass over three arrays, writing a fourth"""
    masked = empty_like(x)
    kind = _MaskedProductsPast if rows.whole_and_past(masked) else _MaskedProducts
    one_pass = kind(*rows.rows_of(gy, y, x, mean, masked))
    return masked, *rows.run(one_pass, *one_pass.x.shape, sums=2, dtype=x.dtype)


class _MaskedProducts(NamedTuple):
    gy: np.ndarray
    y: np.ndarray
    x: np.ndarray
    mean: np.ndarray
    masked: np.ndarray

    def write(self, i, v, count):
        store(self.masked, i, v, count)

    def step(self, i, c, count, sums):
        d = load(self.x, i, count) - load(self.mean, c, count)
        gy = select(load(self.y, i, count) <= 0, 0, load(self.gy, i, count))
        self.write(i, gy, count)
        return sums[0] + gy, fma(gy, d, sums[1])


class _MaskedProductsPast(_MaskedProducts):
    def write(self, i, v, count):
        rows.past(self.masked, i, v, count)


@batch_norm_residual_grad_stats.work
def _(gy, y, x, mean):
    return 5 * x.size, 4 * x.nbytes


@Primitive
def batch_norm_shares(gb, products, rstd, rows):
    """(C,) sums of gy and of gy (x - mean) -> gw, and the a and b of `batch_norm_grad` for statistics of `rows` rows.

    gw = sum(gy h) with h = (x - mean) rstd; a = sum(gy) / rows; b = gw rstd / rows. `rows` is infinite where mean and
    variance were given, and not taken from x.
    """
    gw, share = products * rstd, 1 / max(1, rows)
    return gw, gb * share, gw * rstd * share


@batch_norm_shares.variant("numba")
def batch_norm_shares_numba(gb, products, rstd, rows):
    """one call"""
    gw, a, b = np.empty((3, gb.size), gb.dtype)
    _shares(gb, products, rstd, 1 / max(1, rows), gw, a, b)
    return gw, a, b


@njit(cache=True)
def _shares(gb, products, rstd, share, gw, a, b):
    for c in range(gb.size):
        gw[c] = products[c] * rstd[c]
        a[c] = gb[c] * share
        b[c] = gw[c] * rstd[c] * share


@Primitive
@in_float32
def batch_norm_grad(gy, x, mean, scale, a, b, shift=None):
    """(gy - a - (x - mean) b) scale, with (C,) arrays mean, scale, a, b: (..., C) -> (..., C).

    Behind a ReLU `shift` is given, and gy is 0 where (x - mean) scale + shift <= 0.
    """
    if shift is not None:
        gy = relu_grad(gy, batch_norm_apply(x, mean, scale, shift))
    return ((gy - a - (x - mean) * b) * scale).astype(x.dtype, copy=False)


@batch_norm_grad.variant("numba")
def batch_norm_grad_numba(gy, x, mean, scale, a, b, shift=None):
    """one pass"""
    gx = empty_like(x)
    kind = _GradPast if rows.whole_and_past(gx) else _Grad
    one_pass = kind(*rows.rows_of(gy, x, mean, scale, a, b, _no_relu(mean) if shift is None else shift, gx))
    rows.run(one_pass, *one_pass.x.shape)
    return gx


class _Grad(NamedTuple):
    gy: np.ndarray
    x: np.ndarray
    mean: np.ndarray
    scale: np.ndarray
    a: np.ndarray
    b: np.ndarray
    shift: np.ndarray
    gx: np.ndarray

    def write(self, i, v, count):
        store(self.gx, i, v, count)

    def step(self, i, c, count, sums):
        d, scale = load(self.x, i, count) - load(self.mean, c, count), load(self.scale, c, count)
        gy = select(fma(d, scale, load(self.shift, c, count)) <= 0, 0, load(self.gy, i, count))
        self.write(i, (gy - load(self.a, c, count) - d * load(self.b, c, count)) * scale, count)
        return ()


class _GradPast(_Grad):
    def write(self, i, v, count):
        rows.past(self.gx, i, v, count)


@batch_norm_shares.work
def _(gb, products, rstd, rows):
    return 4 * gb.size, 6 * gb.nbytes


@batch_norm_grad.work
def _(gy, x, mean, scale, a, b, shift=None):
    return (5 if shift is None else 7) * x.size, 3 * x.nbytes
