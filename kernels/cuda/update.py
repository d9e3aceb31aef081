"""The optimisers' updates on a GPU: one pass over flat arrays, in place; the kernels are in update.cu."""

from __future__ import annotations

import math

import numpy as np

from ..update import adagrad_update, adam_update, ema_update, lars_update, scale_, sgd_update, sum_of_squares
from .launch import Kernel, empty, one_each, reals
from .reduce import ROWS

SGD, ADAM, ADAGRAD, EMA, SCALE = (Kernel("update.cu", name) for name in ("sgd", "adam", "adagrad", "ema", "scale"))
SUM_OF_SQUARES, ADD_UP = (Kernel("update.cu", name, ROWS) for name in ("sum_of_squares", "add_up"))


def _flat(*args, **kwargs):
    """One-dimensional contiguous arrays of one dtype and one length: what is changed in place cannot be copied."""
    arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "ndim") and a.ndim]
    alike = all(a.ndim == 1 and a.flags.c_contiguous and a.shape == arrays[0].shape for a in arrays)
    return reals(*arrays) and alike


@sgd_update.variant("cuda", device="cuda", supports=_flat)
def sgd_update_cuda(data, grad, momentum_buffer, lr, momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=False):
    """one pass: every array is read once and written once"""
    buffer = momentum_buffer if momentum else None
    numbers = map(float, (lr, momentum, 1 - dampening, weight_decay))
    SGD(*one_each(data.size), data, grad, buffer, *numbers, bool(nesterov), data.size)


@lars_update.variant("cuda", device="cuda", supports=_flat)
def lars_update_cuda(data, grad, momentum_buffer, lr, momentum, weight_decay):
    """the kernel of SGD: its gain is the rate, and the rate of the last line is 1"""
    numbers = map(float, (1, momentum, lr, weight_decay))
    SGD(*one_each(data.size), data, grad, momentum_buffer, *numbers, False, data.size)


@adam_update.variant("cuda", device="cuda", supports=_flat)
def adam_update_cuda(
    data, grad, exp_avg, exp_avg_sq, step, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, decoupled=False
):
    """one pass: every array is read once and written once"""
    keep, decay = (1 - lr * weight_decay, 0) if decoupled else (1, weight_decay)
    rate, correction = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)
    numbers = map(float, (keep, decay, rate, correction, 1 - beta1, beta2, 1 - beta2, eps))
    ADAM(*one_each(data.size), data, grad, exp_avg, exp_avg_sq, *numbers, data.size)


@adagrad_update.variant("cuda", device="cuda", supports=_flat)
def adagrad_update_cuda(data, grad, total, lr, eps=1e-10, weight_decay=0.0):
    """one pass: every array is read once and written once"""
    ADAGRAD(*one_each(data.size), data, grad, total, float(lr), float(eps), float(weight_decay), data.size)


@ema_update.variant("cuda", device="cuda", supports=_flat)
def ema_update_cuda(average, data, decay):
    """one pass: every array is read once and written once"""
    EMA(*one_each(data.size), average, data, float(1 - decay), data.size)


@scale_.variant("cuda", device="cuda", supports=_flat)
def scale_cuda(data, factor):
    """one pass"""
    SCALE(*one_each(data.size), data, float(factor), data.size)


@sum_of_squares.variant("cuda", device="cuda", supports=_flat)
def sum_of_squares_cuda(data):
    """one pass in double, parts of blocks added up in a fixed order; nothing as large as the array is written"""
    threads = ROWS["THREADS"]
    blocks = min(ROWS["most"], -(-data.size // (ROWS["each"] * threads)))
    partial, total = empty(data, blocks, np.float64), empty(data, 1, np.float64)
    SUM_OF_SQUARES((blocks,), (1, threads), data, partial, data.size)
    ADD_UP((1,), (1, threads), partial, total, blocks)
    return float(total[0])
