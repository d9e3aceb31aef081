"""Is a captured function the function that was captured? It is tried on other values. For capture.py.

Other values of the inputs, and of what the calls find where it always lies, the weights above all: a kernel may have
read a copy of them that NumPy made, and that no call makes again.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from . import random
from .kernels.dispatch import describe
from .kernels.narrow import is_float
from .tape import CaptureError, arrays_in
from .tensor import Tensor

CHUNK = 1 << 16  # numbers that are moved at once: a second copy of the weights would double a step's memory


class Trial:
    """Compares what two functions return and what they leave in `state`: gradients, and what is changed in place.

    First with other inputs and other values in `standing`, then with the inputs that it was given. `put_back` is called
    before each run. Raises CaptureError for integers that are all alike: which others are valid, nobody knows.
    """

    def __init__(self, inputs: list[np.ndarray], standing: list, state: list, put_back: Callable[[], None]):
        rng, others = np.random.default_rng(0), []
        for x in inputs:
            other = rng.permutation(x.reshape(-1)).reshape(x.shape)  # of integers such as labels these are valid, too
            if is_float(x.dtype):
                other = other + rng.standard_normal(x.shape).astype(x.dtype)
            elif x.size and (x == x.reshape(-1)[0]).all():
                raise CaptureError(
                    f"the example {describe((x,), {})} is {x.reshape(-1)[0]} everywhere: a recording is tried on other "
                    "values, which of integers are the same ones in another order. Give an example with several"
                )
            others.append(other)
        self.tries: Any = (others, standing), ([x.copy() for x in inputs], [])
        self.state, self.put_back = state, put_back

    def results(self, function: Callable[..., Any]) -> list[tuple[list[np.ndarray], list[bytes]]]:
        """For each try, what the function returns, and digests of what it leaves."""
        found = []
        for values, standing in self.tries:
            for x in self.state:
                x[...] = 0
            self.put_back()
            with random.repeated(), disturbed(standing):
                y = [x.copy() for x in arrays_in(function(*map(Tensor, values)))]
                left = [hashlib.sha256(np.ascontiguousarray(x).data).digest() for x in self.state]
            found.append((y, left))
        return found

    def compare(self, expected: list, found: list) -> None:
        """Raise CaptureError unless all is the same, bit by bit."""
        for (y, left), (y_here, left_here) in zip(expected, found, strict=True):
            same = [np.array_equal(a, b, equal_nan=is_float(a.dtype)) for a, b in zip(y, y_here, strict=True)]
            if not all(same) or left != left_here:
                off = max((np.max(np.abs(a - b), initial=0) for a, b in zip(y, y_here, strict=True)), default=0)
                arrays = sum(a != b for a, b in zip(left, left_here, strict=True))
                raise CaptureError(
                    "the calls that were recorded do not compute what the function does: on other values results "
                    f"differ by up to {off:.3g}, and {arrays} of {len(left)} arrays that are changed in place or "
                    "gradients. Something in it works on values outside of kernels and ops (NumPy, Python, a random "
                    "draw): leave it outside of the capture"
                )


@contextlib.contextmanager
def disturbed(arrays: list[np.ndarray]) -> Iterator[None]:
    """Inside, these arrays hold other values, though no second copy of them is made: they are turned end for end.

    Where all numbers are the same, such as the zeros of a new bias, something is added to them.
    """
    undo: list[Callable[[], None]] = []
    rng = np.random.default_rng(1)
    try:
        for x in arrays:
            x = x if x.flags.c_contiguous else x.T
            if not x.flags.c_contiguous or not x.size:
                continue  # a part of an array: it is turned with the whole
            flat = x.reshape(-1)
            chunks = [flat[i : i + CHUNK] for i in range(0, flat.size, CHUNK)]
            if all((chunk == flat[0]).all() for chunk in chunks):
                undo.append(partial(flat.fill, flat[0]))
                for chunk in chunks:
                    chunk += rng.uniform(0.05, 0.1, chunk.size).astype(flat.dtype)
            else:
                undo.append(partial(_turn, flat))
                _turn(flat)
        yield
    finally:
        for step in reversed(undo):
            step()


def _turn(flat: np.ndarray) -> None:
    """Last number first, in place."""
    half = flat.size // 2
    for i in range(0, half, CHUNK):
        end = min(half, i + CHUNK)
        front = flat[i:end].copy()
        flat[i:end] = flat[flat.size - end : flat.size - i][::-1]
        flat[flat.size - end : flat.size - i] = front[::-1]
