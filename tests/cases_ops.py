"""Example calls for the registry test: elementwise functions, pooling, norms, softmax, dropout."""

from __future__ import annotations

import math

import numpy as np

from nanocnn.kernels import pool2d
from nanocnn.kernels.im2col import output_shape

SHAPES = [(3, 5, 4, 7), (4, 70), (1,), (130, 3), (0, 8), (2, 0), (1, 1, 1, 1)]


def _arrays(rng, dtype, shapes=SHAPES):
    """Normal numbers of each shape, and one transposed view."""
    for shape in shapes:
        yield rng.standard_normal(shape).astype(dtype)
    yield rng.standard_normal((5, 6, 4)).astype(dtype).transpose(2, 0, 1)


def one_array(rng, dtype):
    special = np.array([0.0, -0.0, 30.0, -30.0, 86.0, -86.0, -200.0, np.inf, np.nan], dtype)
    return [((x,), {}) for x in _arrays(rng, dtype)] + [((special,), {})]


def two_arrays(rng, dtype):
    special = np.array([0.0, -0.0, 3.0, -3.0, 86.0, -86.0, -200.0, np.nan], dtype)
    calls = [((rng.standard_normal(x.shape).astype(dtype), x), {}) for x in _arrays(rng, dtype)]
    repeated = np.broadcast_to(rng.standard_normal(6).astype(dtype), (4, 6))
    return [*calls, ((np.ones_like(special), special), {}), ((repeated, repeated.copy()), {})]


def add_bias(rng, dtype):
    return [((x, rng.standard_normal(x.shape[-1:]).astype(dtype)), {}) for x in _arrays(rng, dtype)]


def bias_grad(rng, dtype):
    offset = 0.5 if dtype == np.float16 else 10  # of which so many are no more than half precision holds
    tall = rng.standard_normal((70_001, 2)).astype(dtype) + dtype(offset)  # several blocks of rows
    return [((x,), {}) for x in _arrays(rng, dtype)] + [((tall,), {})]


def relu_bias_grad(rng, dtype):
    y = np.maximum(rng.standard_normal((70_001, 3)).astype(dtype), 0)  # several blocks of rows
    return [*two_arrays(rng, dtype), ((rng.standard_normal(y.shape).astype(dtype), y), {})]


def epilogue(rng, dtype):
    calls = []
    for x in _arrays(rng, dtype):
        bias, residual = rng.standard_normal(x.shape[-1:]).astype(dtype), rng.standard_normal(x.shape).astype(dtype)
        calls += [((x.copy(),), dict(bias=bias)), ((x.copy(), bias, residual), dict(relu=True))]
        calls += [((x.copy(),), dict(residual=residual)), ((x.copy(),), dict(relu=True))]
    special = np.array([0.0, -0.0, 3.0, -3.0, np.inf, -np.inf, np.nan], dtype)
    return [*calls, ((special.copy(),), dict(relu=True)), ((special.copy(), np.zeros_like(special)), {})]


# (N, H, W, C), kernel, stride, padding
WINDOWS = [
    ((3, 8, 8, 5), (2, 2), (2, 2), (0, 0)),
    ((2, 9, 7, 4), (3, 3), (2, 2), (1, 1)),
    ((2, 7, 6, 3), (2, 3), (1, 2), (1, 0)),
    ((1, 8, 8, 17), (2, 2), (3, 3), (0, 0)),  # pixels that no window covers
    ((2, 5, 5, 1), (5, 5), (1, 1), (2, 2)),
    ((1, 1, 1, 1), (1, 1), (1, 1), (0, 0)),
    ((3, 7, 9, 20), (2, 2), (2, 2), (0, 0)),  # an odd row and column at the end
    ((1, 20, 18, 2), (17, 15), (1, 1), (0, 0)),  # 255 positions, the most that a byte counts beside "nowhere"
    ((1, 20, 18, 2), (16, 16), (1, 1), (0, 0)),  # 256
    ((0, 4, 4, 3), (2, 2), (2, 2), (0, 0)),
    ((2, 4, 4, 0), (2, 2), (2, 2), (0, 0)),
]


def _images(rng, dtype):
    for shape, *window in WINDOWS:
        yield rng.standard_normal(shape).astype(dtype), *window
    yield np.round(rng.standard_normal((2, 9, 9, 3))).astype(dtype), (3, 3), (2, 2), (1, 1)  # equals
    some = np.where(rng.random((2, 8, 6, 33)) < 0.1, np.nan, np.round(rng.standard_normal((2, 8, 6, 33))))
    yield some.astype(dtype), (2, 2), (2, 2), (0, 0)
    holes = np.full((1, 6, 6, 2), -np.inf, dtype)
    holes[0, 2, 3] = np.nan
    yield holes, (3, 3), (1, 1), (1, 1)
    yield rng.standard_normal((2, 3, 6, 8)).astype(dtype).transpose(0, 2, 3, 1), (2, 2), (2, 2), (0, 0)


