"""2-D convolution, as in cuDNN three primitives: forward, gradient of the images, gradient of the weights.

The ladder here: im2col and one GEMM (the reference) -> the same over blocks of images, so that the columns stay in
cache -> no columns at all where the kernel is 1x1. `x` is (N, H, W, C), `w` is (KH, KW, C/groups, O); stride, padding
and dilation are pairs (rows, columns).
"""

from __future__ import annotations

import operator

import numpy as np

from .constant import derived
from .dispatch import Primitive, aside, plain_floats, xp_of
from .elementwise import as_rows
from .epilogue import finish
from .im2col import col2im, col2im_into, im2col, im2col_into, output_shape
from .matmul import matmul
from .memory import clear, contiguous, empty, into

# ------------------------------------------------------------------ the reference: im2col, GEMM, col2im


@Primitive
def conv2d(x, w, stride, padding, dilation, groups, *, bias=None, residual=None, relu=False):
    """(N, H, W, C), (KH, KW, C/groups, O) -> (N, OH, OW, O), by im2col and one GEMM a group.

    Then, where given, plus `bias` (O,), plus `residual` (N, OH, OW, O), and max(y, 0): the epilogue.
    """
    n, oh, ow = output_shape(x.shape, w.shape[:2], stride, padding, dilation)
    out = xp_of(x).empty((n, oh, ow, w.shape[3]), x.dtype)
    for of_x, of_y in _groups(w, groups):
        cols = im2col(x[..., of_x], w.shape[:2], stride, padding, dilation)
        wg = as_rows(w[..., of_y])
        out[..., of_y] = matmul(cols, wg).reshape(n, oh, ow, wg.shape[1])
    return finish(out, bias, residual, relu)


