"""The ladder of one primitive: every variant on the same call, checked against the reference, then timed in turn.

What a call computes and how wrong that is, is here for those, too, who count (traffic.py) or try launches (sweep.py).
"""

from __future__ import annotations

import copy
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .example_calls import BenchError
from .kernels import dispatch
from .kernels.dispatch import Primitive, Variant
from .kernels.narrow import is_float

ROUNDS = 7  # visits to each variant: what else the machine does then meets all of them alike
VISIT = 0.02  # seconds of one visit, or one call if that takes longer
REFUSED = "cannot do this call"  # a note
TOLERANCES = {"float32": 1e-3, "float64": 1e-9}  # largest error over largest value; beyond it a variant is wrong


@dataclass
class Result:
    """One variant on one call. `seconds` holds the time of each call; none if it was not measured, and `note` says why.

    flops and bytes: the least that the call must do (Primitive.work), for every variant those of the direct algorithm,
    so that a rate is comparable, and one above the peak means fewer operations. error: largest difference from the
    reference in float64, over its largest value.
    """

    primitive: str
    variant: str
    about: str
    place: str
    flops: float
    bytes: float
    seconds: list[float] = field(default_factory=list)
    error: float | None = None
    note: str = ""
    wrong: bool = False

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def minimum(self) -> float:
        """Seconds."""
        return min(self.seconds)

    @property
    def gflops(self) -> float:
        """10^9 operations a second, at the median."""
        return self.flops / self.median / 1e9

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes a second, at the median."""
        return self.bytes / self.median / 1e9

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields, and the figures that follow from them."""
        figures = {}
        if self.seconds:
            names = ("median", "minimum", "gflops", "gb_per_s", "intensity")
            figures = {name: getattr(self, name) for name in names if name != "intensity" or self.bytes}
        return dataclasses.asdict(self) | figures


def ladder(
    primitive: str | Primitive,
    *args: Any,
    rounds: int = ROUNDS,
    limit: float = math.inf,
    say: Callable[[str], None] = lambda line: None,
    **kwargs: Any,
) -> list[Result]:
    """Measure every variant of `primitive` on the call with these arguments; the reference first, then the ladder.

    Each is checked against the reference in float64 first. Then they are timed in turn (A B C A B C), `rounds` times;
    a variant whose single call takes longer than `limit` seconds is not. The reference runs with every primitive that
    it calls at its reference too: the textbook's version. `say` is told what happens meanwhile.

    Raises BenchError on an unknown primitive.
    """
    p = primitive_of(primitive)
    flops, moved = p.count_work(*args, **kwargs) if p.count_work else (0.0, 0.0)
    able, device = p.candidates(*args, **kwargs), dispatch.device_of_call(args, kwargs)
    results, runs = [], []
    say(f"{p.name}: the reference in float64")
    want = outputs(p, p.variants["reference"], *in_float64(args, kwargs))
    for variant in p.rungs(device).values():
        about = (variant.__doc__ or "").strip().partition("\n")[0]
        result = Result(p.name, variant.name, about, variant.place, flops, moved)
        results.append(result)
        if variant not in able:
            result.note = REFUSED
            continue
        say(f"{p.name}={variant.name}: checking, and compiling where it must")
        start = time.perf_counter()
        result.error = error_of(outputs(p, variant, args, kwargs), want)
        first = time.perf_counter() - start
        tolerance = TOLERANCES.get(_dtype_of(args, kwargs), math.inf)
        if result.error > tolerance:
            result.wrong = True
            result.note = f"WRONG by {result.error:.1e} of the largest value, where {tolerance:g} is allowed"
            continue
        own = copy.deepcopy((args, kwargs)) if p.inplace else (args, kwargs)
        if first > limit or first > VISIT:  # it may have been the compiler
            first = _seconds(variant, own, 1)[0]
        if first > limit:
            result.note = f"a call takes {first:.3g} s, the limit is {limit:g} s"
            continue
        runs.append((result, variant, own, max(1, min(100, int(VISIT / max(first, 1e-9))))))
    for number in range(rounds):
        say(f"{p.name}: round {number + 1} of {rounds}")
        for result, variant, own, calls in runs:
            if sum(result.seconds) <= 3 * limit:
                result.seconds += _seconds(variant, own, calls)
    return results


# ------------------------------------------------------------------ a call, and whether it is right


def primitive_of(primitive: str | Primitive) -> Primitive:
    """The primitive of a name. Raises BenchError if there is none."""
    if isinstance(primitive, Primitive):
        return primitive
    if primitive not in dispatch.primitives:
        raise BenchError(f"there is no primitive {primitive!r}; there are: {', '.join(sorted(dispatch.primitives))}")
    return dispatch.primitives[primitive]


def _body(variant: Variant, args: tuple, kwargs: dict) -> Any:
    """Call it. The reference calls references, any other variant what is chosen now."""
    if variant.name != "reference":
        return variant.body(*args, **kwargs)
    with dispatch.using("reference"):
        return variant.body(*args, **kwargs)


def _seconds(variant: Variant, call: tuple[tuple, dict], calls: int) -> list[float]:
    args, kwargs = call
    times = []
    for _ in range(calls):
        start = time.perf_counter()
        _body(variant, args, kwargs)
        times.append(time.perf_counter() - start)
    return times


def outputs(p: Primitive, variant: Variant, args: tuple, kwargs: dict) -> list[np.ndarray]:
    """The arrays that a call returns, and those that it changes."""
    if p.inplace:
        args, kwargs = copy.deepcopy((args, kwargs))
    result = _body(variant, args, kwargs)
    return list(_arrays([result, args, kwargs] if p.inplace else result))


def _arrays(value: Any) -> Iterable[np.ndarray]:
    if isinstance(value, np.ndarray | np.generic):
        yield np.asarray(value)
    elif hasattr(value, "get") and hasattr(value, "dtype"):  # an array of CuPy
        yield value.get()
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)


def in_float64(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """A call with its floats as float64."""

    def wide(a: Any) -> Any:
        if isinstance(a, list):
            return [*map(wide, a)]
        return a.astype(np.float64) if isinstance(a, np.ndarray) and is_float(a.dtype) else a

    return tuple(map(wide, args)), {name: wide(a) for name, a in kwargs.items()}


def _dtype_of(args: tuple, kwargs: dict) -> str:
    """The type of floats with the fewest digits: hyper-parameters in float64 may stand beside weights in float32."""
    floats = [a.dtype for a in _arrays([args, kwargs]) if is_float(a.dtype)]
    return min(floats, key=lambda dtype: dtype.itemsize).name if floats else ""


def error_of(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """The largest difference over the largest value, of the worst pair of arrays; infinite where shapes differ."""
    if [a.shape for a in got] != [a.shape for a in want]:
        return math.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if a.size:
            scale = float(np.abs(b.astype(np.float64)).max()) or 1.0
            difference = float(np.abs(a.astype(np.float64) - b).max())
            worst = max(worst, difference / scale) if math.isfinite(difference) else math.inf
    return worst
