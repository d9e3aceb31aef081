"""Pooling of NHWC images, with the calculus of both directions.

The largest of each window is remembered as its position in the window, one byte an output. Backward gathers: each pixel
adds up what the windows that cover it send, so that it is written once, by one thread, without zeros being laid first.

The largest of ReLUs is the ReLU of the largest. So pooling does a ReLU before it for nothing: a window without a
positive pixel has its largest NOWHERE, and the backward pass, which looks for positions, finds none there.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, plain_floats, xp_of
from .half import in_float32
from .im2col import output_shape, taps
from .memory import contiguous, empty
from .vecmath import FMA

ONE = (1, 1)  # dilation


def _window(k, kernel, stride, oh, ow):
    """The pixels at position k of each window, as an index into the padded images."""
    return taps(*divmod(k, kernel[1]), oh, ow, stride, ONE)


def _padded(xp, x, padding, value):
    return xp.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)), constant_values=value)


def _position_dtype(kernel):
    return np.dtype(np.uint8 if math.prod(kernel) <= 255 else np.uint16)


def nowhere(dtype):
    """The position that no pixel has."""
    return np.iinfo(dtype).max


@Primitive
def max_pool2d(x, kernel, stride, padding, relu=False):
    """(N, H, W, C) -> y, positions, both (N, OH, OW, C): the largest of each window, and where in the window it is.

    Padding is -inf, NaN is larger than any number, and among equals the first counts, as in PyTorch. A position is
    row * KW + column in the window, uint8 (uint16 for windows of more than 255). Padding is at most half the kernel.
    With `relu`, y is max(y, 0), and where that is 0 the position is `nowhere`.
    """
    xp = xp_of(x)
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, ONE)
    padded = _padded(xp, x, padding, -math.inf)
    inside = _padded(xp, xp.ones((1, *x.shape[1:3], 1), bool), padding, False)
    y = xp.full((n, oh, ow, x.shape[3]), -math.inf, x.dtype)
    position = xp.zeros(y.shape, _position_dtype(kernel))
    found = xp.zeros((1, oh, ow, 1), bool)  # whether a window has met a pixel that is not padding
    for k in range(math.prod(kernel)):
        where = _window(k, kernel, stride, oh, ow)
        v = padded[where]
        better = (v > y) | (v != v) | (inside[where] & ~found)
        found |= inside[where]
        y = xp.where(better, v, y)
        position = xp.where(better, position.dtype.type(k), position)
    if relu:
        position = xp.where(y <= 0, position.dtype.type(nowhere(position.dtype)), position)
        y = xp.maximum(y, 0)
    return y, position


def _fits_a_byte(x, kernel, *_, **__):
    return plain_floats(x) and _position_dtype(kernel) == np.uint8


def _outputs(x, kernel, stride, padding):
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, ONE)
    return empty((n, oh, ow, x.shape[3]), x.dtype), empty((n, oh, ow, x.shape[3]), np.uint8)


@max_pool2d.variant("numba", supports=_fits_a_byte)
def max_pool2d_numba(x, kernel, stride, padding, relu=False):
    """no padded copy; parallel over rows of windows, channels side by side"""
    y, position = _outputs(x, kernel, stride, padding)
    _max_pool2d(contiguous(x), y, position, *kernel, *stride, *padding, relu)
    return y, position


@njit(parallel=True, cache=True)
def _max_pool2d(x, y, position, kh, kw, sh, sw, ph, pw, relu):
    _, h, w, _ = x.shape
    n, oh, ow, _ = y.shape
    for row in prange(n * oh):
        image, p = row // oh, row % oh
        i0, i1 = max(0, ph - p * sh), min(kh, h + ph - p * sh)  # the part of the window that is not padding
        for q in range(ow):
            j0, j1 = max(0, pw - q * sw), min(kw, w + pw - q * sw)
            top, left = p * sh - ph, q * sw - pw
            best, where = y[image, p, q], position[image, p, q]
            _first(x[image, top + i0, left + j0], i0 * kw + j0, best, where)
            for i in range(i0, i1):
                for j in range(j0, j1):
                    if i > i0 or j > j0:
                        _better(x[image, top + i, left + j], i * kw + j, best, where)
            if relu:
                _rectify(best, where)


@njit
def _first(pixel, k, best, where):
    for c in range(best.size):
        best[c] = pixel[c]
        where[c] = k


@njit
def _better(pixel, k, best, where):
    k = np.uint8(k)
    for c in range(best.size):
        v, b, before = pixel[c], best[c], where[c]
        better = (v > b) | (v != v)
        best[c] = v if better else b
        where[c] = k if better else before


@njit
def _rectify(best, where):
    zero, none = best.dtype.type(0), np.uint8(255)
    for c in range(best.size):
        b, k = best[c], where[c]
        best[c] = zero if b <= zero else b
        where[c] = none if b <= zero else k


def _two_by_two(x, kernel, stride, padding, *_, **__):
    return plain_floats(x) and tuple(kernel) == tuple(stride) == (2, 2) and tuple(padding) == (0, 0)


@max_pool2d.variant("numba_2x2", supports=_two_by_two)
def max_pool2d_2x2(x, kernel, stride, padding, relu=False):
    """2x2, stride 2: four pixels compared in registers, each read once and each output written once"""
    y, position = _outputs(x, kernel, stride, padding)
    _max_pool_2x2(contiguous(x), y, position, relu)
    return y, position


@njit(parallel=True, cache=True)
def _max_pool_2x2(x, y, position, relu):
    n, oh, ow, _ = y.shape
    for row in prange(n * oh):
        image, p = row // oh, row % oh
        top, bottom = x[image, 2 * p], x[image, 2 * p + 1]
        for q in range(ow):
            four = top[2 * q], top[2 * q + 1], bottom[2 * q], bottom[2 * q + 1]
            _largest_of_four(*four, relu, y[image, p, q], position[image, p, q])


@njit
def _largest_of_four(p0, p1, p2, p3, relu, best, where):
    zero = best.dtype.type(0)
    for c in range(best.size):
        v, k = p0[c], np.uint8(0)
        v, k = _larger(v, k, p1[c], np.uint8(1))
        v, k = _larger(v, k, p2[c], np.uint8(2))
        v, k = _larger(v, k, p3[c], np.uint8(3))
        drop = relu & (v <= zero)
        best[c] = zero if drop else v
        where[c] = np.uint8(255) if drop else k


@njit
def _larger(v, k, other, of_other):
    better = (other > v) | (other != other)
    return other if better else v, of_other if better else k


@max_pool2d.work
def _(x, kernel, stride, padding, relu=False):
    out = math.prod(output_shape(x.shape, kernel, stride, padding, ONE)) * x.shape[3]
    return out * math.prod(kernel), x.nbytes + out * (x.itemsize + 1)


@Primitive
@in_float32
def max_pool2d_grad(gy, position, x_shape, kernel, stride, padding):
    """(N, OH, OW, C), positions -> (N, H, W, C): each gradient goes where its window's largest was."""
    xp = xp_of(gy)
    n, h, w, c = x_shape
    _, oh, ow, _ = gy.shape
    gx = xp.zeros((n, h + 2 * padding[0], w + 2 * padding[1], c), gy.dtype)
    for k in range(math.prod(kernel)):
        gx[_window(k, kernel, stride, oh, ow)] += xp.where(position == k, gy, gy.dtype.type(0))
    return xp.ascontiguousarray(gx[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w])


