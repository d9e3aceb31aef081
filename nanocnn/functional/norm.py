"""Batch norm and layer norm: the calculus; speed is a matter of kernels/batch_norm.py and kernels/layer_norm.py."""

from __future__ import annotations

import math
from typing import Any

from ..kernels import batch_norm as kernels
from ..kernels import layer_norm as layer_kernels
from ..kernels.dispatch import xp_of
from ..kernels.narrow import sum_dtype
from ..tensor import Op, Tensor, as_tensor
from .basic import need_floats
from .fuse import check_residual, fuse, one_by_one


class BatchNorm(Op):
    """y = (x - mean) rstd weight + bias, rstd = 1 / sqrt(var + eps), over all axes but the last (M rows).

    With h = (x - mean) rstd: gb = sum(gy), gw = sum(gy h), and in training, where mean and var depend on x,
    gx = weight rstd (gy - gb / M - h gw / M) (Ioffe & Szegedy 2015, section 3). In evaluation the latter two vanish.
    """

    def forward(self, x, weight, bias, **how):
        mean, rstd, scale = self.statistics(x, weight, **how)
        self.save(x, mean, rstd, scale)
        return kernels.batch_norm_apply(x, mean, scale, bias)

    def statistics(self, x, weight, *, running_mean, running_var, training, momentum, eps):
        """mean, rstd and weight rstd: of this batch, which is then counted among the running ones, or of these."""
        rows = math.prod(x.shape[:-1])
        if training and rows:
            mean, var = kernels.batch_norm_stats(x)
            kernels.batch_norm_running(running_mean, running_var, mean, var, momentum, rows)
        else:
            dtype = sum_dtype(x.dtype)
            mean, var = running_mean.astype(dtype, copy=False), running_var.astype(dtype, copy=False)
        self.rows, self.weight_dtype = rows if training else math.inf, weight.dtype
        return mean, *kernels.batch_norm_scale(var, weight, eps)

    def backward(self, gy):
        x, mean, rstd, scale = self.saved
        return self.gradients(gy, kernels.batch_norm_grad_stats(gy, x, mean), x, mean, rstd, scale)

    def gradients(self, gy, sums, x, mean, rstd, scale, relu_shift=None):
        """gx, gw, gb from sum(gy) and sum(gy (x - mean)); with `relu_shift`, which is the bias, behind a ReLU."""
        gb, (gw, a, b) = sums[0], kernels.batch_norm_shares(*sums, rstd, self.rows)
        gx = kernels.batch_norm_grad(gy, x, mean, scale, a, b, relu_shift) if self.needs[0] else None
        return gx, gw.astype(self.weight_dtype, copy=False), gb.astype(self.weight_dtype, copy=False)


class BatchNormReLU(BatchNorm):
    """relu(batch norm), in batch norm's own passes. No mask is kept: backward computes it from x, which it reads."""

    def forward(self, x, weight, bias, **how):
        mean, rstd, scale = self.statistics(x, weight, **how)
        self.save(x, mean, rstd, scale, bias)
        return kernels.batch_norm_apply(x, mean, scale, bias, relu=True)

    def backward(self, gy):
        x, mean, rstd, scale, bias = self.saved
        sums = kernels.batch_norm_grad_stats(gy, x, mean, scale, bias)
        return self.gradients(gy, sums, x, mean, rstd, scale, relu_shift=bias)


class BatchNormAddReLU(BatchNorm):
    """relu(batch norm + residual), the end of a residual block. The mask is that of y, which the next layer keeps."""

    def forward(self, x, weight, bias, residual, **how):
        mean, rstd, scale = self.statistics(x, weight, **how)
        y = kernels.batch_norm_apply(x, mean, scale, bias, residual, relu=True)
        self.save(x, mean, rstd, scale, y)
        return y

    def backward(self, gy):
        x, mean, rstd, scale, y = self.saved
        gy, *sums = kernels.batch_norm_residual_grad_stats(gy, y, x, mean)
        return *self.gradients(gy, sums, x, mean, rstd, scale), gy


class LayerNorm(Op):
    def forward(self, x, weight, bias, *, eps):
        y, mean, rstd = layer_kernels.layer_norm(x, weight, bias, eps)
        self.save(x, mean, rstd, weight)
        return y

    def backward(self, gy):
        gx, *sums = layer_kernels.layer_norm_grad(gy, *self.saved)
        return gx, *(s.astype(self.saved[3].dtype, copy=False) for s in sums)


def _affine(name: str, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`weight` and `bias`, 1 and 0 where None, checked to be one for each channel of floats."""
    need_floats(name, x)
    channels = (x.shape[-1],)
    xp = xp_of(x.data)
    weight = as_tensor(xp.ones(channels, x.dtype) if weight is None else weight)
    bias = as_tensor(xp.zeros(channels, x.dtype) if bias is None else bias)
    if weight.shape != channels or bias.shape != channels:
        raise ValueError(
            f"{name} of {x.shape} with weight {weight.shape} and bias {bias.shape}: expected one of each for every one "
            f"of the {channels[0]} channels, the last axis"
        )
    return weight, bias


def batch_norm(
    x: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """(N, C) or (N, H, W, C), normalised over all axes but the last; then times `weight` plus `bias`, (C,) or None.

    Then plus `residual`, of x's shape, and ReLU, where they are asked for.

    In training by the batch's mean and variance, and the raw arrays `running_mean` and `running_var` are updated in
    place: running = (1 - momentum) running + momentum batch, the variance unbiased, as in PyTorch. In evaluation by
    the running ones. An empty batch changes nothing. Raises ValueError on shapes that do not fit, and in training on
    one row, whose variance nobody knows; TypeError unless x is floating-point.
    """
    if x.ndim not in (2, 4):
        raise ValueError(f"batch_norm of shape {x.shape}: expected (N, C) or (N, H, W, C)")
    weight, bias = _affine("batch_norm", x, weight, bias)
    if running_mean.shape != weight.shape or running_var.shape != weight.shape:
        raise ValueError(
            f"batch_norm of {x.shape} with running statistics {running_mean.shape} and {running_var.shape}: expected "
            f"{weight.shape}, one for each channel"
        )
    if training and math.prod(x.shape[:-1]) == 1:
        raise ValueError(
            f"batch_norm of {x.shape} in training: one row has no variance; use a larger batch, or evaluation mode"
        )
    check_residual("batch_norm", x.shape, x.dtype, residual)
    how: dict[str, Any] = dict(running_mean=running_mean, running_var=running_var)
    how |= dict(training=training, momentum=momentum, eps=eps)
    if fuse.value == "off" or not relu:
        return one_by_one(BatchNorm.apply(x, weight, bias, **how), residual, relu)
    if residual is None:
        return BatchNormReLU.apply(x, weight, bias, **how)
    return BatchNormAddReLU.apply(x, weight, bias, residual, **how)


def layer_norm(x: Tensor, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    """(..., C), each row normalised by its own mean and variance; then times `weight` plus `bias`, (C,) or None.

    Ba, Kiros & Hinton 2016. Raises ValueError on shapes that do not fit, TypeError unless x is floating-point.
    """
    if x.ndim < 1 or x.shape[-1] == 0:
        raise ValueError(f"layer_norm of shape {x.shape}: expected (..., C) with at least one channel")
    return LayerNorm.apply(x, *_affine("layer_norm", x, weight, bias), eps=eps)
