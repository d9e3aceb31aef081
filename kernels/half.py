"""Half precision on the CPU: float16 and bfloat16 are computed in float32 and rounded once, as the GPU's kernels do.

A GPU multiplies halves and adds up in float32 (kernels/cuda: `real` and `sum`). NumPy would add many halves up as
halves, where 2048 + 1 is 2048 (in bfloat16 already 256 + 1 is 256), and Numba has no halves at all. What is said of a
half here goes for both types (narrow.py). There are two things:

- `in_float32` under `@Primitive` makes a reference that sums do right, on any device.
- The variant `fp32` of each primitive that has faster ones on the CPU: it converts, calls the primitive again, which
  takes its fastest rung for float32, and rounds. The numbers are the GPU's; the time is float32's and the conversions'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from .dispatch import ChoiceError, Primitive, aside, primitives
from .memory import empty
from .narrow import HALVES, NARROW

SINGLE = np.dtype(np.float32)


def dtype_of(choice: str) -> np.dtype:
    """The dtype of "fp16" or "bf16". Raises ChoiceError, with the remedy, where the package is missing that has it."""
    dtype = NARROW[choice].dtype
    if dtype is None:
        raise ChoiceError(
            f"{choice} needs the package ml_dtypes, which has a bfloat16 for NumPy: "
            "python -m pip install 'ml_dtypes>=0.5'"
        )
    return dtype


def is_half(x: Any) -> bool:
    return getattr(x, "dtype", None) in HALVES


def cast(x: Any, dtype: Any) -> Any:
    """`x` in another dtype. What is too large for that becomes infinite without a warning: somebody looks for it."""
    with np.errstate(over="ignore"):
        return x.astype(dtype)


def in_float32(reference: Callable | None = None, *, sums: tuple[int, ...] = ()) -> Callable:
    """A reference that computes halves among its arguments in float32, and rounds float32 results to their dtype.

    `sums` are the places of results that stay float32, such as statistics: others go on computing with them.
    """
    if reference is None:
        return functools.partial(in_float32, sums=sums)

    @functools.wraps(reference)
    def body(*args: Any, **kwargs: Any) -> Any:
        half = half_of(*args, **kwargs)
        if half is None:
            return reference(*args, **kwargs)
        wide = {name: cast(a, SINGLE) if is_half(a) else a for name, a in kwargs.items()}
        result = reference(*(cast(a, SINGLE) if is_half(a) else a for a in args), **wide)
        return _rounded(result, sums, lambda r: cast(r, half))

    setattr(body, "sums", sums)  # noqa: B010  mypy forbids it otherwise
    return body


def half_of(*args: Any, **kwargs: Any) -> np.dtype | None:
    """The dtype of the halves among the arguments, of the first ones; None if there are none."""
    return next((a.dtype for a in (*args, *kwargs.values()) if is_half(a)), None)


def halves(*args: Any, **kwargs: Any) -> bool:
    """Whether there are halves among the arguments."""
    return half_of(*args, **kwargs) is not None


def _rounded(result: Any, sums: tuple[int, ...], narrow: Callable[[Any], Any]) -> Any:
    """float32 arrays among the results as halves, but for `sums`."""
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
        """halves in float32, by the rung that is fastest there, and rounded once"""
        given = *args, *kwargs.values()
        half = half_of(*given)
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
        return _rounded(result, sums, lambda r: _narrowed(r, half))

    return fp32


def _widened(x: np.ndarray) -> np.ndarray:
    wide = empty(x.shape, SINGLE)
    aside(np.copyto, wide, x)
    return wide


def _narrowed(x: np.ndarray, dtype: Any) -> np.ndarray:
    narrow = empty(x.shape, dtype)
    aside(_round, narrow, x)
    return narrow


def _round(narrow: np.ndarray, wide: np.ndarray) -> None:
    with np.errstate(over="ignore"):
        np.copyto(narrow, wide, casting="same_kind")
