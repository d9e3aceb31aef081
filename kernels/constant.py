"""Weights that no longer change, and what the kernels make of them.

Most kernels lay weights out anew before they use them: in panels for the register tile, in planes for Winograd. In
training that must be done at every step, since the weights change, and costs little beside a batch of images; at
inference with one image it can cost more than the convolution. So `nn.freeze()` declares weights constant, and a kernel
asks for its layout with `derived`: made at the first call, kept as long as the weights live.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable

import numpy as np

_kept: dict[int, dict[Hashable, np.ndarray]] = {}  # by the id of a constant: what was made of it


def constant(x: np.ndarray) -> np.ndarray:
    """`x` as an array that nobody can write to, and of which kernels may keep what they make. Its memory is shared."""
    x = x.view()
    if isinstance(x, np.ndarray):
        x.flags.writeable = False  # CuPy's arrays have no such flag
    _keep(x)
    return x


def is_constant(x: np.ndarray) -> bool:
    """Whether it is an array that `constant` returned; a view of one is not."""
    return id(x) in _kept


def derived(x: np.ndarray, what: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
    """What `make()` makes of `x`, by the name of `what`; of a constant, it is made once, and is a constant itself.

    It must not hold on to `x`, or `x` would never die; to the memory of `x` it may.
    """
    kept = _kept.get(id(x))
    if kept is None:
        return make()
    if what not in kept:
        kept[what] = make()
        _keep(kept[what])
    return kept[what]


def _keep(x: np.ndarray) -> None:
    """Until it dies, and another array may have its id."""
    _kept[id(x)] = {}
    weakref.finalize(x, _kept.pop, id(x), None).atexit = False