@max_pool2d_grad.variant("numba", supports=lambda gy, position, x_shape, kernel, *_: _fits_a_byte(gy, kernel))
def max_pool2d_grad_numba(gy, position, x_shape, kernel, stride, padding):
    """each pixel gathers from the windows that cover it; parallel over rows of pixels"""
    gx = empty(x_shape, gy.dtype)
    _max_pool2d_grad(contiguous(gy), contiguous(position), gx, *kernel, *stride, *padding)
    return gx


@njit
def _windows_over(i, first, end, kernel, stride, count):
    """The windows [first, end) of `count` along an axis that cover padded pixel i, from those of an earlier pixel."""
    while end < count and end * stride <= i:
        end += 1
    while first < end and first * stride + kernel <= i:
        first += 1
    return first, end


@njit(parallel=True, cache=True)
def _max_pool2d_grad(gy, position, gx, kh, kw, sh, sw, ph, pw):
    n, h, w, _ = gx.shape
    _, oh, ow, _ = gy.shape
    for row in prange(n * h):
        image, i = row // h, row % h
        p0, p1 = _windows_over(i + ph, 0, 0, kh, sh, oh)
        q0, q1 = 0, 0
        for j in range(w):
            q0, q1 = _windows_over(j + pw, q0, q1, kw, sw, ow)
            out = gx[image, i, j]
            if p0 >= p1 or q0 >= q1:
                _fill(out, 0)
            for p in range(p0, p1):
                for q in range(q0, q1):
                    k = np.uint8((i + ph - p * sh) * kw + (j + pw - q * sw))
                    if p == p0 and q == q0:
                        _take(out, gy[image, p, q], position[image, p, q], k)
                    else:
                        _take_more(out, gy[image, p, q], position[image, p, q], k)


