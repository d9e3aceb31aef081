"""Softmax and cross-entropy on a GPU: a warp for each row; the kernels are in softmax.cu."""

from __future__ import annotations

import numpy as np

from ..dispatch import xp_of
from ..narrow import sum_dtype
from ..softmax import (
    cross_entropy,
    cross_entropy_and_grad,
    cross_entropy_grad,
    log_softmax,
    log_softmax_grad,
    softmax,
    softmax_grad,
)
from .elementwise import alike
from .launch import Kernel, contiguous, empty, one_each, reals
from .tunable import Tunable

WARPS = Tunable(
    "four warps, a row each: small blocks spread few rows over many multiprocessors",
    dict(warps=4),
    dict(warps=1),
    dict(warps=8),
    dict(warps=16),
)
ROW_EACH = Tunable("four warps: rows are few", dict(threads=128), dict(threads=32), dict(threads=256))

SOFTMAX, LOG_SOFTMAX, SOFTMAX_GRAD, LOG_SOFTMAX_GRAD, CROSS_ENTROPY_NAIVE, CROSS_ENTROPY, CROSS_ENTROPY_GRAD = (
    Kernel("softmax.cu", name)
    for name in (
        "softmax",
        "log_softmax",
        "softmax_grad",
        "log_softmax_grad",
        "cross_entropy_naive",
        "cross_entropy",
        "cross_entropy_grad",
    )
)
CROSS_ENTROPY_AND_GRAD = Kernel("softmax.cu", "cross_entropy_and_grad")


def _warp_a_row(rows):
    """Grid and block."""
    warps = WARPS["warps"]
    return (-(-rows // warps),), (32, warps)


def _by_rows(kernel, *arrays):
    """One output like the first array: what softmax, its logarithm and their gradients have in common."""
    out, columns = empty(arrays[0], arrays[0].shape), arrays[0].shape[-1]
    rows = out.size // columns
    kernel(*_warp_a_row(rows), *map(contiguous, arrays), out, rows, columns)
    return out


@softmax.variant("cuda", device="cuda", supports=reals)
def softmax_cuda(x):
    """a warp for each row, which it reads twice: the second time from a cache"""
    return _by_rows(SOFTMAX, x)


@log_softmax.variant("cuda", device="cuda", supports=reals)
def log_softmax_cuda(x):
    """a warp for each row, which it reads twice: the second time from a cache"""
    return _by_rows(LOG_SOFTMAX, x)


@softmax_grad.variant("cuda", device="cuda", supports=alike)
def softmax_grad_cuda(gy, y):
    """a warp for each row, which it reads twice: the second time from a cache"""
    return _by_rows(SOFTMAX_GRAD, gy, y)


@log_softmax_grad.variant("cuda", device="cuda", supports=alike)
def log_softmax_grad_cuda(gy, y):
    """a warp for each row, which it reads twice: the second time from a cache"""
    return _by_rows(LOG_SOFTMAX_GRAD, gy, y)


def _logits_and_labels(logits, labels, *args):
    return reals(logits) and labels.dtype == np.int64 and labels.shape == logits.shape[:1]


def _kept(gy, logits, labels, lse, smoothing):
    fits = gy.shape == labels.shape and lse.shape == (2, *labels.shape) and gy.dtype == logits.dtype
    return fits and lse.dtype in (gy.dtype, sum_dtype(gy.dtype)) and _logits_and_labels(logits, labels)


def _losses(kernel, launch, logits, labels, smoothing):
    """Losses, and what backward needs, which stays in float32 where the logits are narrower."""
    rows, columns = logits.shape
    loss, lse = empty(logits, rows), empty(logits, (2, rows), sum_dtype(logits.dtype))
    kernel(*launch, contiguous(logits), contiguous(labels), float(smoothing), loss, lse, rows, columns)
    return loss, lse


@cross_entropy.variant("cuda_naive", device="cuda", supports=_logits_and_labels, auto=False)
def cross_entropy_cuda_naive(logits, labels, smoothing):
    """a thread for each row, largest and sum in one pass; what neighbours read lies a row apart"""
    return _losses(CROSS_ENTROPY_NAIVE, one_each(len(logits), ROW_EACH), logits, labels, smoothing)


@cross_entropy.variant("cuda", device="cuda", supports=_logits_and_labels)
def cross_entropy_cuda(logits, labels, smoothing):
    """a warp for each row, by shuffles: its lanes read neighbouring numbers, and each sector once"""
    return _losses(CROSS_ENTROPY, _warp_a_row(len(logits)), logits, labels, smoothing)


@cross_entropy_grad.variant("cuda", device="cuda", supports=_kept)
def cross_entropy_grad_cuda(gy, logits, labels, lse, smoothing):
    """a warp for each row, in one pass: the label and what forward has kept are read once for it"""
    rows, columns = logits.shape
    gx = empty(logits, logits.shape)
    arrays = (contiguous(a) for a in (gy, logits, labels, lse.astype(sum_dtype(gy.dtype), copy=False)))
    CROSS_ENTROPY_GRAD(*_warp_a_row(rows), *arrays, float(smoothing), gx, rows, columns)
    return gx


def _scaled(logits, labels, scale, smoothing):
    return _logits_and_labels(logits, labels) and scale.dtype == sum_dtype(logits.dtype) and scale.shape == (1,)


@cross_entropy_and_grad.variant("cuda", device="cuda", supports=_scaled)
def cross_entropy_and_grad_cuda(logits, labels, scale, smoothing):
    """one launch, a warp for each row, which it reads twice: the second time from a cache"""
    rows, columns = logits.shape
    loss, gx = empty(logits, rows, scale.dtype), empty(logits, logits.shape)
    right = xp_of(logits).zeros(1, np.int32)
    given = contiguous(logits), contiguous(labels), scale, float(smoothing)
    CROSS_ENTROPY_AND_GRAD(*_warp_a_row(rows), *given, loss, gx, right, rows, columns)
    return loss, gx, right
