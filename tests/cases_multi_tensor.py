"""Example calls for the registry test: the updates of all buckets at once, and the loss scale."""

from __future__ import annotations

import numpy as np

SIZES = (1, 70, 0, 16384, 2 * 16384 + 5)  # less than a block, nothing, a whole chunk, several and a rest


def _lists(rng, dtype, count, sizes=SIZES):
    return [[rng.standard_normal(n).astype(dtype) for n in sizes] for _ in range(count)]


def _flag(value):
    return np.full(1, value, np.int32)


def found_nonfinite_(rng, dtype):
    calls = []
    for value, before in [(0, 0), (0, 1), (np.inf, 0), (-np.inf, 0), (np.nan, 1)]:
        (grads,) = _lists(rng, dtype, 1)
        grads[-1][16384 + 700] += dtype(value)
        calls.append(((grads, _flag(before)), {}))
    return [*calls, (([np.zeros(0, dtype)], _flag(0)), {})]


def _control(step=0, scale=1.0):
    return np.array([0.1, step, scale, 7, 1])


ENDS: tuple = (
    ({}, 1.0),
    ({"found": _flag(0)}, 1024.0),
    ({"found": _flag(1)}, 1024.0),
)  # a good step, and a skipped one


def multi_sgd_update(rng, dtype):
    # rate, momentum, dampening, weight decay, Nesterov, of a bucket each
    hyper = [[1, 0.9, 0.5, 0, 0], [0.5, 0, 0, 0.1, 0], [1, 0.9, 0, 0.1, 1], [2, 0.9, 0, 0.1, 1], [1, 0.9, 0.5, 0.1, 0]]
    calls = []
    for step in (0, 3):
        for kwargs, scale in ENDS:
            data, grads, buffers = _lists(rng, dtype, 3)
            buffers[1] = None
            calls.append(((_control(step, scale), np.array(hyper, float), data, grads, buffers), kwargs))
    w, g = _lists(rng, dtype, 2, (5,))
    return [*calls, ((_control(), np.array([[1, 0, 0, 0, 0.0]]), w, g, [None]), {})]


def multi_adam_update(rng, dtype):
    # rate, both betas, eps, weight decay, decoupled
    hyper = [[1, 0.9, 0.999, 1e-3, 0, 0], [0.5, 0, 0.99, 1e-3, 0.1, 0], [1, 0.9, 0.999, 1e-3, 0.1, 1]]
    hyper += [[1, 0.8, 0.999, 1e-3, 0.1, 1], [2, 0.9, 0.99, 1e-2, 0.1, 0]]
    calls = []
    for step in (0, 19):
        for kwargs, scale in ENDS:
            data, grads, exp_avgs, exp_avg_sqs = _lists(rng, dtype, 4)
            squares = [v**2 for v in exp_avg_sqs]
            calls.append(((_control(step, scale), np.array(hyper), data, grads, exp_avgs, squares), kwargs))
    return calls


def update_scale_(rng, dtype):
    calls = []
    for scale in (1.0, 1.5, 2.0**16, 2.0**127):
        for good, found in [(7, 0), (1999, 0), (1999, 1)]:
            calls.append(((np.array([0.1, 5, scale, good, 1]), _flag(found)), {}))
    return [*calls, ((_control(scale=8.0), _flag(1), 1.0, 1.0), {}), ((_control(), _flag(0), 4.0, 0.25, 8, 0.5), {})]


CASES = {f.__name__: f for f in (found_nonfinite_, multi_sgd_update, multi_adam_update, update_scale_)}