@njit
def _fill(out, value):
    for c in range(out.size):
        out[c] = value


@njit
def _take(out, g, position, k):
    zero = g.dtype.type(0)
    for c in range(out.size):
        v = g[c]
        out[c] = v if position[c] == k else zero


@njit
def _take_more(out, g, position, k):
    zero = g.dtype.type(0)
    for c in range(out.size):
        v = g[c]
        out[c] += v if position[c] == k else zero


@max_pool2d_grad.variant(
    "numba_2x2", supports=lambda gy, position, x_shape, *window: _two_by_two(gy, *window) and position.dtype == np.uint8
)
def max_pool2d_grad_2x2(gy, position, x_shape, kernel, stride, padding):
    """2x2, stride 2: windows do not overlap, so that each writes its four pixels"""
    gx = empty(x_shape, gy.dtype)
    _max_pool_2x2_grad(contiguous(gy), contiguous(position), gx)
    return gx


@njit(parallel=True, cache=True)
def _max_pool_2x2_grad(gy, position, gx):
    n, h, w, _ = gx.shape
    _, oh, ow, _ = gy.shape
    for row in prange(n * ((h + 1) // 2)):
        image, p = row // ((h + 1) // 2), row % ((h + 1) // 2)
        if p < oh:
            top, bottom = gx[image, 2 * p], gx[image, 2 * p + 1]
            for q in range(ow):
                four = top[2 * q], top[2 * q + 1], bottom[2 * q], bottom[2 * q + 1]
                _to_one_of_four(gy[image, p, q], position[image, p, q], *four)
        for i in range(2 * p, min(h, 2 * p + 2)):  # an odd row or column at the end is in no window
            for j in range(2 * ow if p < oh else 0, w):
                _fill(gx[image, i, j], 0)


@njit
def _to_one_of_four(g, position, p0, p1, p2, p3):
    zero = g.dtype.type(0)
    for c in range(g.size):
        v, k = g[c], position[c]
        p0[c] = v if k == 0 else zero
        p1[c] = v if k == 1 else zero
        p2[c] = v if k == 2 else zero
        p3[c] = v if k == 3 else zero


@max_pool2d_grad.work
def _(gy, position, x_shape, kernel, stride, padding):
    return gy.size * math.prod(kernel), gy.nbytes + position.nbytes + math.prod(x_shape) * gy.itemsize


@Primitive
@in_float32
def avg_pool2d(x, kernel, stride, padding):
    """(N, H, W, C) -> (N, OH, OW, C): the mean of each window, zeros of the padding counted as in PyTorch."""
    xp = xp_of(x)
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, ONE)
    padded = _padded(xp, x, padding, 0)
    y = xp.zeros((n, oh, ow, x.shape[3]), x.dtype)
    for k in range(math.prod(kernel)):
        y += padded[_window(k, kernel, stride, oh, ow)]
    y *= 1 / math.prod(kernel)
    return y


@avg_pool2d.variant("numba")
def avg_pool2d_numba(x, kernel, stride, padding):
    """no padded copy; parallel over rows of windows"""
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, ONE)
    y = empty((n, oh, ow, x.shape[3]), x.dtype)
    _avg_pool2d(contiguous(x), y, *kernel, *stride, *padding)
    return y


