"""Functions of one element and the epilogue on a GPU, a thread for each number; and the gradients of biases.

The kernels are in elementwise.cu.
"""

from __future__ import annotations

from ..elementwise import (
    add_bias,
    bias_grad,
    gelu,
    gelu_grad,
    relu,
    relu_bias_grad,
    relu_grad,
    sigmoid,
    sigmoid_grad,
    silu,
    silu_grad,
)
from ..epilogue import epilogue
from .launch import Kernel, contiguous, empty, one_each, reals
from .reduce import ROWS, add_up, over_rows, partials
from .tunable import Tunable

RELU, RELU_GRAD, EPILOGUE, SIGMOID, SIGMOID_GRAD, SILU, SILU_GRAD, GELU, GELU_GRAD = (
    Kernel("elementwise.cu", name)
    for name in (
        "relu",
        "relu_grad",
        "epilogue",
        "sigmoid",
        "sigmoid_grad",
        "silu",
        "silu_grad",
        "gelu",
        "gelu_grad",
    )
)
BIAS_GRAD_NAIVE = Kernel("elementwise.cu", "bias_grad_naive")
BIAS_GRAD, RELU_BIAS_GRAD, ADD_UP = (
    Kernel("elementwise.cu", name, ROWS) for name in ("bias_grad", "relu_bias_grad", "add_up")
)
COLUMNS = Tunable(
    "one warp: columns are few and each is long, so blocks should be many", dict(threads=32), dict(threads=128)
)


def alike(*arrays):
    """Float arrays of one dtype and one shape."""
    return reals(*arrays) and all(a.shape == arrays[0].shape for a in arrays)


def _map(kernel, *arrays):
    """One output like the first array."""
    out = empty(arrays[0], arrays[0].shape)
    kernel(*one_each(out.size), *map(contiguous, arrays), out, out.size)
    return out


@relu.variant("cuda", device="cuda", supports=reals)
def relu_cuda(x):
    """a thread for each number"""
    return _map(RELU, x)


@relu_grad.variant("cuda", device="cuda", supports=alike)
def relu_grad_cuda(gy, y):
    """a thread for each number"""
    return _map(RELU_GRAD, gy, y)


@sigmoid.variant("cuda", device="cuda", supports=reals)
def sigmoid_cuda(x):
    """a thread for each number"""
    return _map(SIGMOID, x)


@sigmoid_grad.variant("cuda", device="cuda", supports=alike)
def sigmoid_grad_cuda(gy, y):
    """a thread for each number"""
    return _map(SIGMOID_GRAD, gy, y)


@silu.variant("cuda", device="cuda", supports=reals)
def silu_cuda(x):
    """a thread for each number"""
    return _map(SILU, x)


@silu_grad.variant("cuda", device="cuda", supports=alike)
def silu_grad_cuda(gy, x):
    """a thread for each number, the sigmoid computed again"""
    return _map(SILU_GRAD, gy, x)


@gelu.variant("cuda", device="cuda", supports=reals)
def gelu_cuda(x):
    """a thread for each number"""
    return _map(GELU, x)


@gelu_grad.variant("cuda", device="cuda", supports=alike)
def gelu_grad_cuda(gy, x):
    """a thread for each number"""
    return _map(GELU_GRAD, gy, x)


# ------------------------------------------------------------------ biases


def _in_place(y, bias=None, residual=None, relu=False):
    fits = (bias is None or bias.shape == y.shape[-1:]) and (residual is None or residual.shape == y.shape)
    return y.flags.c_contiguous and fits and reals(y, bias, residual)


@epilogue.variant("cuda", device="cuda", supports=_in_place)
def epilogue_cuda(y, bias=None, residual=None, relu=False):
    """one pass, a thread for each number"""
    given = (None if a is None else contiguous(a) for a in (bias, residual))
    EPILOGUE(*one_each(y.size), y, *given, relu, y.shape[-1], y.size)
    return y


@add_bias.variant("cuda", device="cuda", supports=_in_place)
def add_bias_cuda(x, b):
    """the kernel of the epilogue"""
    EPILOGUE(*one_each(x.size), x, contiguous(b), None, False, x.shape[-1], x.size)
    return x


@bias_grad.variant("cuda_naive", device="cuda", supports=reals, auto=False)
def bias_grad_cuda_naive(gy):
    """a thread for each column, from the first row to the last: whole sectors, but few threads that ask for any"""
    columns = gy.shape[-1]
    total = empty(gy, columns)
    BIAS_GRAD_NAIVE(*one_each(columns, COLUMNS), contiguous(gy), total, gy.size // columns, columns)
    return total


@bias_grad.variant("cuda", device="cuda", supports=reals)
def bias_grad_cuda(gy):
    """rows shared out to blocks, parts added up in a fixed order: the same bytes, asked for by the whole GPU"""
    columns = gy.shape[-1]
    rows = gy.size // columns
    grid, block, each = over_rows(rows, columns)
    partial = partials(gy, 1, grid, columns)
    BIAS_GRAD(grid, block, contiguous(gy), partial, rows, columns, each)
    return add_up(ADD_UP, partial, empty(gy, (1, columns)))[0]


@relu_bias_grad.variant("cuda", device="cuda", supports=alike)
def relu_bias_grad_cuda(gy, y):
    """one pass: what is stored is added up on the way"""
    columns = y.shape[-1]
    rows = y.size // columns
    grid, block, each = over_rows(rows, columns)
    gx, partial = empty(y, y.shape), partials(y, 1, grid, columns)
    RELU_BIAS_GRAD(grid, block, contiguous(gy), contiguous(y), gx, partial, rows, columns, each)
    return gx, add_up(ADD_UP, partial, empty(y, (1, columns)))[0]
