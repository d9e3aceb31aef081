"""Convolution and its gradients on a GPU without columns in memory: implicit GEMM, in fp32 and on tensor cores.

The reference there is im2col.cu and cuBLAS. `python -m nanocnn bench conv2d --device emulated` counts what each rung
asks of memory. The kernels are in conv2d.cu and conv2d_tensor.cu.
"""

from __future__ import annotations

import math

import numpy as np

from ..conv2d import conv2d, conv2d_grad_w, conv2d_grad_x
from ..epilogue import finish
from ..im2col import output_shape
from ..narrow import HALVES, sum_dtype
from .device import copies_asynchronously
from .im2col import BIGGEST, geometry
from .launch import MOST_Y, Kernel, aligned, contiguous, empty, is_aligned, one_each, reals
from .source import macros
from .tunable import Tunable

# ------------------------------------------------------------------ what the kernels can do


def _fits(x_shape, w_shape, y_shape, geometry_of, groups):
    """Whether sizes fit each other, there is something to do, and all counts are `int` in a kernel."""
    if len(x_shape) != 4 or len(w_shape) != 4 or not math.prod(x_shape) * math.prod(w_shape):
        return False
    if w_shape[2] * groups != x_shape[3] or w_shape[3] % groups or groups * math.prod(geometry_of[0]) > MOST_Y:
        return False
    windows = output_shape(x_shape, w_shape[:2], *geometry_of)
    return (*windows, w_shape[3]) == tuple(y_shape) and max(map(math.prod, (x_shape[:3], w_shape, windows))) < BIGGEST


def _forward(x, w, stride, padding, dilation, groups, *, bias=None, residual=None, relu=False):
    if not (x.ndim == w.ndim == 4 and reals(x, w, bias, residual) and x.dtype == w.dtype and x.size and w.size):
        return False
    shape = (*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3])
    ends = (bias is None or bias.shape == w.shape[3:]) and (residual is None or residual.shape == shape)
    return ends and _fits(x.shape, w.shape, shape, (stride, padding, dilation), groups)


