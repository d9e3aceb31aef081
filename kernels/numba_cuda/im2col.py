"""im2col and col2im in Numba CUDA: a thread for each number of the result, which finds out by divisions which it is."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..im2col import col2im, im2col, output_shape
from .launch import RUNG, empty, floats, jit, one_each

if TYPE_CHECKING:
    from numba import cuda


@im2col.variant("numba_cuda", supports=floats, **RUNG)
def im2col_numba_cuda(x, kernel, stride, padding, dilation):
    """a thread for each number of the columns, neighbours along channels; no padded copy"""
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, dilation)
    c = x.shape[3]
    cols = empty(x, (n, oh, ow, *kernel, c))
    _im2col[one_each(cols)](x, cols, *stride, *padding, *dilation)
    return cols.reshape(n * oh * ow, math.prod(kernel) * c)


@jit
def _im2col(x, cols, sh, sw, ph, pw, dh, dw):
    _, h, w, c = x.shape
    _, oh, ow, kh, kw, _ = cols.shape
    i = cuda.grid(1)
    if i < cols.size:
        place, channel = divmod(i, c)  # neighbours take neighbouring channels: what a warp reads are whole sectors
        place, b = divmod(place, kw)
        place, a = divmod(place, kh)
        place, q = divmod(place, ow)
        n, p = divmod(place, oh)
        r, s = p * sh - ph + a * dh, q * sw - pw + b * dw
        inside = 0 <= r < h and 0 <= s < w
        cols[n, p, q, a, b, channel] = x[n, r, s, channel] if inside else x.dtype.type(0)


def _columns(cols, x_shape, kernel, *geometry):
    fits = floats(cols) and len(x_shape) == 4
    return fits and cols.size == math.prod(output_shape(x_shape, kernel, *geometry)) * math.prod(kernel) * x_shape[3]


@col2im.variant("numba_cuda", supports=_columns, **RUNG)
def col2im_numba_cuda(cols, x_shape, kernel, stride, padding, dilation):
    """a thread for each number of x gathers what lands on it: one store, and no atomics"""
    x = empty(cols, x_shape)
    shape = *output_shape(x_shape, kernel, stride, padding, dilation), *kernel, x_shape[3]
    _col2im[one_each(x)](cols.reshape(shape), x, *stride, *padding, *dilation)
    return x


@jit
def _col2im(cols, x, sh, sw, ph, pw, dh, dw):
    _, h, w, c = x.shape
    _, oh, ow, kh, kw, _ = cols.shape
    i = cuda.grid(1)
    if i < x.size:
        place, channel = divmod(i, c)
        place, s = divmod(place, w)
        n, r = divmod(place, h)
        total = x.dtype.type(0)
        for a in range(kh):
            for b in range(kw):
                p, row_between = divmod(r + ph - a * dh, sh)  # no window begins between two strides
                q, column_between = divmod(s + pw - b * dw, sw)
                if row_between == 0 and column_between == 0 and 0 <= p < oh and 0 <= q < ow:
                    total += cols[n, p, q, a, b, channel]
        x[n, r, s, channel] = total
