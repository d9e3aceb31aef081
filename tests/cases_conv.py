"""Example calls for the registry test: convolution, its columns, the matrix product, random bits."""

from __future__ import annotations

import math

import numpy as np

from nanocnn.kernels.im2col import output_shape

# (N, H, W, C), kernel, O, stride, padding, dilation, groups
GEOMETRIES = [
    ((3, 8, 8, 4), (3, 3), 6, (1, 1), (1, 1), (1, 1), 1),
    ((2, 7, 5, 3), (3, 2), 5, (2, 1), (0, 1), (1, 1), 1),
    ((1, 9, 9, 4), (3, 3), 6, (2, 2), (2, 2), (2, 2), 2),
    ((2, 6, 6, 4), (1, 1), 3, (1, 1), (0, 0), (1, 1), 1),
    ((2, 6, 7, 4), (1, 1), 3, (2, 2), (0, 0), (1, 1), 1),
    ((3, 21, 19, 21), (1, 1), 37, (2, 1), (0, 0), (1, 1), 1),  # more than a block of positions for a worker
    ((2, 5, 5, 4), (3, 3), 4, (1, 1), (1, 1), (1, 1), 4),
    ((2, 4, 4, 1), (4, 4), 1, (3, 3), (3, 3), (1, 1), 1),
    ((0, 8, 8, 3), (3, 3), 2, (1, 1), (1, 1), (1, 1), 1),
    ((2, 5, 4, 0), (3, 3), 3, (1, 1), (1, 1), (1, 1), 1),
    ((2, 5, 4, 0), (1, 1), 3, (1, 1), (0, 0), (1, 1), 1),
    ((2, 5, 4, 3), (3, 2), 0, (1, 1), (1, 1), (1, 1), 1),
    ((2, 5, 4, 3), (1, 1), 0, (1, 1), (0, 0), (1, 1), 1),
    ((2, 9, 10, 37), (3, 3), 43, (1, 1), (1, 1), (1, 1), 1),  # whole vectors and panels, and tails of both
    ((2, 9, 10, 37), (3, 3), 43, (2, 2), (1, 1), (1, 1), 1),
    ((2, 6, 7, 16), (3, 3), 24, (1, 1), (1, 1), (1, 1), 1),  # channels by eights
    ((2, 8, 7, 16), (3, 3), 64, (2, 2), (0, 0), (1, 1), 1),
    ((1, 2, 2, 3), (3, 3), 4, (1, 1), (2, 2), (1, 1), 1),  # an image smaller than the kernel
    ((1, 4, 4, 32), (3, 3), 32, (2, 2), (2, 2), (1, 1), 1),
    ((2, 9, 19, 37), (3, 3), 37, (1, 1), (1, 1), (1, 1), 37),  # depthwise: tiles of columns and their rest
    ((2, 11, 8, 16), (5, 5), 16, (2, 2), (2, 2), (1, 1), 16),
    ((1, 9, 9, 20), (3, 4), 40, (2, 1), (0, 3), (2, 1), 20),  # two outputs a channel
    ((1, 5, 26, 16), (5, 5), 16, (1, 1), (2, 2), (1, 1), 16),  # tiles that meet no border
    ((1, 5, 40, 19), (5, 5), 19, (2, 2), (2, 2), (1, 1), 19),
    ((1, 5, 40, 16), (3, 3), 16, (2, 2), (1, 1), (1, 1), 16),
    ((2, 7, 8, 5), (2, 1), 5, (3, 3), (0, 0), (1, 1), 5),  # pixels that no output meets
    ((0, 5, 5, 4), (3, 3), 4, (1, 1), (1, 1), (1, 1), 4),
]