def _backward_x(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    if not (reals(gy, w, residual) and gy.dtype == w.dtype and (residual is None or residual.shape == tuple(x_shape))):
        return False
    return _fits(x_shape, w.shape, gy.shape, (stride, padding, dilation), groups)


def _backward_w(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    if not (reals(gy, x) and gy.dtype == x.dtype):
        return False
    if out is not None and (out.dtype != x.dtype or out.shape != tuple(w_shape)):
        return False
    return _fits(x.shape, w_shape, gy.shape, (stride, padding, dilation), groups)


def _blocks(rows, columns, tile):
    """Tiles of a product of so many rows and columns: blocks along x, of which a grid may have 2**31."""
    return -(-rows // tile[0]) * -(-columns // tile[1])


# ------------------------------------------------------------------ forward

TILES = Tunable(
    "256 threads with 16 sums each; 64 columns, since networks for small images begin with 64 channels",
    macros("conv2d.cu", "BLOCK_M", "BLOCK_N", "BLOCK_K", "THREAD_M", "THREAD_N"),
    dict(BLOCK_K=8),
    dict(BLOCK_M=32, BLOCK_N=32, THREAD_M=2, THREAD_N=2),
    dict(BLOCK_M=128, BLOCK_K=8, THREAD_M=8),
)
NAIVE, IMPLICIT = Kernel("conv2d.cu", "conv2d_naive"), Kernel("conv2d.cu", "conv2d_implicit", TILES)
VECTORISED = Kernel("conv2d.cu", "conv2d_vectorised")  # not tunable: its 128 threads' loads are written for its tiles


def _tile(kernel):
    """Rows and columns of the product that a block computes."""
    return (kernel["TALL"], kernel["WIDE"]) if "vectorised" in kernel.name else (kernel["BLOCK_M"], kernel["BLOCK_N"])


def _sizes(x_shape, w_shape, stride, padding, dilation):
    """`geometry` with the number of output channels after the kernel's size, as all kernels here take it."""
    height, width, c, kh, kw, *rest = geometry(x_shape, w_shape[:2], stride, padding, dilation)
    return height, width, c, kh, kw, w_shape[3], *rest


def _end(bias, residual):
    """Of the epilogue, what a kernel adds: arrays or null pointers."""
    return [None if a is None else aligned(a) for a in (bias, residual)]


def _narrow(columns, groups):
    """Whether a group has too few columns for a tile: then what a tile shares is little, and most of it idle."""
    return groups > 1 and columns // groups < IMPLICIT["BLOCK_N"] // 4


def _naive_pays(x, w, stride, padding, dilation, groups, **epilogue):
    return _narrow(w.shape[3], groups)


@conv2d.variant("cuda_naive", device="cuda", supports=_forward, auto=_naive_pays)
def conv2d_cuda_naive(x, w, stride, padding, dilation, groups, *, bias=None, residual=None, relu=False):
    """a thread for each number of y, which reads its window and its weights itself: two loads a multiplication"""
    y = empty(x, (*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3]))
    given = contiguous(x), contiguous(w), *_end(bias, residual), y
    sizes = _sizes(x.shape, w.shape, stride, padding, dilation)
    NAIVE(*one_each(y.size), *given, *sizes, groups, relu, y.size)
    return y


def _fp32_pays(x, w, stride, padding, dilation, groups, **epilogue):
    """Not for halves, which cuBLAS gives to tensor cores."""
    return x.dtype not in HALVES and not _narrow(w.shape[3], groups)


def _tiles(x, w, *rest, **epilogue):
    """Depthwise, a tile would have one column of use."""
    return (w.shape[2] > 1 or rest[-1] == 1) and _forward(x, w, *rest, **epilogue)


@conv2d.variant("cuda_implicit", device="cuda", supports=_tiles, auto=_fp32_pays)
def conv2d_cuda_implicit(x, w, stride, padding, dilation, groups, *, bias=None, residual=None, relu=False):
    """tiles of columns that are never written: their loader finds the pixels; 4 x 4 sums in a thread's registers"""
    y = empty(x, (*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3]))
    m, o = math.prod(y.shape[:3]), w.shape[3]
    given = contiguous(x), contiguous(w), *_end(bias, residual), y
    sizes = _sizes(x.shape, w.shape, stride, padding, dilation)
    grid = _blocks(m, o // groups, _tile(IMPLICIT)), groups
    IMPLICIT(grid, (IMPLICIT["THREADS"],), *given, m, *sizes, groups, relu)
    return y


def _divides(vector, dtype, groups, *channels):
    """Whether one load of 16 bytes, `vector` numbers of that dtype, has channels of one pixel."""
    right = dtype == np.float32 if vector == 4 else dtype in HALVES
    return right and groups == 1 and all(c % vector == 0 for c in channels)


def _fours(x, w, *rest, **epilogue):
    return _divides(4, x.dtype, rest[-1], x.shape[-1], w.shape[-1]) and _forward(x, w, *rest, **epilogue)


def _run_vectorised(x, w, y, stride, padding, dilation, bias=None, residual=None, relu=False):
    """y (N, OH, OW, O), of any OH and OW: windows may lie outside of the image as far as they like."""
    m, (kh, kw, _, o) = math.prod(y.shape[:3]), w.shape
    sizes = *x.shape[1:], kh, kw, o, *y.shape[1:3], *stride, *padding, *dilation
    given = aligned(x), aligned(w), *_end(bias, residual), y
    VECTORISED((_blocks(m, o, _tile(VECTORISED)),), (128,), *given, m, *sizes, relu)


@conv2d.variant("cuda_vectorised", device="cuda", supports=_fours)
def conv2d_cuda_vectorised(x, w, stride, padding, dilation, groups, *, bias=None, residual=None, relu=False):
    """8 x 8 sums, four channels a load, and the next tiles on their way while these are used"""
    y = empty(x, (*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3]))
    _run_vectorised(x, w, y, stride, padding, dilation, bias, residual, relu)
    return y


# ------------------------------------------------------------------ the gradient of the images

GRAD_X_NAIVE = Kernel("conv2d.cu", "conv2d_grad_x_naive")
GRAD_X_IMPLICIT = Kernel("conv2d.cu", "conv2d_grad_x_implicit", TILES)


def _naive_pays_x(gy, w, x_shape, stride, padding, dilation, groups, **residual):
    return _narrow(x_shape[3], groups)


@conv2d_grad_x.variant("cuda_naive", device="cuda", supports=_backward_x, auto=_naive_pays_x)
def conv2d_grad_x_cuda_naive(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """a thread for each number of gx gathers gy times the weights from the windows that hold its pixel"""
    gx = empty(gy, x_shape)
    given = contiguous(gy), contiguous(w), *_end(None, residual)[1:], gx
    sizes = _sizes(x_shape, w.shape, stride, padding, dilation)
    GRAD_X_NAIVE(*one_each(gx.size), *given, *sizes, groups, gx.size)
    return gx


def _fp32_pays_x(gy, w, x_shape, stride, padding, dilation, groups, **residual):
    return gy.dtype not in HALVES and not _narrow(x_shape[3], groups)


def _tiles_x(gy, w, *rest, **residual):
    return (w.shape[2] > 1 or rest[-1] == 1) and _backward_x(gy, w, *rest, **residual)


@conv2d_grad_x.variant("cuda_implicit", device="cuda", supports=_tiles_x, auto=_fp32_pays_x)
def conv2d_grad_x_cuda_implicit(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """tiles of gy that the loader gathers, for the pixels of one phase of the stride at a time: no columns, no zeros"""
    gx = empty(gy, x_shape)
    n, height, width, _ = x_shape
    most = n * -(-height // stride[0]) * -(-width // stride[1])  # pixels of the first phase, which has the most
    grid = _blocks(most, w.shape[2], _tile(GRAD_X_IMPLICIT)), groups * math.prod(stride)
    given = contiguous(gy), contiguous(w), *_end(None, residual)[1:], gx
    sizes = _sizes(x_shape, w.shape, stride, padding, dilation)
    GRAD_X_IMPLICIT(grid, (GRAD_X_IMPLICIT["THREADS"],), *given, n, *sizes, groups)
    return gx


def _phase(phase, size, kernel, stride, padding, dilation):
    """Along one axis, the pixels phase, phase + stride, ...: how many, which taps meet them, and the padding with which
    these, turned around, are a convolution of gy to those pixels."""
    first = (phase + padding) % stride
    taps = slice(first, None, stride)
    count = len(range(first, kernel, stride))
    return -(-(size - phase) // stride), taps, dilation * (count - 1) - (phase + padding - first) // stride


def _by_turned_weights(run, gy, w, x_shape, stride, padding, dilation, residual):
    """gx by a kernel for the forward direction."""
    gx = empty(gy, x_shape)
    whole = tuple(stride) == (1, 1)
    for at in np.ndindex(*stride):
        axes = [_phase(at[i], x_shape[1 + i], w.shape[i], stride[i], padding[i], dilation[i]) for i in (0, 1)]
        size, taps, pad = zip(*axes, strict=True)
        turned = w[taps][::-1, ::-1].transpose(0, 1, 3, 2)
        of_phase = gx[:, at[0] :: stride[0], at[1] :: stride[1]]
        if not of_phase.size:
            continue
        if not turned.size:
            of_phase[...] = 0  # no window holds these pixels
            continue
        to = gx if whole else empty(gy, (x_shape[0], *size, x_shape[3]))
        run(gy, turned, to, (1, 1), pad, dilation, residual=residual if whole else None)
        if not whole:
            of_phase[...] = to
    return gx if whole else finish(gx, residual=residual)


def _turns(vector, gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """Of a stride and a dilation together, the taps of a phase need not lie evenly."""
    if not _divides(vector, gy.dtype, groups, *w.shape[-2:]) or max(stride) > 1 < max(dilation):
        return False
    return _backward_x(gy, w, x_shape, stride, padding, dilation, groups, residual=residual)


def _fours_x(*args, **residual):
    return _turns(4, *args, **residual)


@conv2d_grad_x.variant("cuda_vectorised", device="cuda", supports=_fours_x)
def conv2d_grad_x_cuda_vectorised(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """8 x 8 sums: the convolution of gy with the weights turned by 180 degrees; with a stride, one for each phase"""
    return _by_turned_weights(_run_vectorised, gy, w, x_shape, stride, padding, dilation, residual)


# ------------------------------------------------------------------ the gradient of the weights

GRAD_W_NAIVE, GRAD_W_VECTORISED = (Kernel("conv2d.cu", f"conv2d_grad_w_{name}") for name in ("naive", "vectorised"))
GRAD_W_IMPLICIT = Kernel("conv2d.cu", "conv2d_grad_w_implicit", TILES)
ADD_UP = Kernel("conv2d.cu", "add_up")
# blocks: so many, if the positions suffice; span: positions that a block sums up at least, before the parts are added
PARTS = Tunable(
    "a few blocks for each of a GPU's hundred multiprocessors, and parts long enough to be worth their sum",
    dict(blocks=512, span=256),
    dict(blocks=128),
    dict(blocks=2048),
    dict(span=64),
)


def _parts(m, blocks, deep):
    """Into how many parts m positions are cut where a part is `blocks` blocks, and how many positions, a multiple of
    `deep`, a part has."""
    parts = max(1, min(-(-PARTS["blocks"] // blocks), m // PARTS["span"]))
    span = -(-m // parts // deep) * deep
    return -(-m // span), span


def _result(out, like, w_shape):
    """`out` where a kernel can write to it, else new memory."""
    return out if out is not None and is_aligned(out) else empty(like, w_shape)


def _into(out, gw):
    """`gw`, in `out` where there is one."""
    if out is None or gw is out:
        return gw
    out[...] = gw
    return out


def _sum_up(kernel, grid, block, gy, x, w_shape, parts, span, rest, out, shared=0):
    """The parts by a kernel, `grid` blocks each along its last axis, and their sum; in `out` where there is one. Parts
    of halves are float32."""
    gw = _result(out, gy, w_shape)
    sums = gw if parts == 1 and gw.dtype == sum_dtype(gw.dtype) else empty(gy, (parts, *w_shape), sum_dtype(gw.dtype))
    kernel((*grid, parts), block, aligned(gy), aligned(x), sums, math.prod(gy.shape[:3]), span, *rest, shared=shared)
    if sums is not gw:
        ADD_UP(*one_each(gw.size), sums, gw, parts, gw.size)
    return _into(out, gw)


def _depthwise(gy, x, w_shape, *rest, **out):
    return w_shape[2] == 1 < rest[-1]


@conv2d_grad_w.variant("cuda_naive", device="cuda", supports=_backward_w, auto=_depthwise)
def conv2d_grad_w_cuda_naive(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """a thread for each weight and part of the positions; a second kernel adds the parts in a fixed order"""
    count = math.prod(w_shape)
    (blocks,), block = one_each(count)
    parts, span = _parts(math.prod(gy.shape[:3]), blocks, 1)
    rest = *_sizes(x.shape, w_shape, stride, padding, dilation), groups, count
    return _sum_up(GRAD_W_NAIVE, (blocks,), block, gy, x, w_shape, parts, span, rest, out)


def _tiles_w(gy, x, w_shape, *rest, **out):
    return not _depthwise(gy, x, w_shape, *rest) and _backward_w(gy, x, w_shape, *rest, **out)


@conv2d_grad_w.variant("cuda_implicit", device="cuda", supports=_tiles_w)
def conv2d_grad_w_cuda_implicit(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """tiles of transposed columns that are never written, and of gy; parts of the positions, as before"""
    blocks = _blocks(math.prod(w_shape[:3]), w_shape[3] // groups, _tile(GRAD_W_IMPLICIT))
    parts, span = _parts(math.prod(gy.shape[:3]), blocks * groups, GRAD_W_IMPLICIT["BLOCK_K"])
    rest = *_sizes(x.shape, w_shape, stride, padding, dilation), groups
    block = (GRAD_W_IMPLICIT["THREADS"],)
    return _sum_up(GRAD_W_IMPLICIT, (blocks, groups), block, gy, x, w_shape, parts, span, rest, out)


def _fours_w(gy, x, *rest, **out):
    return _divides(4, x.dtype, rest[-1], x.shape[-1], gy.shape[-1]) and _backward_w(gy, x, *rest, **out)


@conv2d_grad_w.variant("cuda_vectorised", device="cuda", supports=_fours_w)
def conv2d_grad_w_cuda_vectorised(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """8 x 8 sums, four channels a load and a store, and the next tiles on their way while these are used"""
    blocks = _blocks(math.prod(w_shape[:3]), w_shape[3], _tile(GRAD_W_VECTORISED))
    parts, span = _parts(math.prod(gy.shape[:3]), blocks, GRAD_W_VECTORISED["DEEP"])
    sizes = _sizes(x.shape, w_shape, stride, padding, dilation)
    return _sum_up(GRAD_W_VECTORISED, (blocks, 1), (128,), gy, x, w_shape, parts, span, sizes, out)


# ------------------------------------------------------------------ tensor cores: halves, in eights of channels

STAGES = Tunable(
    "three pairs of tiles: one that is used and two on their way",
    macros("conv2d_tensor.cu", "STAGES"),
    *(dict(STAGES=n) for n in (2, 4, 5)),
)
TENSOR, GRAD_W_TENSOR = (Kernel("conv2d_tensor.cu", f"conv2d_{name}tensor", STAGES) for name in ("", "grad_w_"))


def _eights(x, w, *rest, **epilogue):
    fits = _divides(8, x.dtype, rest[-1], x.shape[-1], w.shape[-1]) and _forward(x, w, *rest, **epilogue)
    return fits and copies_asynchronously(x)


def _run_tensor(x, w, y, stride, padding, dilation, bias=None, residual=None, relu=False):
    """y (N, OH, OW, O), of any OH and OW: windows may lie outside of the image as far as they like."""
    m, (kh, kw, _, o) = math.prod(y.shape[:3]), w.shape
    sizes = *x.shape[1:], kh, kw, o, *y.shape[1:3], *stride, *padding, *dilation
    given = aligned(x), aligned(w), *_end(bias, residual), y
    rows, columns, deep, stages = (TENSOR[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "STAGES"))
    shared = stages * (rows * TENSOR["PITCH_A"] + deep * TENSOR["PITCH_B"]) * x.itemsize
    grid, block = (_blocks(m, o, (rows, columns)),), (TENSOR["THREADS"],)
    TENSOR(grid, block, *given, m, *sizes, relu, shared=shared)


@conv2d.variant("cuda_tensor", device="cuda", supports=_eights)
def conv2d_cuda_tensor(x, w, stride, padding, dilation, groups, *, bias=None, residual=None, relu=False):
    """tensor cores (Ampere or later), halves, sums in fp32; asynchronous copies write zeros for pixels outside"""
    y = empty(x, (*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3]))
    _run_tensor(x, w, y, stride, padding, dilation, bias, residual, relu)
    return y


def _eights_x(*args, **residual):
    return copies_asynchronously(args[0]) and _turns(8, *args, **residual)


@conv2d_grad_x.variant("cuda_tensor", device="cuda", supports=_eights_x)
def conv2d_grad_x_cuda_tensor(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """tensor cores; with a stride, one convolution for each phase"""
    return _by_turned_weights(_run_tensor, gy, w, x_shape, stride, padding, dilation, residual)


def _eights_w(gy, x, *rest, **out):
    fits = _divides(8, x.dtype, rest[-1], x.shape[-1], gy.shape[-1]) and _backward_w(gy, x, *rest, **out)
    return fits and copies_asynchronously(x)


@conv2d_grad_w.variant("cuda_tensor", device="cuda", supports=_eights_w)
def conv2d_grad_w_cuda_tensor(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """tensor cores; blocks' sums stay fp32 until they are added up"""
    blocks, deep = _blocks(math.prod(w_shape[:3]), w_shape[3], _tile(GRAD_W_TENSOR)), GRAD_W_TENSOR["BLOCK_K"]
    parts, span = _parts(math.prod(gy.shape[:3]), blocks, deep)
    sizes = _sizes(x.shape, w_shape, stride, padding, dilation)
    shared = GRAD_W_TENSOR["STAGES"] * deep * (GRAD_W_TENSOR["PITCH_T"] + GRAD_W_TENSOR["PITCH_B"]) * x.itemsize
    block = (GRAD_W_TENSOR["THREADS"],)
    return _sum_up(GRAD_W_TENSOR, (blocks, 1), block, gy, x, w_shape, parts, span, sizes, out, shared)
