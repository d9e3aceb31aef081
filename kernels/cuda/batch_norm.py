"""Batch norm on a GPU: four passes, two forward and two backward, as on the CPU; the kernels are in batch_norm.cu."""

from __future__ import annotations

import math

import numpy as np

from ..batch_norm import (
    batch_norm_apply,
    batch_norm_grad,
    batch_norm_grad_stats,
    batch_norm_residual_grad_stats,
    batch_norm_running,
    batch_norm_scale,
    batch_norm_shares,
    batch_norm_stats,
)
from ..narrow import HALVES, sum_dtype
from .launch import Kernel, contiguous, empty, one_each, reals
from .reduce import ROWS, add_up, over_rows, partials

SUMS, MOMENTS, TOGETHER, APPLY, GRAD_STATS, RESIDUAL_GRAD_STATS, GRAD = (
    Kernel("batch_norm.cu", f"batch_norm_{name}", ROWS)
    for name in ("sums", "moments", "together", "apply", "grad_stats", "residual_grad_stats", "grad")
)
RUNNING, SCALE, SHARES = (Kernel("batch_norm.cu", f"batch_norm_{name}") for name in ("running", "scale", "shares"))
ADD_UP = Kernel("batch_norm.cu", "add_up", ROWS)


def _launch(x):
    """Grid and block, and the rows, channels, and rows of a block: what each pass over x ends its arguments with."""
    columns = x.shape[-1]
    rows = x.size // columns
    grid, block, each = over_rows(rows, columns)
    return (grid, block), (rows, columns, each)


def _channels(dtype, *arrays):
    """(C,) arrays as the kernels have them: contiguous, of the dtype of sums. None stays None."""
    return [None if a is None else contiguous(a.astype(dtype, copy=False)) for a in arrays]


def _fits(x, arrays, channels):
    """Arrays of x's shape and dtype, and (C,) ones of that dtype or of the one that statistics have."""
    others = [a for a in arrays if a is not None]
    numbers = [a for a in channels if a is not None]
    return (
        bool(reals(x))
        and all(a.dtype == x.dtype and a.shape == x.shape for a in others)
        and all(a.dtype in (x.dtype, sum_dtype(x.dtype)) and a.shape == x.shape[-1:] for a in numbers)
    )


# ------------------------------------------------------------------ forward


@batch_norm_stats.variant("cuda_two_passes", device="cuda", supports=reals, auto=False)
def batch_norm_stats_cuda_two_passes(x):
    """the mean, and then the squared distances from it: x comes from memory twice"""
    launch, sizes = _launch(x)
    x, (rows, columns, _) = contiguous(x), sizes
    partial, statistics = partials(x, 1, launch[0], columns), empty(x, (2, columns), sum_dtype(x.dtype))
    for i, mean in enumerate((None, statistics[0])):
        SUMS(*launch, x, mean, partial, *sizes)
        add_up(ADD_UP, partial, statistics[i : i + 1], 1 / rows)
    return statistics[0], statistics[1]


@batch_norm_stats.variant("cuda", device="cuda", supports=reals)
def batch_norm_stats_cuda(x):
    """one pass by Welford's update: x comes from memory once; parts are put together in a fixed order"""
    launch, (rows, columns, each) = _launch(x)
    partial, (mean, var) = partials(x, 2, launch[0], columns), empty(x, (2, columns), sum_dtype(x.dtype))
    x = contiguous(x)
    MOMENTS(*launch, x, partial, rows, columns, each)
    (across, blocks), block = launch
    TOGETHER((across,), block, x, partial, mean, var, blocks, rows, columns, each)
    return mean, var


@batch_norm_apply.variant(
    "cuda",
    device="cuda",
    supports=lambda x, mean, scale, shift, residual=None, relu=False: _fits(x, [residual], [mean, scale, shift]),
)
def batch_norm_apply_cuda(x, mean, scale, shift, residual=None, relu=False):
    """one pass with residual and ReLU; a thread keeps its channel's numbers in registers"""
    launch, sizes = _launch(x)
    numbers = _channels(sum_dtype(x.dtype), mean, scale, shift)
    y, residual = empty(x, x.shape), None if residual is None else contiguous(residual)
    APPLY(*launch, contiguous(x), *numbers, residual, y, bool(relu), *sizes)
    return y


