"""Loading a state: arrays by name into arrays by name, all or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .kernels.dispatch import xp_of


def copy_by_name(what: str, mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
    """Copy `theirs` into the arrays `mine`. Raises ValueError, and copies nothing, if names or shapes differ."""
    wrong = [f"missing: {name} {mine[name].shape}" for name in mine if name not in theirs]
    wrong += [f"unexpected: {name} {np.shape(theirs[name])}" for name in theirs if name not in mine]
    wrong += [
        f"{name}: expected shape {mine[name].shape}, got {np.shape(theirs[name])}"
        for name in mine
        if name in theirs and mine[name].shape != np.shape(theirs[name])
    ]
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise ValueError(f"{what} cannot be loaded from this: " + "; ".join(wrong[:8]) + more)
    for name, array in mine.items():
        array[...] = xp_of(array).asarray(theirs[name])
