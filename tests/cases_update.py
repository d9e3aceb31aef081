"""Example calls for the registry test: the optimisers' updates over flat arrays."""

from __future__ import annotations

import math

SIZES = (0, 1, 63, 1001, 3 * 16384 + 5)  # nothing, one, less than a row of lanes, odd, several blocks and a rest


def _arrays(rng, dtype, count):
    for n in SIZES:
        yield [rng.standard_normal(n).astype(dtype) for _ in range(count)]


def sgd_update(rng, dtype):
    options = [
        {},
        {"weight_decay": 0.1},
        {"momentum": 0.9},
        {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
    ]
    return [
        ((data, grad, buffer if "momentum" in kwargs else None, 0.1), kwargs)
        for kwargs in options
        for data, grad, buffer in _arrays(rng, dtype, 3)
    ]


def lars_update(rng, dtype):
    return [((*arrays, 0.1, 0.9, decay), {}) for decay in (0.0, 0.1) for arrays in _arrays(rng, dtype, 3)]


def adam_update(rng, dtype):
    options = [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "decoupled": True}, {"beta1": 0.0, "eps": 1e-3}]
    return [
        ((data, grad, exp_avg, exp_avg_sq**2, step, 0.1), kwargs)
        for kwargs in options
        for step in (1, 20)
        for data, grad, exp_avg, exp_avg_sq in _arrays(rng, dtype, 4)
    ]


def adagrad_update(rng, dtype):
    options = [{}, {"eps": 1e-3, "weight_decay": 0.1}]
    return [((w, g, t**2, 0.1), kwargs) for kwargs in options for w, g, t in _arrays(rng, dtype, 3)]


def ema_update(rng, dtype):
    return [((*arrays, decay), {}) for decay in (0.0, 0.99, 1.0) for arrays in _arrays(rng, dtype, 2)]


def scale_(rng, dtype):
    return [((*arrays, factor), {}) for factor in (0.0, 0.3) for arrays in _arrays(rng, dtype, 1)]


def unscale_(rng, dtype):
    calls = scale_(rng, dtype)
    for at, bad in ((0, math.nan), (-1, math.inf), (700, -math.inf)):
        (data,) = list(_arrays(rng, dtype, 1))[-1]
        data[at] = bad
        calls.append(((data, 0.5), {}))
    return calls


def sum_of_squares(rng, dtype):
    return [(tuple(arrays), {}) for arrays in _arrays(rng, dtype, 1)]


CASES = {
    "sgd_update": sgd_update,
    "lars_update": lars_update,
    "adam_update": adam_update,
    "adagrad_update": adagrad_update,
    "ema_update": ema_update,
    "scale_": scale_,
    "unscale_": unscale_,
    "sum_of_squares": sum_of_squares,
}
