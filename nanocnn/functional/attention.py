"""Scaled dot-product attention (Vaswani et al. 2017, section 3.2.1), composed of the ops that it is made of."""

from __future__ import annotations

import math

from ..tensor import Tensor
from .loss import softmax


def scaled_dot_product_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(..., L, D), (..., S, D), (..., S, E) -> (..., L, E): softmax(q k^T / sqrt(D)) v."""
    if q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise ValueError(
            f"attention of q {q.shape}, k {k.shape}, v {v.shape}: expected (..., L, D), (..., S, D), (..., S, E)"
        )
    axes = (*range(k.ndim - 2), k.ndim - 1, k.ndim - 2)
    scores = (q @ k.transpose(axes)) * (1 / math.sqrt(q.shape[-1]))
    return softmax(scores) @ v