def _conv_arrays(rng, dtype):
    for shape, kernel, o, stride, padding, dilation, groups in GEOMETRIES:
        x = rng.standard_normal(shape).astype(dtype)
        w = rng.standard_normal((*kernel, shape[3] // groups, o)).astype(dtype)
        gy = rng.standard_normal((*output_shape(shape, kernel, stride, padding, dilation), o)).astype(dtype)
        yield x, w, gy, (stride, padding, dilation, groups)
    x = rng.standard_normal((2, 4, 6, 6)).astype(dtype).transpose(0, 2, 3, 1)  # NCHW seen as NHWC: not contiguous
    w = rng.standard_normal((2, 3, 3, 3)).astype(dtype).transpose(3, 2, 1, 0)
    gy = rng.standard_normal((6, 6, 2, 2)).astype(dtype).transpose(2, 0, 1, 3)
    yield x, np.concatenate([w, w[:, :, :1]], axis=2), gy, ((1, 1), (1, 1), (1, 1), 1)


def conv2d(rng, dtype):
    calls = []
    for x, w, gy, geometry in _conv_arrays(rng, dtype):
        bias, residual = rng.standard_normal(w.shape[3]).astype(dtype), rng.standard_normal(gy.shape).astype(dtype)
        everything = dict(bias=bias, residual=residual, relu=True)
        calls += [((x, w, *geometry), kwargs) for kwargs in ({}, dict(bias=bias, relu=True), everything)]
    return calls


def conv2d_grad_x(rng, dtype):
    calls = []
    for x, w, gy, geometry in _conv_arrays(rng, dtype):
        residual = rng.standard_normal(x.shape).astype(dtype)
        calls += [((gy, w, x.shape, *geometry), kwargs) for kwargs in ({}, dict(residual=residual))]
    return calls


def conv2d_grad_w(rng, dtype):
    calls = []
    for x, w, gy, geometry in _conv_arrays(rng, dtype):
        calls += [((gy, x, w.shape, *geometry), kwargs) for kwargs in ({}, dict(out=np.full(w.shape, np.nan, dtype)))]
    return calls


def im2col(rng, dtype):
    return [((x, w.shape[:2], *geometry[:3]), {}) for x, w, _, geometry in _conv_arrays(rng, dtype)]


def col2im(rng, dtype):
    calls = []
    for x, w, gy, geometry in _conv_arrays(rng, dtype):
        rows, width = math.prod(gy.shape[:3]), w.shape[0] * w.shape[1] * x.shape[3]
        cols = rng.standard_normal((rows, width)).astype(dtype)
        calls.append(((cols, x.shape, w.shape[:2], *geometry[:3]), {}))
    return calls


def matmul(rng, dtype):
    shapes = [(1, 1, 1), (5, 3, 4), (17, 300, 9), (18, 17, 17), (0, 4, 3), (4, 0, 3), (4, 3, 0)]
    calls = [
        ((rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)), {})
        for m, k, n in shapes
    ]
    a, b = rng.standard_normal((6, 7)).astype(dtype), rng.standard_normal((5, 7)).astype(dtype)
    eights = rng.standard_normal((130, 40)).astype(dtype), rng.standard_normal((40, 136)).astype(dtype)
    calls.append((eights, {}))  # for rungs that load eight numbers at once
    for m, k, n in [(40, 300, 70), (33, 5, 64)]:  # tails of rows, of the depth and of panels; each operand transposed
        p, q = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
        turned = np.ascontiguousarray(p.T).T, np.ascontiguousarray(q.T).T
        epilogue = {"bias": rng.standard_normal(n).astype(dtype), "relu": True}
        calls += [((x, y), epilogue) for x in (p, turned[0], p[:, ::-1]) for y in (q, turned[1])]
    if np.dtype(dtype).itemsize == 2:  # of tensor cores alone: several of their blocks, and steps through all stages
        p, q = rng.standard_normal((136, 392)).astype(dtype), rng.standard_normal((392, 264)).astype(dtype)
        calls.append(((p, q), {"bias": rng.standard_normal(264).astype(dtype), "relu": True}))
    return [*calls, ((a, b.T), {}), ((a.T, a), {"out": np.empty((7, 7), dtype)})]


def random_bits(rng, dtype):
    samples = rng.integers(0, 2**32, 5)
    return [((samples, n, 2**63 + 11, 3, 2), {}) for n in (1, 4, 7)] + [((samples[:0], 4, 1), {})]


CASES = {f.__name__: f for f in (conv2d, conv2d_grad_x, conv2d_grad_w, im2col, col2im, matmul, random_bits)}
