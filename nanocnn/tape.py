"""Writes down what a function does with arrays: calls of compiled functions, and of NumPy's. For capture.py.

Numba's functions are heard as Python calls them. What NumPy does nobody hears: so references of primitives, variants in
which nothing is heard, ops that call no primitive, and whatever is given to `dispatch.aside`, are written down whole,
each as one call. Views are no calls: they lie where what they are views of lies.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba.core.registry import CPUDispatcher

from .kernels import dispatch, memory
from .kernels.dispatch import describe
from .kernels.narrow import is_float
from .tensor import Arrival, Op, Tensor


class CaptureError(RuntimeError):
    """A function that cannot be captured, or a captured one called with something else than what it was made for."""


class Place(NamedTuple):
    """An array in memory that the pool has lent."""

    loan: int  # its number
    offset: int  # bytes
    shape: tuple[int, ...]
    dtype: np.dtype
    strides: tuple[int, ...]


class Output(NamedTuple):
    """A tensor there."""

    data: Place


class Call(NamedTuple):
    """One call: of a compiled function, or of one of NumPy's, whose result is copied to where it lay."""

    name: str  # of the primitive or op that it belongs to
    variant: str
    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    result: Any
    reads: tuple = ()  # places that the function reads besides: what an op has saved

    def __call__(self) -> None:
        places = arrays_in(self.result)
        for x, y in zip(arrays_in(_as_arrays(self.function(*self.args, **self.kwargs))), places, strict=True):
            if x.shape != y.shape:
                raise CaptureError(f"{self}: it was captured with a result of shape {y.shape}, and now has {x.shape}")
            if x is not y:
                np.copyto(y, x)

    def __str__(self) -> str:
        function = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{f'{self.name}: {self.variant}':32} {function:22} {describe(tuple(arrays_in(self.args)), {})}"


class Tape(dispatch.Recorder):
    """Writes down the calls that this thread makes, and where their arrays lie.

    It keeps no array alive that the pool has lent: recording a function takes no more memory than running it.
    """

    def __init__(self, lent: memory.Lent) -> None:
        self.lent, self.thread = lent, threading.get_ident()
        self.calls: list[Call] = []
        self.gradients: list[np.ndarray] = []
        self.changed: dict[tuple, tuple[np.ndarray, np.ndarray]] = {}  # in place: an array, and what it held before
        self.within = ("", "")  # the primitive that runs, and its variant
        self.listens = True
        self._whole_forward: list[Op] = []

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, every call from Python into compiled code passes by here."""
        into_compiled_code = CPUDispatcher.__call__

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            result = into_compiled_code(function, *args, **kwargs)
            if self.mine():
                self.no_number(result, getattr(function, "__name__", "a compiled function"))
                self.add(*self.within, function, args, kwargs, result)
            return result

        setattr(CPUDispatcher, "__call__", call)  # noqa: B010  mypy forbids it otherwise
        dispatch.recorder = self
        try:
            yield
        finally:
            dispatch.recorder = None
            delattr(CPUDispatcher, "__call__")  # what it inherits is left

    def mine(self) -> bool:
        return self.listens and threading.get_ident() == self.thread

    def no_number(self, result: Any, name: str) -> None:
        """Refuse what would let Python compute with a value. (What NumPy makes of a 0-d array stays one here.)"""
        if isinstance(result, float | np.floating):
            raise CaptureError(
                f"{name} returned a number, with which Python could compute or choose: that cannot be recorded. Leave "
                "it outside of the capture"
            )

    def place(self, x: Any) -> Any:
        """`x` with a Place for each array that the pool has lent."""

        def placed(y: Any) -> Any:
            if isinstance(y, Tensor):
                return y if self.lent.find(y.data) is None else Output(placed(y.data))
            found = self.lent.find(y)
            return y if found is None else Place(*found, y.shape, y.dtype, y.strides)

        return each(x, placed)

    def add(
        self, name: str, variant: str, function: Any, args: tuple, kwargs: dict, result: Any, reads: Any = ()
    ) -> None:
        kwargs = {key: self.place(value) for key, value in kwargs.items()}
        result = self.place(result) if arrays_in(result) else None
        self.calls.append(Call(name, variant, function, self.place(args), kwargs, result, self.place(tuple(reads))))

    # ---------------------------------------------------------------- what dispatch and Tensor call

    def kernel(self, primitive: dispatch.Primitive, variant: dispatch.Variant, args: tuple, kwargs: dict) -> Any:
        if not self.mine():
            return variant.body(*args, **kwargs)
        if primitive.inplace:
            for x in arrays_in((args, tuple(kwargs.values()))):
                if x.flags.writeable and self.lent.find(x) is None:  # what the function itself made is nobody's state
                    self.changed.setdefault(key_of(x), (x, x.copy()))
        before, self.within, calls = self.within, (primitive.name, variant.name), len(self.calls)
        try:
            if variant.name == "reference":
                result = self.whole(variant.body, args, kwargs)
            else:
                result = _as_arrays(variant.body(*args, **kwargs))
                if len(self.calls) == calls:  # it called nothing that was heard, such as one of Numba's ufuncs
                    self.add(*self.within, variant.body, args, kwargs, result)
        finally:
            self.within = before
        self.no_number(result, primitive.name)
        return result

    def op(self, op: Op, kind: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        calls, saved = len(self.calls), op.saved or ()
        result = _as_arrays(function(*args, **kwargs))
        if not self.mine() or len(self.calls) > calls:
            return result
        # no primitive: NumPy did it, or it is a view and nothing was done
        given = arrays_in((args, tuple(kwargs.values()), saved))
        if all(any(np.may_share_memory(x, y) for x in given) for y in arrays_in(result)):
            return result
        if kind == "forward":
            self._whole_forward.append(op)
            self.add(type(op).__name__, kind, function, args, kwargs, result, op.saved or ())
        elif any(op is other for other in self._whole_forward):  # at each call, forward saves anew
            self.add(type(op).__name__, kind, function, args, kwargs, result, saved)
        else:
            self.add(type(op).__name__, kind, partial(_backward_with, op), (*args, tuple(saved)), kwargs, result)
        return result

    def aside(self, function: Callable, args: tuple) -> Any:
        if not self.mine():
            return function(*args)
        if isinstance(function, Arrival):
            self.gradients.append(function.leaf.grad_buffer)
        return self.whole(function, args, {})

    def looked(self) -> None:
        if self.mine():
            raise CaptureError(
                "the function looks at the values of a tensor (item(), numpy()), which Python could compute with: that "
                "cannot be recorded. Return the tensor, and look at it outside"
            )

    def whole(self, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run it, and write it down as one call."""
        self.listens = False
        try:
            result = _as_arrays(function(*args, **kwargs))
        finally:
            self.listens = True
        self.add(*self.within, function, args, kwargs, result)
        return result

    # ---------------------------------------------------------------- what came of it

    def found(self) -> dict[tuple, np.ndarray]:
        """The arrays of floats that the calls read or write and that the pool has not lent, by place and shape."""
        arrays = [x for c in self.calls for x in those_in((c.args, tuple(c.kwargs.values())), np.ndarray)]
        return {key_of(x): x for x in arrays if is_float(x.dtype) and x.flags.writeable}

    def put_back(self) -> None:
        """What primitives have changed in place is what it was; of arrays that overlap, the first one changed, last."""
        for x, before in reversed(self.changed.values()):
            x[...] = before


