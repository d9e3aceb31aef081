"""Pooling in Numba CUDA, both ways by gathering: a thread computes one number, and nobody else writes it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from ..im2col import output_shape
from ..pool2d import ONE, avg_pool2d, avg_pool2d_grad, max_pool2d, max_pool2d_grad
from .launch import RUNG, empty, floats, jit, one_each

if TYPE_CHECKING:
    from numba import cuda

NOWHERE = 255  # the position that no pixel has


def _fits_a_byte(x, kernel, *args, **kwargs):
    return floats(x) and math.prod(kernel) <= NOWHERE


@max_pool2d.variant("numba_cuda", supports=_fits_a_byte, **RUNG)
def max_pool2d_numba_cuda(x, kernel, stride, padding, relu=False):
    """a thread for each window and channel, which keeps its largest in a register"""
    shape = *output_shape(x.shape, kernel, stride, padding, ONE), x.shape[3]
    y, position = empty(x, shape), empty(x, shape, np.uint8)
    _max_pool2d[one_each(y)](x, y, position, *kernel, *stride, *padding, bool(relu))
    return y, position


@jit
def _max_pool2d(x, y, position, kh, kw, sh, sw, ph, pw, relu):
    _, h, w, _ = x.shape
    _, oh, ow, c = y.shape
    i = cuda.grid(1)
    if i < y.size:
        place, channel = divmod(i, c)
        place, q = divmod(place, ow)
        n, p = divmod(place, oh)
        best, where, found = x.dtype.type(-math.inf), 0, False
        for k in range(kh * kw):
            r, s = p * sh - ph + k // kw, q * sw - pw + k % kw
            if 0 <= r < h and 0 <= s < w:
                v = x[n, r, s, channel]
                if not found or v > best or v != v:  # only NaN is not itself: it counts as larger than any number
                    best, where = v, k
                found = True
        if relu and best <= 0:
            best, where = x.dtype.type(0), NOWHERE
        y[n, p, q, channel] = best
        position[n, p, q, channel] = where


def _bytes(gy, position, x_shape, *window):
    return floats(gy) and math.prod(x_shape) > 0 and position.dtype == np.uint8 and position.shape == gy.shape


@max_pool2d_grad.variant("numba_cuda", supports=_bytes, **RUNG)
def max_pool2d_grad_numba_cuda(gy, position, x_shape, kernel, stride, padding):
    """a thread for each pixel and channel, which asks the windows over it: no zeros laid first, no atomics"""
    gx = empty(gy, x_shape)
    _max_pool2d_grad[one_each(gx)](gy, position, gx, *kernel, *stride, *padding)
    return gx


@jit
def _max_pool2d_grad(gy, position, gx, kh, kw, sh, sw, ph, pw):
    _, h, w, c = gx.shape
    _, oh, ow, _ = gy.shape
    i = cuda.grid(1)
    if i < gx.size:
        place, channel = divmod(i, c)
        place, s = divmod(place, w)
        n, r = divmod(place, h)
        total = gx.dtype.type(0)
        for k in range(kh * kw):  # the window, were this pixel at its position k
            p, row_between = divmod(r + ph - k // kw, sh)
            q, column_between = divmod(s + pw - k % kw, sw)
            meets = row_between == 0 and column_between == 0 and 0 <= p < oh and 0 <= q < ow
            if meets and position[n, p, q, channel] == k:
                total += gy[n, p, q, channel]
        gx[n, r, s, channel] = total


@avg_pool2d.variant("numba_cuda", supports=floats, **RUNG)
def avg_pool2d_numba_cuda(x, kernel, stride, padding):
    """a thread for each window and channel"""
    y = empty(x, (*output_shape(x.shape, kernel, stride, padding, ONE), x.shape[3]))
    _avg_pool2d[one_each(y)](x, y, *kernel, *stride, *padding)
    return y


@jit
def _avg_pool2d(x, y, kh, kw, sh, sw, ph, pw):
    _, h, w, _ = x.shape
    _, oh, ow, c = y.shape
    i = cuda.grid(1)
    if i < y.size:
        place, channel = divmod(i, c)
        place, q = divmod(place, ow)
        n, p = divmod(place, oh)
        total = x.dtype.type(0)
        for k in range(kh * kw):
            r, s = p * sh - ph + k // kw, q * sw - pw + k % kw
            if 0 <= r < h and 0 <= s < w:
                total += x[n, r, s, channel]
        y[n, p, q, channel] = total / x.dtype.type(kh * kw)


def _gradients(gy, x_shape, *window):
    return floats(gy) and math.prod(x_shape) > 0


@avg_pool2d_grad.variant("numba_cuda", supports=_gradients, **RUNG)
def avg_pool2d_grad_numba_cuda(gy, x_shape, kernel, stride, padding):
    """a thread for each pixel and channel, which asks the windows over it"""
    gx = empty(gy, x_shape)
    _avg_pool2d_grad[one_each(gx)](gy, gx, *kernel, *stride, *padding)
    return gx


@jit
def _avg_pool2d_grad(gy, gx, kh, kw, sh, sw, ph, pw):
    _, h, w, c = gx.shape
    _, oh, ow, _ = gy.shape
    i = cuda.grid(1)
    if i < gx.size:
        place, channel = divmod(i, c)
        place, s = divmod(place, w)
        n, r = divmod(place, h)
        total = gx.dtype.type(0)
        for k in range(kh * kw):
            p, row_between = divmod(r + ph - k // kw, sh)
            q, column_between = divmod(s + pw - k % kw, sw)
            if row_between == 0 and column_between == 0 and 0 <= p < oh and 0 <= q < ow:
                total += gy[n, p, q, channel]
        gx[n, r, s, channel] = total / gx.dtype.type(kh * kw)
