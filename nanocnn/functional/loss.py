"""Softmax and losses: the calculus; speed is a matter of kernels/softmax.py."""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from ..kernels import softmax as kernels
from ..kernels.dispatch import aside, device_of, to_device, xp_of
from ..kernels.narrow import HALVES
from ..tensor import Op, Tensor
from .basic import cast

REDUCTIONS = ("mean", "sum", "none")


class Softmax(Op):
    def forward(self, x, *, axis):
        y = kernels.softmax(x.swapaxes(axis, -1))
        self.axis = axis
        self.save(y)
        return y.swapaxes(axis, -1)

    def backward(self, gy):
        return kernels.softmax_grad(gy.swapaxes(self.axis, -1), *self.saved).swapaxes(self.axis, -1)


class LogSoftmax(Op):
    def forward(self, x, *, axis):
        y = kernels.log_softmax(x.swapaxes(axis, -1))
        self.axis = axis
        self.save(y)
        return y.swapaxes(axis, -1)

    def backward(self, gy):
        return kernels.log_softmax_grad(gy.swapaxes(self.axis, -1), *self.saved).swapaxes(self.axis, -1)


class CrossEntropy(Op):
    def forward(self, logits, *, labels, label_smoothing, reduction):
        loss, lse = kernels.cross_entropy(logits, labels, label_smoothing)
        self.save(logits, labels, lse)
        self.smoothing, self.reduction = label_smoothing, reduction
        return aside(_reduced, loss, reduction)

    def backward(self, gy):
        logits, labels, lse = self.saved
        gy = _spread(gy, labels.shape, self.reduction)
        return kernels.cross_entropy_grad(gy, logits, labels, lse, self.smoothing)


class MSELoss(Op):
    def forward(self, x, target, *, reduction):
        difference = x - target
        self.save(difference)
        self.reduction = reduction
        return _reduced(difference * difference, reduction)

    def backward(self, gy):
        (difference,) = self.saved
        gx = 2 * difference * _spread(gy, difference.shape, self.reduction)
        return gx, -gx if self.needs[1] else None


def _reduced(loss, reduction):
    if reduction == "none":
        return loss
    total = xp_of(loss).asarray(loss.sum())
    return total if reduction == "sum" else total * total.dtype.type(1 / loss.size)


def _spread(gy, shape, reduction):
    """The gradient of each element from that of the reduced loss."""
    size = int(np.prod(shape))
    if reduction == "mean":
        gy = aside(operator.mul, gy, gy.dtype.type(1 / size))
    return xp_of(gy).broadcast_to(gy, shape)


def _check_reduction(name: str, reduction: str, size: int) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{name}: unknown reduction {reduction!r}, expected one of {', '.join(REDUCTIONS)}")
    if reduction == "mean" and size == 0:
        raise ValueError(f"{name}: the mean over an empty batch is undefined; use reduction='sum', which gives 0")


def _check_labels(logits: Tensor, labels: Any) -> Any:
    """`labels` as an int64 array (N,), every one a class.

    Labels that lie on a GPU are not looked at, which would make the host wait for it: one that is no class makes the
    loss NaN there.
    """
    if logits.ndim != 2:
        raise ValueError(f"cross_entropy of logits of shape {logits.shape}: expected (N, classes)")
    rows, classes = logits.shape
    labels = labels.data if isinstance(labels, Tensor) else labels
    there = hasattr(labels, "dtype") and device_of(labels) != "cpu"
    labels = labels if there else np.asarray(labels)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"cross_entropy: labels of dtype {labels.dtype}, expected integers, one class for each row")
    if labels.shape != (rows,):
        raise ValueError(
            f"cross_entropy: labels of shape {labels.shape} for logits of shape {logits.shape}, expected ({rows},)"
        )
    if not there and (bad := (labels < 0) | (labels >= classes)).any():
        row = int(bad.argmax())
        raise ValueError(
            f"cross_entropy: label {int(labels[row])} in row {row} is no class: expected 0 to {classes - 1} for "
            f"logits of shape {logits.shape}"
        )
    labels = labels if labels.dtype == np.int64 else aside(_as_int64, labels)
    return labels if there else to_device(labels, logits.device)


def _as_int64(labels: Any) -> Any:
    return labels.astype(np.int64)


def _not_half(x: Tensor) -> Tensor:
    """A loss is computed in float32, and its gradient rounded to the halves that it was computed from."""
    return cast(x, np.float32) if x.dtype in HALVES else x


def softmax(x: Tensor, axis: int = -1) -> Tensor:
    """exp(x) over its sum along `axis`."""
    return Softmax.apply(x, axis=axis)


def log_softmax(x: Tensor, axis: int = -1) -> Tensor:
    """The logarithm of softmax(x), without computing that."""
    return LogSoftmax.apply(x, axis=axis)


def cross_entropy(logits: Tensor, labels: Any, label_smoothing: float = 0.0, reduction: str = "mean") -> Tensor:
    """(N, C), integers (N,) -> the mean of -sum(t log_softmax(logits)) over the batch, its "sum", or (N,) for "none".

    The target t is 1 - label_smoothing at the label, plus label_smoothing / C everywhere (Szegedy et al. 2016). A NaN
    in a row makes its loss NaN. An empty batch has the sum 0. Of logits in half precision the loss is float32. Raises
    ValueError on labels that are not integers, not one for each row, or no class.
    """
    logits, labels = _not_half(logits), _check_labels(logits, labels)
    _check_reduction("cross_entropy", reduction, len(labels))
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"cross_entropy: label_smoothing={label_smoothing!r}, expected a number from 0 to 1")
    return CrossEntropy.apply(logits, labels=labels, label_smoothing=label_smoothing, reduction=reduction)


def mse_loss(x: Tensor, target: Any, reduction: str = "mean") -> Tensor:
    """The mean of (x - target)^2 over all elements, or its "sum", or the elements for "none". Shapes must be equal."""
    if not isinstance(target, Tensor):
        target = Tensor(xp_of(x.data).asarray(target, dtype=x.dtype))
    if x.shape != target.shape or x.dtype != target.dtype:
        raise ValueError(
            f"mse_loss of {x.dtype} {x.shape} and {target.dtype} {target.shape}: expected equal shapes and dtypes"
        )
    _check_reduction("mse_loss", reduction, x.size)
    return MSELoss.apply(_not_half(x), _not_half(target), reduction=reduction)