def avg_pool2d(rng, dtype):
    return [((x, *window), {}) for x, *window in _images(rng, dtype)]


def max_pool2d(rng, dtype):
    calls = avg_pool2d(rng, dtype)
    return [*calls, *((args, dict(relu=True)) for args, _ in calls), (calls[0][0] + (True,), {})]


def _gradients(rng, dtype):
    for x, *window in _images(rng, dtype):
        oh_ow = output_shape(x.shape, *window, (1, 1))
        yield rng.standard_normal((*oh_ow, x.shape[3])).astype(dtype), x, window


def max_pool2d_grad(rng, dtype):
    reference = pool2d.max_pool2d.variants["reference"].body
    calls = []
    for gy, x, window in _gradients(rng, dtype):
        calls += [((gy, reference(x, *window, relu)[1], x.shape, *window), {}) for relu in (False, True)]
    return calls


def avg_pool2d_grad(rng, dtype):
    return [((gy, x.shape, *window), {}) for gy, x, window in _gradients(rng, dtype)]


ROWS = [(6, 5, 4, 7), (4, 70), (2, 1), (3001, 40), (1, 1)]


def _rows(rng, dtype):
    for x in _arrays(rng, dtype, ROWS):
        yield x + np.arange(x.shape[-1], dtype=dtype)


def batch_norm_stats(rng, dtype):
    return [((x,), {}) for x in _rows(rng, dtype)]


