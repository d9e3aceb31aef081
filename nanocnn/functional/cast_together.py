"""Weights in the dtype of the activations, cast a bucket at a time: on a GPU a launch a bucket, not one a parameter.

    with cast_together(buckets, x.dtype):
        logits = model(x)

Inside, the cast that a layer makes of its parameter (basic.py) is a view into its bucket's. Nobody may write
to the weights there. Outside there is no such copy: it is made anew for each step, and cannot be an old one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..kernels.dispatch import aside, span
from ..kernels.half import cast
from ..kernels.narrow import is_float
from ..tensor import Tensor

_made: dict[int, tuple[Any, Any]] = {}  # by the id of a parameter: its array, and that in the other dtype


@contextlib.contextmanager
def cast_together(buckets: Sequence[Any], dtype: Any) -> Iterator[None]:
    """Inside, the parameters of these buckets (../buckets.py) that are of another dtype are there in `dtype`, too."""
    global _made
    made: dict[int, tuple[Any, Any]] = {}
    with span("cast weights", "forward"):
        for bucket in buckets:
            if is_float(np.dtype(dtype)) and bucket.data.dtype != dtype:
                flat = aside(cast, bucket.data, dtype)
                for p, where in zip(bucket.params, bucket.slices, strict=True):
                    made[id(p)] = p.data, flat[where].reshape(p.shape)
    before, _made = _made, made
    try:
        yield
    finally:
        _made = before


def made_of(p: Tensor, dtype: Any) -> Any:
    """The array of `p` in another dtype, if it was made; else None."""
    data, found = _made.get(id(p), (None, None))
    return found if data is p.data and found is not None and found.dtype == dtype else None
