"""Convolution as the textbook defines it: seven loops, and a bounds check where the kernel overlaps the border.

Each multiplication reads one pixel and one weight from memory and adds to one sum; nothing stays in a register for the
next one but the sum. Consecutive channels of a weight lie O numbers apart, so each step of the innermost loop touches
another cache line, and no vector instruction can load two of them at once. The arithmetic is that of every rung up to
Winograd: two operations a weight and output. This rung shows what all the others compute, and how slow that is if one
leaves it at that; "fastest" never takes it.

At tap (i, j) of the kernel, position (p, q) of the output meets pixel (p stride - padding + i dilation, q stride -
padding + j dilation). Output channel o belongs to group o // (O / groups) and sees its C / groups input channels.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from .conv2d import conv2d, conv2d_grad_w, conv2d_grad_x
from .epilogue import finish
from .im2col import output_shape
from .memory import contiguous, into
from .parallel_for import parallel_for


@njit(cache=True)
def _forward(x, w, y, stride, padding, dilation, outputs):
    """Images side by side; `outputs` is the number of output channels that a group has."""
    parallel_for(y.shape[0], _image, (x, w, y, stride, padding, dilation, outputs))


@njit(cache=True)
def _image(n, x, w, y, stride, padding, dilation, outputs):
    """y[n, p, q, o] is the sum over i, j, c of x[n, r, s, c] w[i, j, c, o]."""
    for p in range(y.shape[1]):
        for q in range(y.shape[2]):
            for o in range(y.shape[3]):
                first = o // outputs * w.shape[2]
                total = y.dtype.type(0)
                for i in range(w.shape[0]):
                    for j in range(w.shape[1]):
                        r = p * stride[0] - padding[0] + i * dilation[0]
                        s = q * stride[1] - padding[1] + j * dilation[1]
                        if 0 <= r < x.shape[1] and 0 <= s < x.shape[2]:
                            for c in range(w.shape[2]):
                                total += x[n, r, s, first + c] * w[i, j, c, o]
                y[n, p, q, o] = total


@njit(cache=True)
def _grad_x(gy, w, gx, stride, padding, dilation, outputs):
    parallel_for(gy.shape[0], _image_back, (gy, w, gx, stride, padding, dilation, outputs))


@njit(cache=True)
def _image_back(n, gy, w, gx, stride, padding, dilation, outputs):
    """What x[n, r, s, c] was multiplied with: each gy goes back to the pixels that it came from."""
    for p in range(gy.shape[1]):
        for q in range(gy.shape[2]):
            for o in range(gy.shape[3]):
                first = o // outputs * w.shape[2]
                for i in range(w.shape[0]):
                    for j in range(w.shape[1]):
                        r = p * stride[0] - padding[0] + i * dilation[0]
                        s = q * stride[1] - padding[1] + j * dilation[1]
                        if 0 <= r < gx.shape[1] and 0 <= s < gx.shape[2]:
                            for c in range(w.shape[2]):
                                gx[n, r, s, first + c] += gy[n, p, q, o] * w[i, j, c, o]


@njit(cache=True)
def _grad_w(gy, x, gw, stride, padding, dilation, outputs):
    parallel_for(gw.shape[3], _output_channel, (gy, x, gw, stride, padding, dilation, outputs))


@njit(cache=True)
def _output_channel(o, gy, x, gw, stride, padding, dilation, outputs):
    """What w[i, j, c, o] was multiplied with, summed over all images and positions."""
    first = o // outputs * gw.shape[2]
    for i in range(gw.shape[0]):
        for j in range(gw.shape[1]):
            for c in range(gw.shape[2]):
                total = gw.dtype.type(0)
                for n in range(gy.shape[0]):
                    for p in range(gy.shape[1]):
                        for q in range(gy.shape[2]):
                            r = p * stride[0] - padding[0] + i * dilation[0]
                            s = q * stride[1] - padding[1] + j * dilation[1]
                            if 0 <= r < x.shape[1] and 0 <= s < x.shape[2]:
                                total += x[n, r, s, first + c] * gy[n, p, q, o]
                gw[i, j, c, o] = total


@conv2d.variant("loops", auto=False, before="blocked")
def conv2d_loops(x, w, stride, padding, dilation, groups, **epilogue):
    """the textbook's seven loops: a pixel and a weight from memory for each multiplication"""
    y = np.empty((*output_shape(x.shape, w.shape[:2], stride, padding, dilation), w.shape[3]), x.dtype)
    x, w = contiguous(x), contiguous(w)
    _forward(x, w, y, tuple(stride), tuple(padding), tuple(dilation), w.shape[3] // groups)
    return finish(y, **epilogue)


@conv2d_grad_x.variant("loops", auto=False, before="blocked")
def conv2d_grad_x_loops(gy, w, x_shape, stride, padding, dilation, groups, *, residual=None):
    """the same seven loops, in which gy and w meet and add to x's gradient"""
    gx = np.zeros(x_shape, gy.dtype)
    gy, w = contiguous(gy), contiguous(w)
    _grad_x(gy, w, gx, tuple(stride), tuple(padding), tuple(dilation), w.shape[3] // groups)
    return finish(gx, residual=residual)


@conv2d_grad_w.variant("loops", auto=False, before="blocked")
def conv2d_grad_w_loops(gy, x, w_shape, stride, padding, dilation, groups, *, out=None):
    """the same seven loops, the sum over images and positions innermost"""
    gw = into(out, w_shape, gy.dtype)
    gy, x = contiguous(gy), contiguous(x)
    _grad_w(gy, x, gw, tuple(stride), tuple(padding), tuple(dilation), w_shape[3] // groups)
    return gw