def _updates(running_mean, running_var, mean, var, momentum, rows):
    both = running_mean.flags.c_contiguous and running_var.flags.c_contiguous and rows > 1
    return both and _fits(running_mean, [running_var], [mean, var])


@batch_norm_running.variant("cuda", device="cuda", supports=_updates)
def batch_norm_running_cuda(running_mean, running_var, mean, var, momentum, rows):
    """one launch in place of nine"""
    numbers = _channels(sum_dtype(running_mean.dtype), mean, var)
    unbiased = rows / (rows - 1)
    RUNNING(*one_each(mean.size), running_mean, running_var, *numbers, float(momentum), unbiased, mean.size)


def _numbers(first, *others):
    """(C,) arrays, of one dtype or of halves and float32."""
    dtypes = {a.dtype for a in (first, *others)}
    narrow = dtypes <= {np.dtype(np.float32), *HALVES}
    alike = all(a.shape == first.shape for a in others)
    return bool(first.size) and alike and (narrow or dtypes == {np.dtype(np.float64)})


@batch_norm_scale.variant("cuda", device="cuda", supports=lambda var, weight, eps: _numbers(var, weight))
def batch_norm_scale_cuda(var, weight, eps):
    """one launch in place of four"""
    dtype = sum_dtype(var.dtype)
    rstd, scale = empty(var, (2, var.size), dtype)
    SCALE(*one_each(var.size), *_channels(dtype, var, weight), float(eps), rstd, scale, var.size)
    return rstd, scale


# ------------------------------------------------------------------ backward


@batch_norm_grad_stats.variant(
    "cuda",
    device="cuda",
    supports=lambda gy, x, mean, scale=None, shift=None: _fits(x, [gy], [mean, scale, shift]),
)
def batch_norm_grad_stats_cuda(gy, x, mean, scale=None, shift=None):
    """one pass over both arrays, the ReLU's mask computed on the way; parts are added up in a fixed order"""
    launch, sizes = _launch(x)
    dtype, columns = sum_dtype(x.dtype), x.shape[-1]
    partial = partials(x, 2, launch[0], columns)
    GRAD_STATS(*launch, contiguous(gy), contiguous(x), *_channels(dtype, mean, scale, shift), partial, *sizes)
    return tuple(add_up(ADD_UP, partial, empty(x, (2, columns), dtype), 1.0))


@batch_norm_residual_grad_stats.variant(
    "cuda", device="cuda", supports=lambda gy, y, x, mean: _fits(x, [gy, y], [mean])
)
def batch_norm_residual_grad_stats_cuda(gy, y, x, mean):
    """one pass over three arrays, writing a fourth; parts are added up in a fixed order"""
    launch, sizes = _launch(x)
    dtype, columns = sum_dtype(x.dtype), x.shape[-1]
    masked, partial = empty(x, x.shape), partials(x, 2, launch[0], columns)
    RESIDUAL_GRAD_STATS(*launch, *map(contiguous, (gy, y, x)), *_channels(dtype, mean), masked, partial, *sizes)
    return masked, *add_up(ADD_UP, partial, empty(x, (2, columns), dtype), 1.0)


@batch_norm_shares.variant(
    "cuda", device="cuda", supports=lambda gb, products, rstd, rows: _numbers(gb, products, rstd)
)
def batch_norm_shares_cuda(gb, products, rstd, rows):
    """one launch in place of four"""
    dtype = sum_dtype(gb.dtype)
    gw, a, b = empty(gb, (3, gb.size), dtype)
    share = 0.0 if math.isinf(rows) else 1 / max(1, rows)
    SHARES(*one_each(gb.size), *_channels(dtype, gb, products, rstd), share, gw, a, b, gb.size)
    return gw, a, b


@batch_norm_grad.variant(
    "cuda",
    device="cuda",
    supports=lambda gy, x, mean, scale, a, b, shift=None: _fits(x, [gy], [mean, scale, a, b, shift]),
)
def batch_norm_grad_cuda(gy, x, mean, scale, a, b, shift=None):
    """one pass; a thread keeps its channel's numbers in registers"""
    launch, sizes = _launch(x)
    numbers = _channels(sum_dtype(x.dtype), mean, scale, a, b, shift)
    gx = empty(x, x.shape)
    GRAD(*launch, contiguous(gy), contiguous(x), *numbers, gx, *sizes)
    return gx