@njit(parallel=True, cache=True)
def _avg_pool2d(x, y, kh, kw, sh, sw, ph, pw):
    _, h, w, _ = x.shape
    n, oh, ow, _ = y.shape
    share = x.dtype.type(1 / (kh * kw))
    for row in prange(n * oh):
        image, p = row // oh, row % oh
        for q in range(ow):
            out = y[image, p, q]
            i0, j0 = max(0, p * sh - ph), max(0, q * sw - pw)
            _first_share(out, x[image, i0, j0], share)
            for i in range(i0, min(h, p * sh - ph + kh)):
                for j in range(j0, min(w, q * sw - pw + kw)):
                    if i > i0 or j > j0:
                        _add_share(out, x[image, i, j], share)


@njit
def _first_share(out, pixel, share):
    for c in range(out.size):
        out[c] = pixel[c] * share


@njit(fastmath=FMA)
def _add_share(out, pixel, share):
    for c in range(out.size):
        out[c] += pixel[c] * share


@avg_pool2d.work
def _(x, kernel, stride, padding):
    out = math.prod(output_shape(x.shape, kernel, stride, padding, ONE)) * x.shape[3]
    return out * math.prod(kernel), x.nbytes + out * x.itemsize


@Primitive
@in_float32
def avg_pool2d_grad(gy, x_shape, kernel, stride, padding):
    """(N, OH, OW, C) -> (N, H, W, C): each gradient is shared out evenly over its window."""
    xp = xp_of(gy)
    n, h, w, c = x_shape
    _, oh, ow, _ = gy.shape
    gx = xp.zeros((n, h + 2 * padding[0], w + 2 * padding[1], c), gy.dtype)
    share = gy * (1 / math.prod(kernel))
    for k in range(math.prod(kernel)):
        gx[_window(k, kernel, stride, oh, ow)] += share
    return xp.ascontiguousarray(gx[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w])


@avg_pool2d_grad.variant("numba")
def avg_pool2d_grad_numba(gy, x_shape, kernel, stride, padding):
    """each pixel gathers from the windows that cover it; parallel over rows of pixels"""
    gx = empty(x_shape, gy.dtype)
    _avg_pool2d_grad(contiguous(gy), gx, *kernel, *stride, *padding)
    return gx


@njit(parallel=True, cache=True)
def _avg_pool2d_grad(gy, gx, kh, kw, sh, sw, ph, pw):
    n, h, w, _ = gx.shape
    _, oh, ow, _ = gy.shape
    share = gy.dtype.type(1 / (kh * kw))
    for row in prange(n * h):
        image, i = row // h, row % h
        p0, p1 = _windows_over(i + ph, 0, 0, kh, sh, oh)
        q0, q1 = 0, 0
        for j in range(w):
            q0, q1 = _windows_over(j + pw, q0, q1, kw, sw, ow)
            out = gx[image, i, j]
            if p0 >= p1 or q0 >= q1:
                _fill(out, 0)
            for p in range(p0, p1):
                for q in range(q0, q1):
                    if p == p0 and q == q0:
                        _first_share(out, gy[image, p, q], share)
                    else:
                        _add_share(out, gy[image, p, q], share)


@avg_pool2d_grad.work
def _(gy, x_shape, kernel, stride, padding):
    return gy.size * math.prod(kernel), gy.nbytes + math.prod(x_shape) * gy.itemsize
