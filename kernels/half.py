"""Half precision on the CPU: float16 is computed in float32 and rounded once, which is what the GPU's kernels do.

A GPU multiplies halves and adds up in float32 (kernels/cuda: `real` and `sum`). NumPy would add many halves up in
float16, where 2048 + 1 is 2048, and Numba has no halves at all. So there are two things here:

- `in_float32` under `@Primitive` makes a reference that sums do right, on any device.
- The variant `fp32` of each primitive that has faster ones on the CPU: it converts, calls the primitive again, which
  takes its fastest rung for float32, and rounds. The numbers are the GPU's; the time is float32's and the conversions'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .dispatch import Primitive, aside, primitives
from .memory import empty

HALF, SINGLE = np.dtype(np.float16), np.dtype(np.float32)
LARGEST = 65504.0  # the largest finite half
SMALLEST = 2.0**-24  # the smallest that is not 0


def is_half(x: Any) -> bool:
    return getattr(x, "dtype", None) == HALF


def cast(x: Any, dtype: Any) -> Any:
    """`x` in another dtype. What is too large for float16 becomes infinite without a warning: somebody looks for it."""
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def in_float32(reference: Callable | None = None, *, sums: tuple[int, ...] = ()) -> Callable:
    """A reference that computes float16 arguments in float32, and rounds float32 results to float16.

    `sums` are the places of results that stay float32, such as statistics: others go on computing with them.
    """
    if reference is None:
        return functools.partial(in_float32, sums=sums)

    @functools.wraps(reference)
    def body(*args: Any, **kwargs: Any) -> Any:
        if not halves(*args, **kwargs):
            return reference(*args, **kwargs)
        wide = {name: cast(a, SINGLE) if is_half(a) else a for name, a in kwargs.items()}
        result = reference(*(cast(a, SINGLE) if is_half(a) else a for a in args), **wide)
        return _rounded(result, sums, lambda r: cast(r, HALF))

    setattr(body, "sums", sums)  # noqa: B010  mypy forbids it otherwise
    return body


def halves(*args: Any, **kwargs: Any) -> bool:
    """Whether there is float16 among the arguments."""
    return any(map(is_half, args)) or any(map(is_half, kwargs.values()))


def _rounded(result: Any, sums: tuple[int, ...], narrow: Callable[[Any], Any]) -> Any:
    """float32 arrays among the results as float16, but for `sums`."""
    several = isinstance(result, tuple)
    found = [
        narrow(r) if getattr(r, "dtype", None) == SINGLE and i not in sums else r
        for i, r in enumerate(result if several else (result,))
    ]
    return tuple(found) if several else found[0]


# ------------------------------------------------------------------ the variant `fp32`


PLAIN = ("update", "random")  # families without it: parameters stay float32, and random bits are integers


def offer() -> None:
    """Give the variant `fp32` to each primitive that has faster ones on the CPU, as the rung after the reference."""
    for p in primitives.values():
        rungs = [v.name for v in p.variants.values() if v.device == "cpu"]
        if rungs and p.__module__.rpartition(".")[2] not in PLAIN:
            p.variant("fp32", supports=halves, before=rungs[0])(_by_float32(p))


def _by_float32(p: Primitive) -> Callable:
    sums = getattr(p.__wrapped__, "sums", ())

    def fp32(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        """float16 in float32, by the rung that is fastest there, and rounded once"""
        given = *args, *kwargs.values()
        wide = [_widened(a) if is_half(a) else a for a in given]
        result = p(*wide[: len(args)], **dict(zip(kwargs, wide[len(args) :], strict=True)))
        if p.inplace:  # what it returns, if anything, is its first argument
            for a, w in zip(given, wide, strict=True):
                if is_half(a) and a.flags.writeable:
                    aside(_round, a, w)
            return None if result is None else given[0]
        if out is not None:
            aside(_round, out, result)
            return out
        return _rounded(result, sums, _narrowed)

    return fp32


def _widened(x: np.ndarray) -> np.ndarray:
    wide = empty(x.shape, SINGLE)
    aside(np.copyto, wide, x)
    return wide


def _narrowed(x: np.ndarray) -> np.ndarray:
    narrow = empty(x.shape, HALF)
    aside(_round, narrow, x)
    return narrow


def _round(narrow: np.ndarray, wide: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        np.copyto(narrow, wide, casting="same_kind")
