"""Functions of one element and their derivatives; adding a bias, and its gradient.

All are bound by memory, so each is one pass. A derivative takes whatever is cheapest to keep: ReLU's and the sigmoid's
take the output y, the others the input x.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit, prange, vectorize

from . import rows
from .dispatch import Primitive, device_of, plain_floats, xp_of
from .half import in_float32
from .memory import contiguous, empty_like
from .simd import load, select, store
from .vecmath import FMA, exp, normal_cdf


def _map(kernel, *arrays):
    """One output like the first array, filled by a flat loop: what every Numba variant here does."""
    out = empty_like(arrays[0])
    kernel(*(contiguous(a).reshape(-1) for a in arrays), out.reshape(-1))
    return out


# ------------------------------------------------------------------ ReLU


@Primitive
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return xp_of(x).maximum(x, 0)


@relu.variant("numba")
def relu_numba(x):
    """one parallel loop"""
    return _map(_relu, x)


@njit(parallel=True, cache=True)
def _relu(x, y):
    zero = x.dtype.type(0)
    for i in prange(x.size):
        v = x[i]
        y[i] = zero if v <= zero else v  # a select, not a branch; and NaN is not <= 0


@Primitive
def relu_grad(gy, y):
    """gy where y > 0. Takes the output, which the next layer keeps anyway."""
    return xp_of(gy).where(y <= 0, gy.dtype.type(0), gy)


@relu_grad.variant("numba")
def relu_grad_numba(gy, y):
    """one parallel loop"""
    return _map(_relu_grad, gy, y)


@njit(parallel=True, cache=True)
def _relu_grad(gy, y, gx):
    zero = y.dtype.type(0)
    for i in prange(y.size):
        g = gy[i]
        gx[i] = zero if y[i] <= zero else g


# ------------------------------------------------------------------ sigmoid and SiLU


@Primitive
@in_float32
def sigmoid(x):
    """1 / (1 + exp(-x)), written with exp(-|x|), which cannot overflow."""
    xp = xp_of(x)
    e = xp.exp(-abs(x))
    return xp.where(x < 0, e, 1) / (1 + e)


@sigmoid.variant("numba")
def sigmoid_numba(x):
    """one parallel loop, a vectorised exponential"""
    return _map(_sigmoid, x)


@njit(fastmath=FMA, error_model="numpy")  # Python's error model tests each divisor, which costs the vectors
def _sigmoid_of(x, one):  # `one` has x's dtype: a plain 1 would make float32 float64
    e = exp(-abs(x))
    return (e if x < 0 else one) / (one + e)


@njit(parallel=True, cache=True, fastmath=FMA)
def _sigmoid(x, y):
    one = x.dtype.type(1)
    for i in prange(x.size):
        y[i] = _sigmoid_of(x[i], one)


@Primitive
@in_float32
def sigmoid_grad(gy, y):
    """gy y (1 - y)."""
    return gy * y * (1 - y)


@sigmoid_grad.variant("numba")
def sigmoid_grad_numba(gy, y):
    """one parallel loop"""
    return _map(_sigmoid_grad, gy, y)


@njit(parallel=True, cache=True, fastmath=FMA)
def _sigmoid_grad(gy, y, gx):
    one = y.dtype.type(1)
    for i in prange(y.size):
        gx[i] = gy[i] * y[i] * (one - y[i])


@Primitive
@in_float32
def silu(x):
    """x sigmoid(x) (Elfwing et al. 2018; "swish")."""
    return x * sigmoid(x)


@silu.variant("numba")
def silu_numba(x):
    """one parallel loop, a vectorised exponential"""
    return _map(_silu, x)


@njit(parallel=True, cache=True, fastmath=FMA)
def _silu(x, y):
    one = x.dtype.type(1)
    for i in prange(x.size):
        y[i] = x[i] * _sigmoid_of(x[i], one)


@Primitive
@in_float32
def silu_grad(gy, x):
    """gy s (1 + x (1 - s)) with s = sigmoid(x)."""
    s = sigmoid(x)
    return gy * s * (1 + x * (1 - s))


@silu_grad.variant("numba")
def silu_grad_numba(gy, x):
    """one parallel loop, the sigmoid computed again"""
    return _map(_silu_grad, gy, x)


@njit(parallel=True, cache=True, fastmath=FMA)
def _silu_grad(gy, x, gx):
    one = x.dtype.type(1)
    for i in prange(x.size):
        s = _sigmoid_of(x[i], one)
        gx[i] = gy[i] * s * (one + x[i] * (one - s))


# ------------------------------------------------------------------ GELU


@vectorize(cache=True)
def _erf(x):  # NumPy has none
    return math.erf(x)


def _phi(x):
    """The normal distribution function, as PyTorch computes it: (1 + erf(x / sqrt 2)) / 2."""
    if device_of(x) != "cuda":
        erf = _erf
    else:
        from cupyx.scipy.special import erf
    return ((1 + erf(x * math.sqrt(0.5))) / 2).astype(x.dtype, copy=False)


@Primitive
@in_float32
def gelu(x):
    """x P(X <= x) for a standard normal X: the exact form (Hendrycks & Gimpel 2016), not the tanh one."""
    return x * _phi(x)


@gelu.variant("numba")
def gelu_numba(x):
    """one parallel loop, a vectorised exponential and a polynomial"""
    return _map(_gelu, x)


@njit(parallel=True, cache=True, fastmath=FMA)
def _gelu(x, y):
    minus_half = x.dtype.type(-0.5)
    for i in prange(x.size):
        v = x[i]
        y[i] = v * normal_cdf(v, exp(v * v * minus_half))


@Primitive
@in_float32
def gelu_grad(gy, x):
    """gy (P(X <= x) + x p(x)), p the normal density."""
    xp = xp_of(x)
    return gy * (_phi(x) + x * xp.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi)))


@gelu_grad.variant("numba")
def gelu_grad_numba(gy, x):
    """one parallel loop; distribution and density share one exponential"""
    return _map(_gelu_grad, gy, x)


@njit(parallel=True, cache=True, fastmath=FMA)
def _gelu_grad(gy, x, gx):
    minus_half, peak = x.dtype.type(-0.5), x.dtype.type(1 / math.sqrt(2 * math.pi))
    for i in prange(x.size):
        v = x[i]
        e = exp(v * v * minus_half)
        gx[i] = gy[i] * (normal_cdf(v, e) + v * e * peak)


# ------------------------------------------------------------------ bias


@Primitive(inplace=True)
def add_bias(x, b):
    """x += b over the last axis, in place: (..., C), (C,). What follows a matrix product into fresh memory."""
    x += b
    return x


@add_bias.variant("numba", supports=lambda x, b: plain_floats(x, b) and x.flags.c_contiguous)
def add_bias_numba(x, b):
    """parallel over rows"""
    _add_bias(as_rows(x), contiguous(b))
    return x


@njit(parallel=True, cache=True)
def _add_bias(x, b):
    for i in prange(x.shape[0]):
        row = x[i]
        for c in range(b.size):
            row[c] += b[c]


@Primitive
@in_float32
def bias_grad(gy):
    """(..., C) -> (C,): the sum over all other axes, added up in float64."""
    return as_rows(gy).sum(axis=0, dtype=np.float64).astype(gy.dtype)


@bias_grad.variant("numba")
def bias_grad_numba(gy):
    """one pass"""
    (gy,) = rows.rows_of(gy)
    return rows.run(_Sum(gy), *gy.shape, sums=1, dtype=gy.dtype)[0]


@Primitive
def relu_bias_grad(gy, y):
    """Back through y = relu(. + bias), (..., C): gy where y > 0, and the sum of that over all axes but the last."""
    gy = relu_grad(gy, y)
    return gy, bias_grad(gy)


@relu_bias_grad.variant("numba")
def relu_bias_grad_numba(gy, y):
    """one pass: what is stored is added up on the way"""
    masked = empty_like(y)
    gy, y, out = rows.rows_of(gy, y, masked)
    return masked, rows.run(_MaskedSum(gy, y, out), *gy.shape, sums=1, dtype=y.dtype)[0]


class _Sum(NamedTuple):
    gy: np.ndarray

    def step(self, i, c, count, sums):
        return (sums[0] + load(self.gy, i, count),)


class _MaskedSum(NamedTuple):
    gy: np.ndarray
    y: np.ndarray
    masked: np.ndarray

    def step(self, i, c, count, sums):
        gy = select(load(self.y, i, count) <= 0, 0, load(self.gy, i, count))
        store(self.masked, i, gy, count)
        return (sums[0] + gy,)


def as_rows(x):
    """(..., C) -> (M, C), also where a length is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


# ------------------------------------------------------------------ work


def _reads_one_writes_one(x):
    return 10 * x.size, 2 * x.nbytes


def _reads_two_writes_one(gy, x):
    return 10 * x.size, 3 * x.nbytes


for _primitive in (sigmoid, silu, gelu):
    _primitive.work(_reads_one_writes_one)
for _primitive in (sigmoid_grad, silu_grad, gelu_grad):
    _primitive.work(_reads_two_writes_one)
relu.work(lambda x: (x.size, 2 * x.nbytes))
relu_grad.work(lambda gy, y: (y.size, 3 * y.nbytes))
add_bias.work(lambda x, b: (x.size, 2 * x.nbytes))
bias_grad.work(lambda gy: (gy.size, gy.nbytes))
relu_bias_grad.work(lambda gy, y: (2 * y.size, 3 * y.nbytes))
