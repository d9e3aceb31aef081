"""Dropout: the calculus; the mask is drawn by kernels/dropout.py, under the key that nanocnn.random gives."""

from __future__ import annotations

import math

from .. import random
from ..kernels import dropout as kernels
from ..kernels.dispatch import device_of, to_device
from ..tensor import Op, Tensor
from .basic import need_floats


class Dropout(Op):
    def forward(self, x, *, p, key):
        samples, place = (to_device(a, device_of(x)) for a in (key.samples, key.place))
        rows = x.reshape(len(samples), math.prod(x.shape) // max(1, len(samples)))
        y, mask = kernels.dropout(rows, samples, p, place)
        self.p = p
        self.save(mask)
        return y.reshape(x.shape)

    def backward(self, gy):
        (mask,) = self.saved
        return kernels.dropout_grad(gy.reshape(mask.shape), mask, self.p).reshape(gy.shape)


def dropout(x: Tensor, p: float = 0.5, training: bool = True) -> Tensor:
    """In training, zero with probability p and x / (1 - p) otherwise (Srivastava et al. 2014); else x itself.

    The first axis of x is the batch. Inside `random.keyed(epoch, samples)` the mask is that of these samples; outside,
    each call draws a new one. Raises ValueError unless p is from 0 to 1.
    """
    if not 0 <= p <= 1:
        raise ValueError(f"dropout: p={p!r}, expected a probability from 0 to 1")
    if not training or p == 0:
        return x
    need_floats("dropout", x)
    if x.ndim == 0:
        raise ValueError("dropout of a scalar: expected a batch, (N, ...)")
    return Dropout.apply(x, p=p, key=random.next_key(len(x)))
