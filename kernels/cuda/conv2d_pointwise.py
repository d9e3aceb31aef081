"""1x1 convolution of stride 1 on a GPU: a plain matrix product, whichever `matmul` chooses, and no kernel of its own.

"fastest" takes none of these rungs before they were measured on a GPU: with cuBLAS the product may be faster than that
of an implicit GEMM, but bias, residual and ReLU are one more pass over the result.
"""

from __future__ import annotations

from ..conv2d import conv2d, conv2d_grad_w, conv2d_grad_x, is_pointwise
from ..elementwise import as_rows
from ..epilogue import finish
from ..matmul import matmul
from .conv2d import _backward_w, _backward_x, _forward
from .launch import contiguous, empty


def _able(x, w, *geometry, **epilogue):
    return _is_pointwise(w.shape, *geometry) and _forward(x, w, *geometry, **epilogue)


def _able_x(gy, w, x_shape, *geometry, **residual):
    return _is_pointwise(w.shape, *geometry) and _backward_x(gy, w, x_shape, *geometry, **residual)


def _able_w(gy, x, w_shape, *geometry, **out):
    return _is_pointwise(w_shape, *geometry) and _backward_w(gy, x, w_shape, *geometry, **out)


def _is_pointwise(w_shape, stride, padding, dilation, groups):
    return is_pointwise(w_shape[:2], stride, padding, groups)


@conv2d.variant("cuda_pointwise", device="cuda", supports=_able, auto=False)
def conv2d_cuda_pointwise(x, w, stride, padding, dilation, groups, **epilogue):
    """1x1, stride 1: the image already is its columns, and cuBLAS multiplies them"""
    y = matmul(as_rows(contiguous(x)), contiguous(w[0, 0]))
    return finish(y.reshape(*x.shape[:3], w.shape[3]), **epilogue)


@conv2d_grad_x.variant("cuda_pointwise", device="cuda", supports=_able_x, auto=False)
def conv2d_grad_x_cuda_pointwise(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """1x1, stride 1: gy times the transposed weights"""
    return finish(matmul(as_rows(contiguous(gy)), w[0, 0].T).reshape(x_shape), residual=residual)


@conv2d_grad_w.variant("cuda_pointwise", device="cuda", supports=_able_w, auto=False)
def conv2d_grad_w_cuda_pointwise(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """1x1, stride 1: the image transposed times gy"""
    gw = empty(gy, w_shape) if out is None else out
    matmul(as_rows(contiguous(x)).T, as_rows(contiguous(gy)), out=gw[0, 0])
    return gw
