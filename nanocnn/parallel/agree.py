"""Making ranks alike: the same parameters at the start, the same running statistics before they are used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..buckets import Bucket
from ..kernels.dispatch import device_of, to_device
from ..kernels.narrow import is_float
from .comm import Comm


def broadcast_parameters(buckets: Sequence[Bucket], buffers: Iterable[tuple[str, Any]], comm: Comm) -> None:
    """Give all ranks rank 0's parameters and buffers (`module.named_buffers()`), in place."""
    for array in [*(bucket.data for bucket in buckets), *(buffer.data for _, buffer in buffers)]:
        on_host = comm.broadcast(to_device(array, "cpu"))
        if on_host is not array:
            array[...] = to_device(on_host, device_of(array))


def average_buffers(buffers: Iterable[tuple[str, Any]], comm: Comm, samples: float = 1) -> None:
    """Let all ranks' buffers (`module.named_buffers()`) agree, in place: each rank saw only its part of the batches.

    Floating-point buffers become their mean, weighted by `samples`, the number that this rank has seen (equal, if it is
    not given). A variance is not the mean of variances where the means differ: `x.running_var` beside `x.running_mean`
    becomes the mean of the variances plus the variance of the means (Chan, Golub and LeVeque, "Updating formulae and a
    pairwise algorithm for computing sample variances", 1979). Counters, and what is no floating-point number, are taken
    from rank 0. Raises ValueError, on all ranks, if no rank has seen a sample.
    """
    mine = {name: buffer.data for name, buffer in buffers}
    own = {name: to_device(array, "cpu") for name, array in mine.items()}
    if comm.size == 1 or not own:
        return
    seen, states = zip(*comm.all_gather_object((samples, own)), strict=True)
    if not sum(seen) > 0:
        raise ValueError("no rank has seen a sample: there are no running statistics to average")

    def mean(arrays: Iterable[np.ndarray]) -> np.ndarray:
        return sum(a.astype(np.float64) * (n / sum(seen)) for a, n in zip(arrays, seen, strict=True))  # type: ignore

    for name, array in own.items():  # each rank does the same sums in the same order: the same bits everywhere
        if not is_float(array.dtype):
            _write(mine[name], states[0][name])
            continue
        average = mean(state[name] for state in states)
        beside = name.removesuffix("running_var") + "running_mean"
        if name.endswith("running_var") and beside in own:
            middle = mean(state[beside] for state in states)
            average += mean((state[beside] - middle) ** 2 for state in states)
        _write(mine[name], average)


def _write(array: Any, values: np.ndarray) -> None:
    array[...] = to_device(values.astype(array.dtype, copy=False), device_of(array))
