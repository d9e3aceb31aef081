"""A split that stays in a device's memory, as bytes: a batch costs the host one launch and the sample numbers."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..kernels.augment import augment as kernel
from ..kernels.dispatch import Switch, to_device, xp_of
from .augment import NOTHING, Augment, scale_and_shift
from .datasets import DataError, Split

resident = Switch(
    "resident",
    "where the images lie that a GPU trains with",
    auto="in its memory, if they take less than half of what is free; else on the host",
    on="in its memory, as bytes: cropped, flipped and normalised there",
    off="on the host: batches are made there, and sent one by one (see pinned)",
)

SHARE = 0.5  # of the memory that is free: the rest is for the model and what it keeps for backward


class Resident:
    """Images, labels, and what normalises them, on a device. Raises DataError if the images take too much of it."""

    def __init__(self, split: Split, device: str, dtype: type):
        free = free_bytes(device)
        if free is not None and split.images.nbytes > SHARE * free:
            raise DataError(
                f"{split.source}: {split.images.nbytes / 1e6:,.0f} MB of images, and {free / 1e6:,.0f} MB are free on "
                f"{device!r}, of which they may take {SHARE:.0%}; with resident=off each batch is made "
                "on the CPU and sent"
            )
        self.dtype = dtype
        self.images, self.labels = to_device(split.images, device), to_device(split.labels, device)
        self.scale, self.shift = (to_device(a, device) for a in scale_and_shift(split, dtype))

    def batch(self, samples: np.ndarray, augment: Augment | None, seed: int, epoch: int) -> tuple[Any, Any]:
        """(n, H, W, C) and (n,), as `load_batch` has them."""
        xp = xp_of(self.images)
        index = xp.asarray(samples)
        x = xp.empty((len(samples), *self.images.shape[1:]), self.dtype)
        sizes = (augment or NOTHING).sizes
        return kernel(self.images, index, self.scale, self.shift, *sizes, seed, epoch, out=x), self.labels[index]


def resident_or_none(split: Split, device: str | None, dtype: type) -> Resident | None:
    """What the switch comes to. Raises DataError if `resident=on` cannot be."""
    if device in (None, "cpu") or resident.value == "off":
        return None
    try:
        return Resident(split, str(device), dtype)
    except DataError:
        if resident.value == "on":
            raise
        return None


def free_bytes(device: str) -> int | None:
    """Of a device's memory; None where it is the host's."""
    if device != "cuda":
        return None
    import cupy

    return cupy.cuda.Device().mem_info[0]
