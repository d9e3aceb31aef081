"""Pooling over NHWC images: the calculus; speed is a matter of kernels/pool2d.py."""

from __future__ import annotations

from functools import cache

import numpy as np

from ..kernels import pool2d as kernels
from ..kernels.dispatch import aside, device_of, to_device, xp_of
from ..kernels.half import cast
from ..kernels.matmul import matmul
from ..kernels.narrow import sum_dtype
from ..tensor import Op, Tensor
from .activation import relu as relu_of
from .basic import need_floats, reshape
from .fuse import fuse
from .geometry import Pair, pair

Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # kernel, stride, padding


class MaxPool2d(Op):
    def forward(self, x, *, window, relu):
        y, position = kernels.max_pool2d(x, *window, relu)
        self.save(position)
        self.shape, self.window = x.shape, window
        return y

    def backward(self, gy):
        return kernels.max_pool2d_grad(gy, *self.saved, self.shape, *self.window)


class AvgPool2d(Op):
    def forward(self, x, *, window):
        self.shape, self.window = x.shape, window
        return kernels.avg_pool2d(x, *window)

    def backward(self, gy):
        return kernels.avg_pool2d_grad(gy, self.shape, *self.window)


class AdaptiveAvgPool2d(Op):
    """Windows of unequal sizes: y = R x C with matrices R over rows and C over columns, whose rows are the windows."""

    def forward(self, x, *, output_size):
        self.matrices = [
            _averages(*sizes, sum_dtype(x.dtype), device_of(x)) for sizes in zip(x.shape[1:3], output_size, strict=True)
        ]
        return _between(x, *self.matrices)

    def backward(self, gy):
        return _between(gy, *(matrix.T for matrix in self.matrices))


@cache
def _averages(size, out, dtype, device):
    """(out, size): row i averages pixels floor(i size / out) to ceil((i + 1) size / out). Kept for good, on the device:
    while a step is recorded the host could not send it, and afterwards a graph reads it there."""
    matrix = np.zeros((out, size), dtype)
    for i in range(out):
        first, last = i * size // out, -(-(i + 1) * size // out)
        matrix[i, first:last] = 1 / (last - first)
    matrix.flags.writeable = False
    return to_device(matrix, device)


def _between(x, rows, columns):
    """sum over h, w of rows[p, h] x[n, h, w, c] columns[q, w] -> (n, p, q, c): twice one matrix times many"""
    n, h, w, c = x.shape
    p, q = len(rows), len(columns)
    x, dtype = x if x.flags.c_contiguous else aside(xp_of(x).ascontiguousarray, x), x.dtype
    wide = x if x.dtype == rows.dtype else aside(cast, x, rows.dtype)
    y = matmul(rows, wide.reshape(n, h, w * c)).reshape(n * p, w, c)
    y = matmul(columns, y).reshape(n, p, q, c)
    return y if y.dtype == dtype else aside(cast, y, dtype)


def _image(name: str, x: Tensor) -> None:
    if x.ndim != 4:
        raise ValueError(f"{name} of shape {x.shape}: expected images (N, H, W, C)")
    need_floats(name, x)


def _window(name: str, x: Tensor, kernel_size: Pair, stride: Pair | None, padding: Pair) -> Window:
    _image(name, x)
    kernel = pair("kernel_size", kernel_size, 1)
    window = kernel, kernel if stride is None else pair("stride", stride, 1), pair("padding", padding, 0)
    if any(2 * p > k for p, k in zip(window[2], kernel, strict=True)):
        raise ValueError(
            f"{name}: padding {window[2]} is more than half the kernel {kernel}, so that a window could lie in the "
            "padding alone: use less padding or a larger kernel"
        )
    return window


def max_pool2d(
    x: Tensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0, *, relu: bool = False
) -> Tensor:
    """(N, H, W, C) -> (N, OH, OW, C): the largest of each window, OH = (H + 2 padding - KH) // stride + 1.

    `stride` is the kernel's size unless given; padding counts as -inf. The gradient goes to the largest, the first of
    equals. With `relu` it is the pooling of max(x, 0). Raises ValueError if a kernel is larger than the padded image.
    """
    window = _window("max_pool2d", x, kernel_size, stride, padding)
    if relu and fuse.value == "off":
        return MaxPool2d.apply(relu_of(x), window=window, relu=False)
    return MaxPool2d.apply(x, window=window, relu=relu)


def avg_pool2d(x: Tensor, kernel_size: Pair, stride: Pair | None = None, padding: Pair = 0) -> Tensor:
    """(N, H, W, C) -> (N, OH, OW, C): the mean of each window, OH = (H + 2 padding - KH) // stride + 1.

    `stride` is the kernel's size unless given; the zeros of the padding are counted (PyTorch's count_include_pad=True).
    Raises ValueError if a kernel is larger than the padded image.
    """
    return AvgPool2d.apply(x, window=_window("avg_pool2d", x, kernel_size, stride, padding))


def adaptive_avg_pool2d(x: Tensor, output_size: Pair) -> Tensor:
    """(N, H, W, C) -> (N, *output_size, C): means over windows that cover the image, cut as PyTorch cuts them."""
    _image("adaptive_avg_pool2d", x)
    h, w = x.shape[1:3]
    oh, ow = pair("output_size", output_size, 1)
    if not h or not w:
        raise ValueError(f"adaptive_avg_pool2d of shape {x.shape}: expected images of at least one pixel")
    if h % oh or w % ow:
        return AdaptiveAvgPool2d.apply(x, output_size=(oh, ow))
    return avg_pool2d(x, (h // oh, w // ow))


def global_avg_pool2d(x: Tensor) -> Tensor:
    """(N, H, W, C) -> (N, C): the mean of each channel of each image."""
    return reshape(adaptive_avg_pool2d(x, 1), x.shape[0], x.shape[3])
