"""Buckets: parameters laid end to end in one flat array, their gradients in another.

Each parameter's `data` and gradient become views, so that there is nothing to pack before a message, one update a
bucket, and a missing gradient is simply zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from .kernels.dispatch import xp_of
from .tensor import Tensor

ALIGNED = 8  # numbers: 16 bytes of halves, which kernels load at once; what begins elsewhere they copy first
DEFAULT_BYTES = 4 << 20  # 1 to 4 MB is where an all-reduce within a host is fastest


class Bucket:
    """Flat `data` and `grad`, with `params`, their `names` and `slices` into both. All of one dtype and device."""

    def __init__(self, names: Sequence[str], params: Sequence[Tensor]):
        self.names, self.params = list(names), list(params)
        ends = [0]
        for p in params:
            ends.append(ends[-1] + p.size)
        self.slices = [slice(a, b) for a, b in itertools.pairwise(ends)]
        xp = xp_of(params[0].data)
        self.data = xp.empty(ends[-1], params[0].dtype)
        for p, where in zip(params, self.slices, strict=True):
            self.data[where] = p.data.reshape(-1)
            p.data = self.data[where].reshape(p.shape)
        self.grad: Any = None
        self.hold_grad_in(xp.zeros_like(self.data))

    @property
    def size(self) -> int:
        return self.data.size

    def hold_grad_in(self, memory: Any) -> None:
        """Let the gradients live in `memory`, a flat array of this size and dtype (a shared window, say).

        Gradients that have arrived move there; the rest of `memory` is left as it is.
        """
        for p, where in zip(self.params, self.slices, strict=True):
            view = memory[where].reshape(p.shape)
            if p.grad is not None:
                view[...] = p.grad
            p.grad_buffer = view
        self.grad = memory

    def zero(self) -> None:
        """Forget the gradients: the next to arrive overwrite the old ones."""
        for p in self.params:
            p.zero_grad()

    def fill_missing(self) -> None:
        """Make the gradient of each parameter that received none zero."""
        for p, where in zip(self.params, self.slices, strict=True):
            if p.grad is None:
                self.grad[where] = 0
                p.grad = p.grad_buffer


def make_buckets(named: Sequence[tuple[str, Tensor]], bucket_bytes: int = DEFAULT_BYTES) -> list[Bucket]:
    """Buckets of about `bucket_bytes`, last parameter first: the order in which backward fills them. Within a bucket,
    those come last whose size is no multiple of ALIGNED.

    A parameter larger than that has a bucket of its own. Parameters of different dtypes never share one.
    """
    buckets: list[Bucket] = []
    held: list[tuple[str, Tensor]] = []

    def close() -> None:
        if held:
            held.sort(key=lambda item: item[1].size % ALIGNED != 0)  # what is odd, last: it would shift all after it
            buckets.append(Bucket(*zip(*held, strict=True)))
            held.clear()

    for name, p in reversed(list(named)):
        if held and (p.dtype != held[0][1].dtype or sum(q.data.nbytes for _, q in held) + p.data.nbytes > bucket_bytes):
            close()
        held.append((name, p))
    close()
    return buckets
