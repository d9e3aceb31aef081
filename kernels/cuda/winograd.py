"""Winograd's convolution on a GPU, forward and to the gradient of the images, in fp32; the kernels are in winograd.cu.

The matrices are those of kernels/winograd.py: `header()` writes them for the compiler, and a test holds that
winograd_matrices.cuh is what it writes.

    python -c "from nanocnn.kernels.cuda.winograd import header; print(header(), end='')" > winograd_matrices.cuh
"""

from __future__ import annotations

from ..conv2d import conv2d, conv2d_grad_x
from ..conv2d_winograd import ONE, is_3x3
from ..im2col import output_shape
from ..winograd import F2, F4, MATRICES
from .conv2d import _fours, _fours_x
from .launch import Kernel, contiguous, empty, one_each
from .tunable import Tunable

WORKSPACE = 256 << 20  # bytes of planes at a time: large batches are taken in pieces
TRANSFORMS = Tunable(
    "four warps: a thread keeps a tile in up to 72 registers, and smaller blocks leave fewer of them unused",
    dict(threads=128),
    dict(threads=64),
    dict(threads=256),
)

PRODUCTS = Kernel("winograd.cu", "winograd_products")  # not tunable, as VECTORISED of conv2d.py is not
WEIGHTS, IMAGE, OUTPUT = (
    {F: Kernel("winograd.cu", f"winograd{F().outputs}_{step}") for F in (F2, F4)}
    for step in ("weights", "image", "output")
)


def header():
    """The text of winograd_matrices.cuh."""
    lines = [
        "// Written by header() of winograd.py from kernels/cook_toom.py: not to be changed by hand.",
        "#pragma once",
    ]
    for algorithm in (F2, F4):
        for name, matrix in MATRICES[algorithm]._asdict().items():
            rows = ", ".join("{" + ", ".join(f"{v!r}" for v in row) + "}" for row in matrix)
            lines += ["", f"#define {algorithm.__name__}_{name} \\", f"    {{ {rows} }}"]
    return "\n".join(lines) + "\n"


def _run(algorithm, x, w, y, first, bias=None, residual=None, relu=False):
    """y = the algorithm applied to x and w; `first` is the pixel of x where the first tile begins."""
    size, planes = algorithm().outputs, algorithm().planes ** 2
    (n, oh, ow, o), (_, height, width, c) = y.shape, x.shape
    x, w, bias, residual = (None if a is None else contiguous(a) for a in (x, w, bias, residual))
    down, across = -(-oh // size), -(-ow // size)
    u = empty(x, (planes, c, o))
    WEIGHTS[algorithm](*one_each(c * o, TRANSFORMS), w, u, c * o)
    step = max(1, WORKSPACE // (planes * down * across * (c + o) * x.itemsize))  # images
    for start in range(0, n, step):
        piece = slice(start, min(n, start + step))
        tiles = (piece.stop - start) * down * across
        v, m = empty(x, (planes, tiles, c)), empty(x, (planes, tiles, o))
        IMAGE[algorithm](
            *one_each(tiles * c, TRANSFORMS), x[piece], v, height, width, c, down, across, *first, tiles * c
        )
        grid = -(-o // PRODUCTS["WIDE"]), -(-tiles // PRODUCTS["TALL"]), planes
        PRODUCTS(grid, (128,), v, u, m, tiles, o, c)
        more = None if residual is None else residual[piece]
        sizes = oh, ow, o, down, across, bool(relu), tiles * o
        OUTPUT[algorithm](*one_each(tiles * o, TRANSFORMS), m, bias, more, y[piece], *sizes)
    return y


# ------------------------------------------------------------------ the variants
#
# None is automatic before it was measured on a GPU: the planes' traffic may cost more than the multiplications saved.


def _able(x, w, *geometry, **epilogue):
    return is_3x3(ONE, w.shape[:2], *geometry) and _fours(x, w, *geometry, **epilogue)


def _able_x(gy, w, x_shape, *geometry, **residual):
    return is_3x3(ONE, w.shape[:2], *geometry) and _fours_x(gy, w, x_shape, *geometry, **residual)


def _forward(algorithm, x, w, padding, epilogue):
    y = empty(x, (*output_shape(x.shape, (3, 3), ONE, padding, ONE), w.shape[3]))
    return _run(algorithm, x, w, y, (-padding[0], -padding[1]), **epilogue)


def _grad_x(algorithm, gy, w, x_shape, padding, residual):
    """The convolution of gy, padded by 2 - padding, with the weights turned by 180 degrees."""
    turned, first = w[::-1, ::-1].transpose(0, 1, 3, 2), (padding[0] - 2, padding[1] - 2)
    return _run(algorithm, gy, turned, empty(gy, x_shape), first, residual=residual)


@conv2d.variant("cuda_winograd2", device="cuda", supports=_able, auto=False)
def conv2d_cuda_winograd2(x, w, stride, padding, dilation, groups, **epilogue):
    """F(2x2, 3x3): 4 multiplications an output instead of 9, in 16 products of matrices"""
    return _forward(F2, x, w, padding, epilogue)


@conv2d.variant("cuda_winograd4", device="cuda", supports=_able, auto=False)
def conv2d_cuda_winograd4(x, w, stride, padding, dilation, groups, **epilogue):
    """F(4x4, 3x3): 2.25 multiplications an output instead of 9, in 36 products of matrices"""
    return _forward(F4, x, w, padding, epilogue)


@conv2d_grad_x.variant("cuda_winograd2", device="cuda", supports=_able_x, auto=False)
def conv2d_grad_x_cuda_winograd2(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """F(2x2, 3x3) with the weights turned"""
    return _grad_x(F2, gy, w, x_shape, padding, residual)


@conv2d_grad_x.variant("cuda_winograd4", device="cuda", supports=_able_x, auto=False)
def conv2d_grad_x_cuda_winograd4(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """F(4x4, 3x3) with the weights turned"""
    return _grad_x(F4, gy, w, x_shape, padding, residual)
