"""im2col and col2im on a GPU: they only move numbers; the kernels are in im2col.cu.

What the convolutions in conv2d.cu do without. They remain for the reference, which is the columns and cuBLAS.
"""

from __future__ import annotations

import math
from typing import Any

from ..dispatch import xp_of
from ..im2col import col2im, im2col, output_shape
from .launch import MOST_Y, Kernel, aligned, contiguous, empty, reals
from .tunable import Tunable

IM2COL, VECTORISED, ATOMIC, GATHER = (
    Kernel("im2col.cu", name) for name in ("im2col", "im2col_vectorised", "col2im_atomic", "col2im")
)
ALONG = Tunable(
    "8 warps along a row: what lies together is loaded together",
    dict(threads=256),
    *(dict(threads=n) for n in (64, 128, 512, 1024)),
)
BIGGEST = 2**31 - 2**10  # counts that are `int` in a kernel, and may be passed by part of a block


def geometry(x_shape: Any, kernel: Any, stride: Any, padding: Any, dilation: Any) -> tuple[int, ...]:
    """What the kernels take of a geometry, in their order."""
    _, oh, ow = output_shape(x_shape, kernel, stride, padding, dilation)
    return (*x_shape[1:], *kernel, oh, ow, *stride, *padding, *dilation)


def _fits(x_shape: Any, kernel: Any, *rest: Any) -> bool:
    """Whether there is something to do, and a grid has room for it."""
    if not math.prod(x_shape) * math.prod(kernel):
        return False
    n, oh, ow = output_shape(x_shape, kernel, *rest)
    along = max(ow * math.prod(kernel), x_shape[2]) * x_shape[3]
    return along <= MOST_Y * ALONG["threads"] and n * max(oh, x_shape[1]) < BIGGEST


def _images(x, kernel, stride, padding, dilation):
    return reals(x) and x.ndim == 4 and _fits(x.shape, kernel, stride, padding, dilation)


def _vectors(x, *rest):
    return _images(x, *rest) and x.shape[3] * x.itemsize % 16 == 0


def _columns(cols, x_shape, kernel, stride, padding, dilation):
    if not reals(cols) or len(x_shape) != 4 or not _fits(x_shape, kernel, stride, padding, dilation):
        return False
    n, oh, ow = output_shape(x_shape, kernel, stride, padding, dilation)
    return cols.size == n * oh * ow * math.prod(kernel) * x_shape[3]


def _rows(count: int, along: int) -> tuple[tuple[int, int], tuple[int]]:
    """Grid and block for so many rows of so many threads."""
    threads = ALONG["threads"]
    return (count, -(-along // threads)), (threads,)


def _im2col(kernel_of, vector, x, kernel, *rest):
    """The columns by a kernel whose threads take `vector` numbers each."""
    n, oh, ow = output_shape(x.shape, kernel, *rest)
    width = kernel[0] * kernel[1] * x.shape[3]
    cols = empty(x, (n * oh * ow, width))
    kernel_of(*_rows(n * oh, ow * width // vector), aligned(x), cols, *geometry(x.shape, kernel, *rest))
    return cols


@im2col.variant("cuda_numbers", device="cuda", supports=_images)
def im2col_cuda_numbers(x, kernel, stride, padding, dilation):
    """a thread for each number of the columns, neighbours along channels; no padded copy"""
    return _im2col(IM2COL, 1, x, kernel, stride, padding, dilation)


@im2col.variant("cuda_vectorised", device="cuda", supports=_vectors)
def im2col_cuda_vectorised(x, kernel, stride, padding, dilation):
    """a thread for each 16 bytes: a quarter of the requests, an eighth for halves"""
    return _im2col(VECTORISED, 16 // x.itemsize, x, kernel, stride, padding, dilation)


@col2im.variant(
    "cuda_atomic",
    device="cuda",
    supports=lambda cols, *rest: cols.dtype.itemsize > 2 and _columns(cols, *rest),  # halves would add up as halves
    auto=False,
)
def col2im_cuda_atomic(cols, x_shape, kernel, stride, padding, dilation):
    """a thread for each number of the columns adds it to its pixel: atomically, in an order that is chance"""
    n, oh, ow = output_shape(x_shape, kernel, stride, padding, dilation)
    x = xp_of(cols).zeros(x_shape, cols.dtype)
    along = ow * kernel[0] * kernel[1] * x_shape[3]
    ATOMIC(*_rows(n * oh, along), contiguous(cols), x, *geometry(x_shape, kernel, stride, padding, dilation))
    return x


@col2im.variant("cuda", device="cuda", supports=_columns)
def col2im_cuda(cols, x_shape, kernel, stride, padding, dilation):
    """a thread for each number of x gathers what lands on it: one store, and the same sums at each call"""
    n, h, w, c = x_shape
    x = empty(cols, x_shape)
    GATHER(*_rows(n * h, w * c), contiguous(cols), x, *geometry(x_shape, kernel, stride, padding, dilation))
    return x