def batch_norm_running(rng, dtype):
    calls = []
    for x in _rows(rng, dtype):
        mean, var, *running = _columns(rng, dtype, x, 4)
        calls.append(((*running, mean, abs(var), 0.3, 2 + x.size // x.shape[-1]), {}))
    return calls


def batch_norm_scale(rng, dtype):
    return [((abs(var), weight, 1e-3), {}) for x in _rows(rng, dtype) for var, weight in [_columns(rng, dtype, x, 2)]]


def batch_norm_shares(rng, dtype):
    calls = [((*_columns(rng, dtype, x, 3), x.size // x.shape[-1]), {}) for x in _rows(rng, dtype)]
    return [*calls, ((*_columns(rng, dtype, np.empty((0, 3)), 3), 0), {}), ((*calls[0][0][:3], math.inf), {})]


def batch_norm_apply(rng, dtype):
    calls = []
    for residual, x in _pairs(rng, dtype):
        args = (x, *_columns(rng, dtype, x, 3))
        calls += [(args, {}), (args, dict(relu=True)), ((*args, residual, True), {}), (args, dict(residual=residual))]
    special = np.array([[np.inf, -np.inf, np.nan, 3.0], [0.0, -0.0, 1.0, -1.0]], dtype)
    calls.append(((special, *np.ones((3, 4), dtype)), dict(relu=True)))
    return [*calls, ((np.empty((0, 3), dtype), *np.ones((3, 3), dtype)), {})]


def batch_norm_grad_stats(rng, dtype):
    calls = [((gy, x, x.reshape(-1, x.shape[-1])[0]), {}) for gy, x in _pairs(rng, dtype)]
    calls += [((gy, x, *_columns(rng, dtype, x, 3)), {}) for gy, x in _pairs(rng, dtype)]
    return [*calls, ((*np.empty((2, 0, 3), dtype), np.ones(3, dtype)), {})]


def batch_norm_residual_grad_stats(rng, dtype):
    calls = [((gy, np.maximum(gy - x, 0), x, *_columns(rng, dtype, x, 1)), {}) for gy, x in _pairs(rng, dtype)]
    return [*calls, ((*np.empty((3, 0, 3), dtype), np.ones(3, dtype)), {})]


def batch_norm_grad(rng, dtype):
    calls = [((gy, x, *_columns(rng, dtype, x, 4)), {}) for gy, x in _pairs(rng, dtype)]
    return [*calls, *((args, dict(shift=args[2] + 1)) for args, _ in calls)]


def _columns(rng, dtype, x, count):
    """Numbers for each channel: every other column of a matrix, so that they do not lie side by side."""
    return rng.standard_normal((count, 2 * x.shape[-1])).astype(dtype)[:, ::2]


def _pairs(rng, dtype):
    return [(rng.standard_normal(x.shape).astype(dtype), x) for x in _rows(rng, dtype)]


def layer_norm(rng, dtype):
    calls = [((x, *rng.standard_normal((2, x.shape[-1])).astype(dtype), 1e-5), {}) for x in _rows(rng, dtype)]
    return [*calls, ((np.empty((0, 3), dtype), *np.ones((2, 3), dtype), 1e-5), {})]


def layer_norm_grad(rng, dtype):
    calls = []
    for x in [*_rows(rng, dtype), np.empty((0, 3), dtype)]:
        if x.shape[-1] == 1:
            continue  # the gradient is 0, and what comes of it rounding error
        rows = x.reshape(-1, x.shape[-1]) if x.size else x
        gy, weight = rng.standard_normal(x.shape).astype(dtype), rng.standard_normal(x.shape[-1]).astype(dtype)
        mean, rstd = rows.mean(axis=1, dtype=dtype), 1 / np.sqrt(rows.var(axis=1, dtype=dtype) + dtype(1e-5))
        calls.append(((gy, x, mean, rstd, weight), {}))
    return calls


def softmax(rng, dtype):
    special = np.array([[np.nan, 1, 2], [1, np.nan, 2], [0, -np.inf, 3], [1e4, 1, 1e4], [-1e4, 1, 2]], dtype)
    return [((x,), {}) for x in _arrays(rng, dtype, [s for s in SHAPES if len(s) > 1])] + [((special,), {})]


def softmax_grad(rng, dtype):
    return [((rng.standard_normal(x.shape).astype(dtype), x), {}) for (x,), _ in softmax(rng, dtype)[:-1]]


def log_softmax_grad(rng, dtype):
    return [((gy, -abs(y)), {}) for (gy, y), _ in softmax_grad(rng, dtype)]


def cross_entropy(rng, dtype):
    calls = []
    for (n, c), smoothing in [((5, 10), 0.0), ((7, 3), 0.1), ((1, 1), 0.0), ((40, 100), 1.0), ((0, 4), 0.1)]:
        calls.append(((rng.standard_normal((n, c)).astype(dtype), rng.integers(0, c, n), smoothing), {}))
    special = np.array([[np.nan, 1, 2], [1, 2, np.nan], [0, -np.inf, 3], [1e4, 1e4 - 1, 3]], dtype)
    x = rng.standard_normal((6, 8)).astype(dtype).T
    return [*calls, ((special, np.array([1, 0, 2, 1]), 0.0), {}), ((x, rng.integers(0, 6, 16)[::2], 0.2), {})]


def cross_entropy_grad(rng, dtype):
    calls = []
    for (logits, labels, smoothing), _ in cross_entropy(rng, dtype):
        m = logits.max(axis=1, initial=-np.inf)
        lse = np.stack([m, np.log(np.exp(logits - m[:, None]).sum(axis=1))])
        gy = rng.standard_normal(1).astype(dtype)
        calls.append(((np.broadcast_to(gy, labels.shape), logits, labels, lse, smoothing), {}))
    return calls


def cross_entropy_and_grad(rng, dtype):
    calls = []
    for (logits, labels, smoothing), _ in cross_entropy(rng, dtype):
        scale = rng.uniform(0.5, 2, 1).astype(np.result_type(dtype, np.float32))
        calls.append(((logits, labels, scale, smoothing), {}))
    ties = np.array([[1, 3, 3], [3, 1, 3], [3, 3, 3], [-np.inf, 2, -np.inf], [np.inf, 1, 2]], dtype)
    return [*calls, ((ties, np.array([1, 2, 0, 1, 0]), scale, 0.0), {})]


def dropout(rng, dtype):
    calls = []
    for (n, m), p in [((5, 7), 0.5), ((1, 1), 0.1), ((3, 1025), 0.9), ((4, 256), 1.0), ((0, 4), 0.5), ((4, 0), 0.5)]:
        x, samples = rng.standard_normal((n, m)).astype(dtype), rng.integers(0, 2**32, n)
        calls.append(((x, samples, p, np.array([2**40 + 5, 3, 1 << 24])), {}))
    x = rng.standard_normal((9, 4)).astype(dtype).T
    return [*calls, ((x, np.arange(8)[::2], 0.3, np.array([1, 0, 0])), {})]


def dropout_grad(rng, dtype):
    calls = []
    for (x, _, p, *_), _ in dropout(rng, dtype):
        calls.append(((x, rng.integers(0, 2, x.shape, dtype=np.uint8), p), {}))
    return calls


CASES = {
    **dict.fromkeys(("relu", "sigmoid", "silu", "gelu"), one_array),
    **dict.fromkeys(("relu_grad", "sigmoid_grad", "silu_grad", "gelu_grad"), two_arrays),
    **dict.fromkeys(("softmax", "log_softmax"), softmax),
    **{
        f.__name__: f
        for f in (
            add_bias,
            bias_grad,
            relu_bias_grad,
            epilogue,
            max_pool2d,
            avg_pool2d,
            max_pool2d_grad,
            avg_pool2d_grad,
            batch_norm_stats,
            batch_norm_running,
            batch_norm_scale,
            batch_norm_shares,
            batch_norm_apply,
            batch_norm_grad_stats,
            batch_norm_residual_grad_stats,
            batch_norm_grad,
            layer_norm,
            layer_norm_grad,
            softmax_grad,
            log_softmax_grad,
            cross_entropy,
            cross_entropy_grad,
            cross_entropy_and_grad,
            dropout,
            dropout_grad,
        )
    },
}
