"""im2col and col2im: receptive fields as the rows of a matrix, and their transpose.

With the columns in hand, a convolution is one GEMM. The price is memory: a 3x3 kernel writes each pixel nine times.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, xp_of
from .half import in_float32
from .memory import contiguous, empty
from .parallel_for import parallel_for


def output_size(size, kernel, stride, padding, dilation):
    """Positions of a window along one axis: floor((size + 2 padding - dilation (kernel - 1) - 1) / stride) + 1."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def output_shape(x_shape, kernel, stride, padding, dilation):
    """(N, H, W, C) -> (N, OH, OW) for pairs of kernel, stride, padding and dilation. Raises ValueError if none fits."""
    n, h, w, _ = x_shape
    oh = output_size(h, kernel[0], stride[0], padding[0], dilation[0])
    ow = output_size(w, kernel[1], stride[1], padding[1], dilation[1])
    if oh < 1 or ow < 1:
        reach = tuple(d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True))
        raise ValueError(
            f"a kernel that spans {reach} is larger than the padded image {h + 2 * padding[0], w + 2 * padding[1]}: "
            "use a smaller kernel, more padding or larger images"
        )
    return n, oh, ow


@Primitive
def im2col(x, kernel, stride, padding, dilation):
    """(N, H, W, C) -> (N*OH*OW, KH*KW*C): each row is one receptive field, ready for one 2-D GEMM."""
    xp = xp_of(x)
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, dilation)
    c = x.shape[3]
    cols = xp.empty((n, oh, ow, *kernel, c), x.dtype)
    padded = xp.pad(x, ((0, 0), (padding[0],) * 2, (padding[1],) * 2, (0, 0)))
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            cols[:, :, :, i, j] = padded[taps(i, j, oh, ow, stride, dilation)]
    return cols.reshape(n * oh * ow, kernel[0] * kernel[1] * c)


def taps(i, j, oh, ow, stride, dilation):
    """The pixels that position (i, j) of the kernel meets, as an index into the padded image."""
    top, left = i * dilation[0], j * dilation[1]
    rows = slice(top, top + stride[0] * (oh - 1) + 1, stride[0])
    return slice(None), rows, slice(left, left + stride[1] * (ow - 1) + 1, stride[1])


@im2col.variant("numba")
def im2col_numba(x, kernel, stride, padding, dilation):
    """no padded copy; one pass, parallel over output rows"""
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, dilation)
    cols = empty((n * oh * ow, kernel[0] * kernel[1] * x.shape[3]), x.dtype)
    im2col_into(cols, x, kernel, stride, padding, dilation)
    return cols


def im2col_into(cols, x, kernel, stride, padding, dilation):
    """The Numba variant, into `cols`: what the blocked convolution calls with one buffer for all blocks."""
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, dilation)
    _im2col(contiguous(x), cols.reshape(n, oh, ow, *kernel, x.shape[3]), *stride, *padding, *dilation)


@njit(cache=True)
def _im2col(x, cols, sh, sw, ph, pw, dh, dw):
    parallel_for(cols.shape[0] * cols.shape[1], _row, (x, cols, sh, sw, ph, pw, dh, dw))


@njit(cache=True)
def _row(row, x, cols, sh, sw, ph, pw, dh, dw):
    _, oh, ow, kh, kw, _ = cols.shape
    image, top = row // oh, row % oh * sh - ph
    for q in range(ow):
        for i in range(kh):
            for j in range(kw):
                _copy_pixel(x[image], top + i * dh, q * sw - pw + j * dw, cols[image, row % oh, q, i, j])


@njit(inline="always")
def _copy_pixel(image, r, s, out):
    if 0 <= r < image.shape[0] and 0 <= s < image.shape[1]:
        for c in range(out.size):
            out[c] = image[r, s, c]
    else:
        for c in range(out.size):
            out[c] = 0


@im2col.work
def _(x, kernel, stride, padding, dilation):
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, dilation)
    return 0, x.nbytes + n * oh * ow * kernel[0] * kernel[1] * x.shape[3] * x.itemsize


@Primitive
@in_float32
def col2im(cols, x_shape, kernel, stride, padding, dilation):
    """(N*OH*OW, KH*KW*C) -> (N, H, W, C): the transpose of im2col, each row added back to its receptive field."""
    xp = xp_of(cols)
    n, oh, ow = output_shape(x_shape, kernel, stride, padding, dilation)
    _, h, w, c = x_shape
    cols = cols.reshape(n, oh, ow, *kernel, c)
    padded = xp.zeros((n, h + 2 * padding[0], w + 2 * padding[1], c), cols.dtype)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            padded[taps(i, j, oh, ow, stride, dilation)] += cols[:, :, :, i, j]
    return xp.ascontiguousarray(padded[:, padding[0] : padding[0] + h, padding[1] : padding[1] + w])


@col2im.variant("numba")
def col2im_numba(cols, x_shape, kernel, stride, padding, dilation):
    """each pixel gathers what lands on it: one write a pixel, no races, parallel over image rows"""
    x = empty(x_shape, cols.dtype)
    col2im_into(x, cols, kernel, stride, padding, dilation)
    return x


def col2im_into(x, cols, kernel, stride, padding, dilation):
    """The Numba variant, into `x`."""
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, dilation)
    cols = contiguous(cols).reshape(n, oh, ow, *kernel, x.shape[3])
    _col2im(cols, x, *stride, *padding, *dilation)


@njit(parallel=True, cache=True)
def _col2im(cols, x, sh, sw, ph, pw, dh, dw):
    n, h, w, channels = x.shape
    _, oh, ow, kh, kw, _ = cols.shape
    for row in prange(n * h):  # LLVM optimises it more than once (parallel_for.py): 13 % faster here
        image, r = row // h, row % h
        for s in range(w):
            out = x[image, r, s]
            for c in range(channels):
                out[c] = 0
            for i in range(kh):
                p, off_row = divmod(r + ph - i * dh, sh)
                if off_row != 0 or p < 0 or p >= oh:
                    continue
                for j in range(kw):
                    q, off_column = divmod(s + pw - j * dw, sw)
                    if off_column == 0 and 0 <= q < ow:
                        _add_pixel(out, cols[image, p, q, i, j])


@njit(inline="always")
def _add_pixel(out, pixel):
    for c in range(out.size):
        out[c] += pixel[c]


@col2im.work
def _(cols, x_shape, kernel, stride, padding, dilation):
    return cols.size, cols.nbytes + int(np.prod(x_shape)) * cols.itemsize
