"""The optimisers' updates as primitives over flat arrays, in place on the parameters and on the state.

An update does a handful of operations on each number that it loads, so its time is its memory traffic. The reference
is the textbook's formula as NumPy passes, each of which walks through memory again; the Numba variant is one fused
pass: every array is read once and written once. Both round alike, operation by operation, and so agree to the bit.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, plain_floats, xp_of

BLOCK = 16384  # elements: the fused arrays' parts of one block (256 KB) fit in the second-level cache
LANES = 64  # partial sums a block, independent of each other: enough for any vector width


def flat(*args, **kwargs) -> bool:
    """What the fused variants support: one-dimensional contiguous arrays, all float32 or all float64."""
    arrays = [a for a in (*args, *kwargs.values()) if isinstance(a, np.ndarray)]
    return plain_floats(*arrays) and all(a.ndim == 1 and a.flags.c_contiguous for a in arrays)


# ------------------------------------------------------------------ SGD


@Primitive(inplace=True)
def sgd_update(data, grad, momentum_buffer, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    """One step of SGD on (n,) arrays, PyTorch's formula; `momentum_buffer` may be None where `momentum` is 0.

    Sutskever et al., "On the importance of initialization and momentum in deep learning" (ICML 2013).
    """
    if weight_decay:
        grad = grad + weight_decay * data
    if momentum:
        momentum_buffer *= momentum
        momentum_buffer += (1 - dampening) * grad
        grad = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    data -= lr * grad


@sgd_update.variant("numba", supports=flat)
def sgd_update_numba(data, grad, momentum_buffer, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    """one fused pass, parallel over blocks"""
    number = data.dtype.type  # a float64 scalar would make Numba compute in float64
    buffer = momentum_buffer if momentum else data[:0]
    numbers = number(lr), number(momentum), number(1 - dampening), number(weight_decay)
    _sgd(data, grad, buffer, *numbers, nesterov)


@njit(parallel=True, cache=True)
def _sgd(data, grad, buffer, lr, momentum, gain, weight_decay, nesterov):
    for block in prange(-(-data.size // BLOCK)):
        w = data[block * BLOCK : (block + 1) * BLOCK]
        gw = grad[block * BLOCK : (block + 1) * BLOCK]
        v = buffer[block * BLOCK : (block + 1) * BLOCK]
        if v.size:
            for i in range(w.size):
                g = gw[i] + weight_decay * w[i]
                v[i] = momentum * v[i] + gain * g
                w[i] -= lr * (g + momentum * v[i] if nesterov else v[i])
        else:
            for i in range(w.size):
                w[i] -= lr * (gw[i] + weight_decay * w[i])


@sgd_update.work
def _(data, grad, momentum_buffer, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    flops = 2 + 2 * bool(weight_decay) + 3 * bool(momentum) + 2 * bool(nesterov)
    return flops * data.size, (5 if momentum else 3) * data.nbytes


# ------------------------------------------------------------------ LARS


@Primitive(inplace=True)
def lars_update(data, grad, momentum_buffer, lr, momentum, weight_decay):
    """The inner step of LARS on one layer's (n,) arrays: the buffer holds steps, not gradients.

    You, Gitman and Ginsburg, "Large batch training of convolutional networks" (2017), algorithm 1. `lr` is the layer's:
    the global rate times the trust ratio.
    """
    momentum_buffer *= momentum
    momentum_buffer += lr * (grad + weight_decay * data)
    data -= momentum_buffer


@lars_update.variant("numba", supports=flat)
def lars_update_numba(data, grad, momentum_buffer, lr, momentum, weight_decay):
    """the kernel of SGD: its gain is the rate, and the rate of the last line is 1"""
    number = data.dtype.type
    _sgd(data, grad, momentum_buffer, number(1), number(momentum), number(lr), number(weight_decay), False)


@lars_update.work
def _(data, grad, momentum_buffer, lr, momentum, weight_decay):
    return 6 * data.size, 5 * data.nbytes


# ------------------------------------------------------------------ Adam, AdamW


@Primitive(inplace=True)
def adam_update(
    data, grad, exp_avg, exp_avg_sq, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False
):
    """One step of Adam, or with `decoupled` of AdamW, on (n,) arrays; `step` counts from 1.

    Kingma and Ba, "Adam" (ICLR 2015), algorithm 1; Loshchilov and Hutter, "Decoupled weight decay regularization"
    (ICLR 2019), algorithm 2.
    """
    if decoupled:
        data *= 1 - lr * weight_decay
    elif weight_decay:
        grad = grad + weight_decay * data
    exp_avg += (1 - beta1) * (grad - exp_avg)
    exp_avg_sq *= beta2
    exp_avg_sq += (1 - beta2) * (grad * grad)
    correction1, correction2 = 1 - beta1**step, math.sqrt(1 - beta2**step)
    data -= (lr / correction1) * exp_avg / (xp_of(data).sqrt(exp_avg_sq) / correction2 + eps)


@adam_update.variant("numba", supports=flat)
def adam_update_numba(
    data, grad, exp_avg, exp_avg_sq, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False
):
    """one fused pass, parallel over blocks"""
    number = data.dtype.type
    keep, decay = (1 - lr * weight_decay, 0) if decoupled else (1, weight_decay)
    rate, correction = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    numbers = keep, decay, rate, correction, 1 - beta1, beta2, 1 - beta2, eps
    _adam(data, grad, exp_avg, exp_avg_sq, *map(number, numbers))


@njit(parallel=True, cache=True, error_model="numpy")  # a division by zero is inf or NaN, and no branch in the loop
def _adam(data, grad, exp_avg, exp_avg_sq, keep, decay, rate, correction, gain1, beta2, gain2, eps):
    for block in prange(-(-data.size // BLOCK)):
        w = data[block * BLOCK : (block + 1) * BLOCK]
        gw = grad[block * BLOCK : (block + 1) * BLOCK]
        m = exp_avg[block * BLOCK : (block + 1) * BLOCK]
        v = exp_avg_sq[block * BLOCK : (block + 1) * BLOCK]
        for i in range(w.size):
            g = gw[i] + decay * w[i]
            m[i] += gain1 * (g - m[i])
            v[i] = beta2 * v[i] + gain2 * (g * g)
            w[i] = keep * w[i] - rate * m[i] / (np.sqrt(v[i]) / correction + eps)


@adam_update.work
def _(data, *args, **kwargs):
    return 14 * data.size, 7 * data.nbytes


# ------------------------------------------------------------------ Adagrad


@Primitive(inplace=True)
def adagrad_update(data, grad, total, lr, eps=1e-10, weight_decay=0.0):
    """One step of Adagrad on (n,) arrays; `total` is the running sum of squared gradients.

    Duchi, Hazan and Singer, "Adaptive subgradient methods" (JMLR 2011), figure 1 with the diagonal matrix.
    """
    if weight_decay:
        grad = grad + weight_decay * data
    total += grad * grad
    data -= lr * grad / (xp_of(data).sqrt(total) + eps)


@adagrad_update.variant("numba", supports=flat)
def adagrad_update_numba(data, grad, total, lr, eps=1e-10, weight_decay=0.0):
    """one fused pass, parallel over blocks"""
    number = data.dtype.type
    _adagrad(data, grad, total, number(lr), number(eps), number(weight_decay))


@njit(parallel=True, cache=True, error_model="numpy")
def _adagrad(data, grad, total, lr, eps, weight_decay):
    for block in prange(-(-data.size // BLOCK)):
        w = data[block * BLOCK : (block + 1) * BLOCK]
        gw = grad[block * BLOCK : (block + 1) * BLOCK]
        t = total[block * BLOCK : (block + 1) * BLOCK]
        for i in range(w.size):
            g = gw[i] + weight_decay * w[i]
            t[i] += g * g
            w[i] -= lr * g / (np.sqrt(t[i]) + eps)


@adagrad_update.work
def _(data, grad, total, lr, eps=1e-10, weight_decay=0.0):
    return (7 + 2 * bool(weight_decay)) * data.size, 5 * data.nbytes


# ------------------------------------------------------------------ averaging, scaling, norms


@Primitive(inplace=True)
def ema_update(average, data, decay):
    """average = decay * average + (1 - decay) * data on (n,) arrays."""
    average += (1 - decay) * (data - average)


@ema_update.variant("numba", supports=flat)
def ema_update_numba(average, data, decay):
    """one fused pass, parallel over blocks"""
    _ema(average, data, data.dtype.type(1 - decay))


@njit(parallel=True, cache=True)
def _ema(average, data, gain):
    for block in prange(-(-data.size // BLOCK)):
        a = average[block * BLOCK : (block + 1) * BLOCK]
        w = data[block * BLOCK : (block + 1) * BLOCK]
        for i in range(w.size):
            a[i] += gain * (w[i] - a[i])


@ema_update.work
def _(average, data, decay):
    return 3 * data.size, 3 * data.nbytes


@Primitive(inplace=True)
def scale_(data, factor):
    """data *= factor on an (n,) array: gradients clipped, or freed of their loss scale."""
    data *= factor


@scale_.variant("numba", supports=flat)
def scale_numba(data, factor):
    """parallel over blocks"""
    _scale(data, data.dtype.type(factor))


@njit(parallel=True, cache=True)
def _scale(data, factor):
    for block in prange(-(-data.size // BLOCK)):
        w = data[block * BLOCK : (block + 1) * BLOCK]
        for i in range(w.size):
            w[i] *= factor


@scale_.work
def _(data, factor):
    return data.size, 2 * data.nbytes


@Primitive(inplace=True)
def unscale_(data, factor):
    """data *= factor on an (n,) array; returns whether all of it is finite, a bool.

    Gradients of a loss that was multiplied by 1 / factor become those of the loss; an overflow is seen on the way.
    """
    data *= factor
    return bool(xp_of(data).isfinite(data).all())


@unscale_.variant("numba", supports=flat)
def unscale_numba(data, factor):
    """one pass that scales and tests, parallel over blocks"""
    return _unscale(data, data.dtype.type(factor), np.finfo(data.dtype).max)


@njit(parallel=True, cache=True)
def _unscale(data, factor, largest):
    finite = np.ones(-(-data.size // BLOCK), np.bool_)
    for block in prange(finite.size):
        w = data[block * BLOCK : (block + 1) * BLOCK]
        good = 0
        for i in range(w.size):
            w[i] *= factor
            good += abs(w[i]) <= largest  # not so of NaN
        finite[block] = good == w.size
    return finite.all()


@unscale_.work
def _(data, factor):
    return 2 * data.size, 2 * data.nbytes


@Primitive
def sum_of_squares(data):
    """(n,) -> the sum of squares, a float: accumulated in float64, block by block in a fixed order.

    Float32 overflows at the square of 2e19 and loses a small number beside a large sum. The order is fixed so that the
    norm, and with it every clipped gradient, is the same however many threads there are.
    """
    xp, total = xp_of(data), 0.0
    for start in range(0, data.size, BLOCK):
        block = data[start : start + BLOCK].astype(xp.float64)
        total += float(xp.sum(block * block))
    return total


@sum_of_squares.variant("numba", supports=flat)
def sum_of_squares_numba(data):
    """blocks in parallel, each in 64 independent sums: the same bits on any number of threads and any vector width"""
    return _sum_of_squares(data)


@njit(parallel=True, cache=True)
def _sum_of_squares(data):
    partial = np.empty(-(-data.size // BLOCK))
    for block in prange(partial.size):
        x = data[block * BLOCK : (block + 1) * BLOCK]
        lanes = np.zeros(LANES)
        for start in range(0, x.size, LANES):
            row = x[start : start + LANES]
            for i in range(row.size):
                value = np.float64(row[i])
                lanes[i] += value * value
        total = 0.0
        for i in range(LANES):
            total += lanes[i]
        partial[block] = total
    total = 0.0
    for block in range(partial.size):
        total += partial[block]
    return total


@sum_of_squares.work
def _(data):
    return 2 * data.size, data.nbytes