def _backward_with(op: Op, gy: Any, saved: tuple) -> Any:
    op.saved = saved
    return op.backward(gy)


# ------------------------------------------------------------------ arrays in arguments


def each(x: Any, do: Callable[[Any], Any]) -> Any:
    """`x` with `do(a)` for each array, tensor or place `a` in it: in tuples, named ones and lists."""
    if isinstance(x, np.ndarray | Tensor | Place | Output):
        return do(x)
    if isinstance(x, tuple | list):
        items = [each(item, do) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def those_in(x: Any, kind: type) -> list[Any]:
    """Those arrays and places in `x` that are of this kind, in order; a tensor's are meant, too."""
    found: list[Any] = []
    each(x, lambda y: found.append(y.data if isinstance(y, Output | Tensor) else y))
    return [y for y in found if isinstance(y, kind)]


def arrays_in(x: Any) -> list[np.ndarray]:
    """The arrays in `x`, in order."""
    return those_in(x, np.ndarray)


def key_of(x: np.ndarray) -> tuple:
    """Where an array lies, and how."""
    return memory.address(x), x.shape, x.strides


def _as_arrays(x: Any) -> Any:
    """NumPy makes a number of the sum of an array, and a number has no place to which the next one could be copied.

    Nor has a result that nobody may write to.
    """
    if isinstance(x, np.generic):
        return np.asarray(x)
    if isinstance(x, tuple) and any(isinstance(item, np.generic) for item in x):
        items = [_as_arrays(item) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else tuple(items)
    return x


def as_array(x: Any) -> Any:
    """The array of a tensor; an array of what is neither."""
    x = x.data if isinstance(x, Tensor) else x
    return x if hasattr(x, "dtype") else np.asarray(x)


def checked(y: Any) -> Any:
    """The result of a function that is to be captured: a tensor, or a tuple of them."""
    if isinstance(y, Tensor) or (isinstance(y, tuple) and all(isinstance(item, Tensor) for item in y)):
        return y
    raise CaptureError(f"a captured function returns a tensor or a tuple of tensors, not {type(y).__name__}")


def arrays_like(example: list[Any], inputs: tuple) -> list[Any]:
    """The inputs as arrays. Raises CaptureError on other shapes or dtypes than the example's."""
    arrays = [as_array(x) for x in inputs]
    if [(x.shape, x.dtype) for x in arrays] != [(x.shape, x.dtype) for x in example]:
        raise CaptureError(
            f"captured for {describe(tuple(example), {})}, called with {describe(tuple(arrays), {})}: "
            "capture the function once more, for these"
        )
    return arrays
