"""What follows a convolution or a GEMM while its result is still at hand: plus bias, plus residual, ReLU.

Fast variants do it before they store; the others call `epilogue` on the stored result.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .constant import derived
from .dispatch import Primitive, aside, plain_floats, xp_of
from .elementwise import as_rows
from .memory import contiguous


def finish(y, bias=None, residual=None, relu=False):
    """`epilogue` if there is something to do; returns `y`."""
    return y if bias is None and residual is None and not relu else epilogue(y, bias, residual, relu)


@Primitive(inplace=True)
def epilogue(y, bias=None, residual=None, relu=False):
    """relu?(y + bias + residual) written into `y` (..., C), which is returned; `bias` is (C,), `residual` like `y`."""
    if bias is not None:
        y += bias
    if residual is not None:
        y += residual
    if relu:
        xp_of(y).maximum(y, 0, out=y)
    return y


@epilogue.variant("numba", supports=lambda y, *rest, **named: y.flags.c_contiguous and plain_floats(y, *rest, **named))
def epilogue_numba(y, bias=None, residual=None, relu=False):
    """one pass, parallel over rows"""
    if bias is None:
        bias = np.zeros(y.shape[-1], y.dtype)
    rows, has_residual = as_rows(y), residual is not None
    _finish(rows, bias, as_rows(contiguous(residual)) if has_residual else rows, has_residual, relu)
    return y


@njit(parallel=True, cache=True)
def _finish(y, bias, residual, has_residual, relu):
    for r in prange(y.shape[0]):
        _finish_row(y[r], bias, residual[r], has_residual, relu)


@njit(cache=True)
def _finish_row(y, bias, residual, has_residual, relu):
    floor = y.dtype.type(0) if relu else y.dtype.type(-np.inf)
    for c in range(y.size):
        v = y[c] + bias[c]
        v = v + residual[c] if has_residual else v
        y[c] = floor if v < floor else v  # a NaN stays one: it compares as false


def padded_bias(bias, size, dtype):
    """`bias`, or zeros for None, followed by zeros up to `size` numbers: whole panels. Of a constant, made once."""
    if bias is None:
        return np.zeros(size, dtype)
    return derived(bias, ("padded", size), lambda: aside(_pad, bias, size, dtype))


def _pad(bias, size, dtype):
    out = np.zeros(size, dtype)
    out[: bias.size] = bias
    return out


@epilogue.work
def _(y, bias=None, residual=None, relu=False):
    return 3 * y.size, (3 if residual is not None else 2) * y.nbytes
