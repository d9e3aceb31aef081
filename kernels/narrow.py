"""The floating-point numbers of 16 bits that activations can be of: all that is known of each is in one table here.

float16 has 11 significant bits and ends at 65504; bfloat16 has 8, and float32's range. NumPy has no bfloat16 of its
own: the package ml_dtypes gives it one, a dtype like others, but whose `kind` is no "f". So ask `is_float`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

try:
    import ml_dtypes
except ImportError:
    BFLOAT16 = None
else:
    BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


class Narrow(NamedTuple):
    """One of them. `dtype` is None where the package is missing that has it."""

    dtype: np.dtype | None
    cuda: str  # its name in CUDA C++
    cublas: int  # and as a cudaDataType
    largest: float
    capability: tuple[int, int] = (0, 0)  # compute capability of the oldest GPU that has it
    cupy: int = 0  # major version of the oldest CuPy that has it


# By the choice of the switch `precision` (nanocnn/precision.py).
NARROW = {
    "fp16": Narrow(np.dtype(np.float16), "half", 2, 65504.0),
    "bf16": Narrow(BFLOAT16, "__nv_bfloat16", 14, float.fromhex("0x1.fep127"), capability=(8, 0), cupy=14),
}
HALVES = {narrow.dtype: narrow for narrow in NARROW.values() if narrow.dtype is not None}


def sum_dtype(dtype: Any) -> np.dtype:
    """What such numbers are summed up in, on any device: float32 for halves, of which a long sum would stop growing."""
    return np.dtype(np.float32) if dtype in HALVES else np.dtype(dtype)


def is_float(dtype: Any) -> bool:
    """Whether a dtype is of floating-point numbers, of 16 bits or more."""
    return dtype.kind == "f" or dtype in HALVES
