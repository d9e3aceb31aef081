"""Softmax, its logarithm, and the cross-entropy over it: rows of numbers that become probabilities.

The largest of a row is subtracted before the exponential, so that none overflows. NaN anywhere in a row is NaN in
everything that comes of the row.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, xp_of
from .elementwise import as_rows
from .half import in_float32
from .memory import contiguous, empty_like
from .vecmath import SUMS, exp


def _shifted(x):
    """x minus the largest of its row."""
    return x - x.max(axis=-1, keepdims=True) if x.size else x


@Primitive
@in_float32
def softmax(x):
    """(..., C) -> (..., C): exp(x) over its sum along the last axis."""
    e = xp_of(x).exp(_shifted(x))
    return e / e.sum(axis=-1, keepdims=True)


@softmax.variant("numba")
def softmax_numba(x):
    """parallel over rows, each in cache for its three passes; a vectorised exponential"""
    y = empty_like(x)
    _softmax(as_rows(contiguous(x)), as_rows(y))
    return y


@njit
def _larger(a, b):
    return a if a > b else b  # one instruction; if a is NaN it is b


@njit
def _largest(row):
    """The largest of a row, by four searches side by side, as no one of them can be put on vectors.

    It may miss NaN. None is lost: its exponential is NaN, whatever is subtracted.
    """
    m0 = m1 = m2 = m3 = row[0]
    whole = row.size - row.size % 4
    for c in range(0, whole, 4):
        m0, m1 = _larger(row[c], m0), _larger(row[c + 1], m1)
        m2, m3 = _larger(row[c + 2], m2), _larger(row[c + 3], m3)
    for c in range(whole, row.size):
        m0 = _larger(row[c], m0)
    return _larger(_larger(m0, m1), _larger(m2, m3))


@njit(fastmath=SUMS)
def _exponentials(row, m, out):
    """exp(row - m) into `out`, and their sum."""
    for c in range(row.size):
        out[c] = exp(row[c] - m)
    total = row.dtype.type(0)
    for c in range(row.size):
        total += out[c]
    return total


@njit(parallel=True, cache=True, error_model="numpy")
def _softmax(x, y):
    for r in prange(x.shape[0]):
        if x.shape[1] > 0:
            share = x.dtype.type(1) / _exponentials(x[r], _largest(x[r]), y[r])
            for c in range(x.shape[1]):
                y[r, c] *= share


@Primitive
@in_float32
def softmax_grad(gy, y):
    """y (gy - <gy, y>), row by row."""
    return y * (gy - (gy * y).sum(axis=-1, keepdims=True))


@softmax_grad.variant("numba")
def softmax_grad_numba(gy, y):
    """parallel over rows, each in cache for its two passes"""
    gx = empty_like(y)
    _softmax_grad(as_rows(contiguous(gy)), as_rows(contiguous(y)), as_rows(gx))
    return gx


@njit(parallel=True, cache=True, fastmath=SUMS)
def _softmax_grad(gy, y, gx):
    for r in prange(y.shape[0]):
        dot = y.dtype.type(0)
        for c in range(y.shape[1]):
            dot += gy[r, c] * y[r, c]
        for c in range(y.shape[1]):
            gx[r, c] = y[r, c] * (gy[r, c] - dot)


@Primitive
@in_float32
def log_softmax(x):
    """(..., C) -> (..., C): x minus the logarithm of the sum of exp(x) along the last axis."""
    if not x.size:
        return x.copy()
    xp, shifted = xp_of(x), _shifted(x)
    return shifted - xp.log(xp.exp(shifted).sum(axis=-1, keepdims=True))


@log_softmax.variant("numba")
def log_softmax_numba(x):
    """parallel over rows, each in cache for its three passes; a vectorised exponential"""
    y = empty_like(x)
    _log_softmax(as_rows(contiguous(x)), as_rows(y))
    return y


@njit(parallel=True, cache=True)
def _log_softmax(x, y):
    for r in prange(x.shape[0]):
        if x.shape[1] > 0:
            m = _largest(x[r])
            log_sum = x.dtype.type(math.log(_exponentials(x[r], m, y[r])))
            for c in range(x.shape[1]):
                y[r, c] = (x[r, c] - m) - log_sum


@Primitive
@in_float32
def log_softmax_grad(gy, y):
    """gy - exp(y) sum(gy), row by row."""
    return gy - xp_of(y).exp(y) * gy.sum(axis=-1, keepdims=True)


@log_softmax_grad.variant("numba")
def log_softmax_grad_numba(gy, y):
    """parallel over rows, each in cache for its two passes; a vectorised exponential"""
    gx = empty_like(y)
    _log_softmax_grad(as_rows(contiguous(gy)), as_rows(contiguous(y)), as_rows(gx))
    return gx


@njit(parallel=True, cache=True, fastmath=SUMS)
def _log_softmax_grad(gy, y, gx):
    for r in prange(y.shape[0]):
        total = y.dtype.type(0)
        for c in range(y.shape[1]):
            total += gy[r, c]
        for c in range(y.shape[1]):
            gx[r, c] = gy[r, c] - exp(y[r, c]) * total


# ------------------------------------------------------------------ cross-entropy


@Primitive
@in_float32(sums=(0, 1))
def cross_entropy(logits, labels, smoothing):
    """(N, C), int64 (N,) in [0, C) -> losses (N,); and (2, N) for backward: largest m, log(sum(exp(logits - m))).

    The loss of a row is -sum(t log_softmax(row)), the target t being 1 - smoothing at the label plus smoothing / C
    everywhere (Szegedy et al. 2016, section 7). m stays apart from the logarithm, which it would round away if large.
    """
    xp = xp_of(logits)
    n, c = logits.shape
    m = logits.max(axis=1)
    shifted = logits - m[:, None]
    log_sum = xp.log(xp.exp(shifted).sum(axis=1))
    loss = log_sum - (1 - smoothing) * shifted[xp.arange(n), labels]
    if smoothing:  # without it an infinite logit of another class is no concern of the loss
        loss = loss - smoothing / c * shifted.sum(axis=1)
    return loss, xp.stack([m, log_sum])


@cross_entropy.variant("numba")
def cross_entropy_numba(logits, labels, smoothing):
    """parallel over rows, nothing as large as the logits written"""
    loss, lse = np.empty(len(logits), logits.dtype), np.empty((2, len(logits)), logits.dtype)
    _cross_entropy(contiguous(logits), contiguous(labels), float(smoothing), loss, lse)
    return loss, lse


@njit(parallel=True, cache=True, fastmath=SUMS, error_model="numpy")
def _cross_entropy(logits, labels, smoothing, loss, lse):
    zero = logits.dtype.type(0)
    for r in prange(logits.shape[0]):
        row = logits[r]
        m = _largest(row)
        total, plain = zero, zero
        for c in range(row.size):
            total += exp(row[c] - m)
            plain += row[c] - m
        log_sum = math.log(total)
        if not 0 <= labels[r] < row.size:  # a captured step does not look at its labels before
            loss[r] = lse[0, r] = lse[1, r] = np.nan
            continue
        value = log_sum - (1 - smoothing) * (row[labels[r]] - m)
        if smoothing > 0:
            value -= smoothing / row.size * plain
        loss[r], lse[1, r] = value, log_sum
        lse[0, r] = m if log_sum == log_sum else log_sum  # NaN where the row has one, which m may have missed


@cross_entropy.work
def _(logits, labels, smoothing):
    return 10 * logits.size, logits.nbytes


@Primitive
@in_float32
def cross_entropy_grad(gy, logits, labels, lse, smoothing):
    """gy (N,) -> (N, C): gy (softmax(logits) - target), row by row."""
    xp = xp_of(logits)
    n, c = logits.shape
    g = xp.exp(logits - lse[0, :, None] - lse[1, :, None])
    if smoothing:
        g -= smoothing / c
    g[xp.arange(n), labels] -= 1 - smoothing
    return g * gy[:, None]


@cross_entropy_grad.variant("numba")
def cross_entropy_grad_numba(gy, logits, labels, lse, smoothing):
    """one pass, parallel over rows"""
    g = empty_like(logits)
    arrays = (contiguous(a) for a in (gy, logits, labels, lse))
    _cross_entropy_grad(*arrays, float(smoothing), g)
    return g


@njit(parallel=True, cache=True)
def _cross_entropy_grad(gy, logits, labels, lse, smoothing, g):
    one_hot = logits.dtype.type(1 - smoothing)
    for r in prange(logits.shape[0]):
        share = logits.dtype.type(smoothing / logits.shape[1])
        for c in range(logits.shape[1]):
            target = one_hot + share if c == labels[r] else share
            g[r, c] = (exp(logits[r, c] - lse[0, r] - lse[1, r]) - target) * gy[r]


@cross_entropy_grad.work
def _(gy, logits, labels, lse, smoothing):
    return 10 * logits.size, 2 * logits.nbytes


@Primitive
def cross_entropy_and_grad(logits, labels, scale, smoothing):
    """(N, C), int64 (N,) in [0, C), scale (1,) -> losses (N,); the gradient (N, C) of scale times their sum; and int32
    (1,), how many rows are largest at their label.

    All that a step asks of the logits, and nothing that the host must know: `scale`, the loss scale over the batch size
    say, is an array. Losses are of its dtype, float32 for float16 logits, in which everything is computed; the gradient
    is of theirs. Of equal numbers the first is the largest; a row whose loss is NaN is not right.
    """
    xp, wide = xp_of(logits), logits.astype(scale.dtype, copy=False)
    loss, lse = cross_entropy(wide, labels, smoothing)
    gx = cross_entropy_grad(xp.broadcast_to(scale, labels.shape), wide, labels, lse, smoothing)
    right = (logits.argmax(axis=1) == labels) & (loss == loss)
    return loss, gx.astype(logits.dtype, copy=False), right.sum(dtype=xp.int32, keepdims=True)


@cross_entropy_and_grad.work
def _(logits, labels, scale, smoothing):
    return 20 * logits.size, 2 * logits.nbytes


softmax.work(lambda x: (10 * x.size, 2 * x.nbytes))
log_softmax.work(lambda x: (10 * x.size, 2 * x.nbytes))
softmax_grad.work(lambda gy, y: (4 * y.size, 3 * y.nbytes))
log_softmax_grad.work(lambda gy, y: (10 * y.size, 3 * y.nbytes))
