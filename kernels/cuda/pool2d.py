"""Pooling on a GPU: each number gathers what it is made of; the kernels are in pool2d.cu."""

from __future__ import annotations

import math

import numpy as np

from ..im2col import output_shape
from ..pool2d import avg_pool2d, avg_pool2d_grad, max_pool2d, max_pool2d_grad
from .launch import MOST_Y, Kernel, contiguous, empty, reals
from .tunable import Tunable

ALONG = Tunable(
    "8 warps, or fewer where a row of the result has not so many numbers",
    dict(threads=256),
    *(dict(threads=n) for n in (64, 128, 512, 1024)),
)

MAX_POOL2D, MAX_POOL2D_GRAD, AVG_POOL2D, AVG_POOL2D_GRAD = (
    Kernel("pool2d.cu", name) for name in ("max_pool2d", "max_pool2d_grad", "avg_pool2d", "avg_pool2d_grad")
)


def _by_rows(shape):
    """Grid and block for the numbers of (N, H, W, C): a row of the images to blocks of their own."""
    n, h, w, c = shape
    threads = min(ALONG["threads"], -(-w * c // 32) * 32)
    return (n * h, -(-w * c // threads)), (threads,)


def _images(x, *args, **kwargs):
    row = (x.shape[2] + 1) * x.shape[3]  # with padding, a row of windows may have one more
    return reals(x) and row <= MOST_Y * ALONG["threads"]  # blocks along a grid's second side


def _fits_a_byte(x, kernel, *args, **kwargs):
    return _images(x) and math.prod(kernel) <= 255


@max_pool2d.variant("cuda", device="cuda", supports=_fits_a_byte)
def max_pool2d_cuda(x, kernel, stride, padding, relu=False):
    """a thread for each window and channel, which keeps its largest in a register: no padded copy"""
    _, h, w, c = x.shape
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, (1, 1))
    y, position = empty(x, (n, oh, ow, c)), empty(x, (n, oh, ow, c), np.uint8)
    window = (*kernel, *stride, *padding)
    MAX_POOL2D(*_by_rows(y.shape), contiguous(x), y, position, h, w, c, oh, ow, *window, bool(relu))
    return y, position


def _gradients(gy, x_shape, *args, **kwargs):
    return reals(gy) and math.prod(x_shape) > 0 and x_shape[2] * x_shape[3] <= MOST_Y * ALONG["threads"]


def _gradients_of_bytes(gy, position, x_shape, *args, **kwargs):
    return position.dtype == np.uint8 and position.shape == gy.shape and _gradients(gy, x_shape)


@max_pool2d_grad.variant("cuda", device="cuda", supports=_gradients_of_bytes)
def max_pool2d_grad_cuda(gy, position, x_shape, kernel, stride, padding):
    """a thread for each pixel and channel, which gathers from the windows over it: no zeros laid first, no atomics"""
    _, h, w, c = x_shape
    gx = empty(gy, x_shape)
    window = (*gy.shape[1:3], *kernel, *stride, *padding)
    MAX_POOL2D_GRAD(*_by_rows(x_shape), contiguous(gy), contiguous(position), gx, h, w, c, *window)
    return gx


@avg_pool2d.variant("cuda", device="cuda", supports=_images)
def avg_pool2d_cuda(x, kernel, stride, padding):
    """a thread for each window and channel: no padded copy"""
    _, h, w, c = x.shape
    n, oh, ow = output_shape(x.shape, kernel, stride, padding, (1, 1))
    y = empty(x, (n, oh, ow, c))
    AVG_POOL2D(*_by_rows(y.shape), contiguous(x), y, h, w, c, oh, ow, *kernel, *stride, *padding)
    return y


@avg_pool2d_grad.variant("cuda", device="cuda", supports=_gradients)
def avg_pool2d_grad_cuda(gy, x_shape, kernel, stride, padding):
    """a thread for each pixel and channel, which gathers from the windows over it"""
    _, h, w, c = x_shape
    gx = empty(gy, x_shape)
    window = (*gy.shape[1:3], *kernel, *stride, *padding)
    AVG_POOL2D_GRAD(*_by_rows(x_shape), contiguous(gy), gx, h, w, c, *window)
    return gx
