"""Scratch memory that is reused: a fresh large array costs a page fault for every 4 KB of it, at every step."""

from __future__ import annotations

import math
import threading

import numpy as np

_held = threading.local()


def scratch(shape, dtype):
    """An uninitialised array of `shape` in this thread's scratch buffer.

    The next call overwrites it: use it up before calling anything that may ask for scratch memory too.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = getattr(_held, "buffer", None)
    if buffer is None or buffer.size < size:
        buffer = _held.buffer = np.empty(size, np.uint8)
    return buffer[:size].view(dtype).reshape(shape)
