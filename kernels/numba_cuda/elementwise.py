"""Functions of one element in Numba CUDA: a thread for each number, as every GPU's first kernel has it."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from ..elementwise import add_bias, relu, relu_grad, sigmoid, sigmoid_grad
from .launch import RUNG, empty, floats, jit, one_each

if TYPE_CHECKING:  # at the first launch, by `jit`
    from numba import cuda


def _map(kernel, *arrays):
    """One output like the first array; the kernel sees rows of numbers, whatever the shape."""
    out = empty(arrays[0], arrays[0].shape)
    kernel[one_each(out)](*(a.reshape(-1) for a in arrays), out.reshape(-1))
    return out


def _alike(*arrays):
    return floats(*arrays) and all(a.shape == arrays[0].shape for a in arrays)


@relu.variant("numba_cuda", supports=floats, **RUNG)
def relu_numba_cuda(x):
    """a thread for each number"""
    return _map(_relu, x)


@jit
def _relu(x, y):
    i = cuda.grid(1)  # blockIdx.x * blockDim.x + threadIdx.x: my number among all threads
    if i < x.size:  # the last block has threads too many
        y[i] = x.dtype.type(0) if x[i] <= 0 else x[i]  # NaN is not <= 0, and stays


@relu_grad.variant("numba_cuda", supports=_alike, **RUNG)
def relu_grad_numba_cuda(gy, y):
    """a thread for each number"""
    return _map(_relu_grad, gy, y)


@jit
def _relu_grad(gy, y, gx):
    i = cuda.grid(1)
    if i < y.size:
        gx[i] = gy.dtype.type(0) if y[i] <= 0 else gy[i]


@sigmoid.variant("numba_cuda", supports=floats, **RUNG)
def sigmoid_numba_cuda(x):
    """a thread for each number"""
    return _map(_sigmoid, x)


@jit
def _sigmoid(x, y):
    i = cuda.grid(1)
    if i < x.size:
        one = x.dtype.type(1)  # a plain 1 would make float64 of float32, which most GPUs compute 32 times as slowly
        e = math.exp(-abs(x[i]))
        y[i] = (e if x[i] < 0 else one) / (one + e)


@sigmoid_grad.variant("numba_cuda", supports=_alike, **RUNG)
def sigmoid_grad_numba_cuda(gy, y):
    """a thread for each number"""
    return _map(_sigmoid_grad, gy, y)


@jit
def _sigmoid_grad(gy, y, gx):
    i = cuda.grid(1)
    if i < y.size:
        gx[i] = gy[i] * y[i] * (y.dtype.type(1) - y[i])


def _in_place(x, b):
    return x.flags.c_contiguous and floats(x, b) and b.shape == x.shape[-1:]


@add_bias.variant("numba_cuda", supports=_in_place, **RUNG)
def add_bias_numba_cuda(x, b):
    """a thread for each number, which finds its column by a division"""
    _add_bias[one_each(x)](x.reshape(-1), b)
    return x


@jit
def _add_bias(x, b):
    i = cuda.grid(1)
    if i < x.size:
        x[i] += b[i % b.size]