@Primitive
def conv2d_grad_x(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """(N, OH, OW, O), (KH, KW, C/groups, O) -> (N, H, W, C): the columns' gradient by one GEMM, then col2im.

    Then, where given, plus `residual` (N, H, W, C): what has reached x on other ways.
    """
    gx = xp_of(gy).empty(x_shape, gy.dtype)
    for of_x, of_y in _groups(w, groups):
        cols = matmul(as_rows(gy[..., of_y]), as_rows(w[..., of_y]).T)
        gx[..., of_x] = col2im(cols, (*x_shape[:3], w.shape[2]), w.shape[:2], stride, padding, dilation)
    return finish(gx, residual=residual)


@Primitive(unkeyed=("out",))
def conv2d_grad_w(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """(N, OH, OW, O), (N, H, W, C) -> (KH, KW, C/groups, O): columns transposed times gy.

    The result is written to `out`, where given: C-contiguous, of that shape.
    """
    gw = xp_of(gy).empty(w_shape, gy.dtype) if out is None else out
    for of_x, of_y in _groups(gw, groups):
        cols = im2col(x[..., of_x], w_shape[:2], stride, padding, dilation)
        gw[..., of_y] = matmul(cols.T, as_rows(gy[..., of_y])).reshape(*w_shape[:3], w_shape[3] // groups)
    return gw


def _groups(w, groups):
    """For each group, its input channels and its output channels."""
    per_x, per_y = w.shape[2], w.shape[3] // groups
    return [(slice(g * per_x, (g + 1) * per_x), slice(g * per_y, (g + 1) * per_y)) for g in range(groups)]


# ------------------------------------------------------------------ blocked: the columns of a few images at a time

COLUMN_BYTES = 8 << 20  # of the columns held at once: a share of the L3 cache, yet a GEMM tall enough for every thread


def _one_group(*args, **epilogue):
    """For each of the three primitives, whose positional arguments all end in `groups`."""
    return args[-1] == 1 and plain_floats(*args, **epilogue)


def _blocks(n, rows, width, itemsize):
    """Slices of images whose columns, `rows` of `width` an image, take about COLUMN_BYTES."""
    step = max(1, COLUMN_BYTES // max(1, rows * width * itemsize))
    return [slice(i, min(n, i + step)) for i in range(0, n, step)]


@conv2d.variant("blocked", supports=_one_group)
def conv2d_blocked(x, w, stride, padding, dilation, groups, **epilogue):
    """Numba im2col into one reused buffer, a block of images at a time: columns are read back from cache"""
    kernel, width = w.shape[:2], w.shape[0] * w.shape[1] * w.shape[2]
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, dilation)
    y = empty((n, oh, ow, w.shape[3]), x.dtype)
    w = as_rows(w)
    for block in _blocks(n, oh * ow, width, x.itemsize):
        cols = empty(((block.stop - block.start) * oh * ow, width), x.dtype)
        im2col_into(cols, x[block], kernel, stride, padding, dilation)
        matmul(cols, w, out=y[block].reshape(len(cols), w.shape[1]))
    return finish(y, **epilogue)


@conv2d_grad_x.variant("blocked", supports=_one_group)
def conv2d_grad_x_blocked(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """the GEMM's columns go to one reused buffer and are gathered from there while still in cache"""
    kernel, width = w.shape[:2], w.shape[0] * w.shape[1] * w.shape[2]
    n, oh, ow, o = gy.shape
    gx = empty(x_shape, gy.dtype)
    gy, w = contiguous(gy), as_rows(w)
    for block in _blocks(n, oh * ow, width, gy.itemsize):
        cols = empty(((block.stop - block.start) * oh * ow, width), gy.dtype)
        matmul(gy[block].reshape(len(cols), o), w.T, out=cols)
        col2im_into(gx[block], cols, kernel, stride, padding, dilation)
    return finish(gx, residual=residual)


@conv2d_grad_w.variant("blocked", supports=_one_group)
def conv2d_grad_w_blocked(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """the sum over blocks of images of (columns transposed times gy)"""
    kernel, width = w_shape[:2], w_shape[0] * w_shape[1] * w_shape[2]
    n, oh, ow, o = gy.shape
    gy = contiguous(gy)
    gw, of_block = into(out, w_shape, gy.dtype), empty((width, o), gy.dtype)
    clear(gw)
    rows = gw.reshape(width, o)
    for block in _blocks(n, oh * ow, width, gy.itemsize):
        cols = empty(((block.stop - block.start) * oh * ow, width), gy.dtype)
        im2col_into(cols, x[block], kernel, stride, padding, dilation)
        aside(operator.iadd, rows, matmul(cols.T, as_rows(gy[block]), out=of_block))
    return gw


# ------------------------------------------------------------------ pointwise: a 1x1 convolution is a plain GEMM


def is_pointwise(kernel, stride, padding, groups):
    """Whether a convolution is a plain GEMM."""
    return tuple(kernel) == tuple(stride) == (1, 1) and tuple(padding) == (0, 0) and groups == 1


@conv2d.variant(
    "pointwise",
    supports=lambda x, w, s, p, d, g, **e: is_pointwise(w.shape[:2], s, p, g) and plain_floats(x, w, **e),
)
def conv2d_pointwise(x, w, stride, padding, dilation, groups, **epilogue):
    """1x1, stride 1: the image already is its columns"""
    matrix = derived(w, "matrix", lambda: w[0, 0])
    return finish(matmul(as_rows(x), matrix).reshape(*x.shape[:3], w.shape[3]), **epilogue)


@conv2d_grad_x.variant(
    "pointwise",
    supports=lambda gy, w, shape, s, p, d, g, **e: is_pointwise(w.shape[:2], s, p, g) and plain_floats(gy, w, **e),
)
def conv2d_grad_x_pointwise(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """1x1, stride 1: gy times the transposed weights"""
    return finish(matmul(as_rows(gy), w[0, 0].T).reshape(x_shape), residual=residual)


@conv2d_grad_w.variant(
    "pointwise",
    supports=lambda gy, x, shape, s, p, d, g, **out: is_pointwise(shape[:2], s, p, g) and plain_floats(gy, x, **out),
)
def conv2d_grad_w_pointwise(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """1x1, stride 1: the image transposed times gy"""
    gw = into(out, w_shape, gy.dtype)
    matmul(as_rows(x).T, as_rows(gy), out=gw[0, 0])
    return gw


# ------------------------------------------------------------------ what workers have summed up, each for itself


def add_up(u, gw):
    """The sums of the workers, u (workers, rows, O or more), into gw (..., O), C-contiguous."""
    aside(_add_up, u, gw)


def _add_up(u, gw):
    np.sum(u[..., : gw.shape[-1]], axis=0, out=gw.reshape(-1, gw.shape[-1]))


# ------------------------------------------------------------------ work: the same multiplications in each direction


def _work(gy_size, x_size, w_shape, itemsize):
    weights = w_shape[0] * w_shape[1] * w_shape[2] * w_shape[3]
    flops = 2.0 * gy_size * (weights // max(1, w_shape[3]))
    return flops, (gy_size + x_size + weights) * itemsize


@conv2d.work
def _(x, w, stride, padding, dilation, groups, **epilogue):
    n, oh, ow = output_shape(x.shape, w.shape[:2], stride, padding, dilation)
    return _work(n * oh * ow * w.shape[3], x.size, w.shape, x.itemsize)


@conv2d_grad_x.work
def _(gy, w, x_shape, stride, padding, dilation, groups, **epilogue):
    return _work(gy.size, int(np.prod(x_shape)), w.shape, gy.itemsize)


@conv2d_grad_w.work
def _(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    return _work(gy.size, x.size, w_shape, gy.itemsize)
