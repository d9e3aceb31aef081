"""Example calls for the registry test: batches from bytes."""

from __future__ import annotations

import numpy as np


def augment(rng, dtype):
    wide = np.result_type(dtype, np.float32)
    calls = []
    for (n, height, width, channels), sizes in [
        ((70, 9, 12, 3), (4, True, 3)),  # more than a block of the CPU's tables, and of threads
        ((5, 7, 8, 1), (6, False, 7)),
        ((3, 1, 5, 2), (0, True, 1)),
        ((4, 8, 8, 4), (0, False, 4)),
        ((4, 6, 5, 3), (2, True, 0)),
        ((2, 5, 5, 3), (0, False, 0)),
        ((0, 5, 5, 3), (1, True, 1)),
    ]:
        images = rng.integers(0, 256, (6, height, width, channels), dtype=np.uint8)
        numbers = rng.uniform(0.01, 2, (2, channels)).astype(wide)
        args = images, rng.integers(0, 6, n), *numbers, *sizes, 2**40 + 3, 2
        calls += [(args, {"out": np.full((n, *images.shape[1:]), np.nan, dtype)})] + [(args, {})] * (dtype == wide)
    return calls


CASES = {"augment": augment}
