"""A function's calls of compiled kernels, recorded once and then made again without the Python between them.

A network of twenty layers runs some two thousand lines of Python for one image: which variant, which shape, which
panels, whose memory. The answers are the same each time. So `capture` runs the function once and writes down what
reaches the compiled code, with the arrays in place; calling the result copies the input to where the input was, makes
the calls one after the other, and copies the output. CUDA calls this a graph.

    model = nn.freeze(model.eval())
    predict = nc.capture(model, images)       # images: an example; its shape is the only one that `predict` takes
    logits = predict(images)
    print(predict)                            # the calls

The function may run backward, too. Then each call leaves the gradients where they were left when it was recorded:

    def loss_of(images, labels):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        return loss

    backward = nc.capture(loss_of, images, labels)
    loss = backward(images, labels)
    optimizer.step()

Since it is known when each array is used first and last, they share one block of memory (arena.py).

What is recorded: calls of Numba's functions, and whole, as one call each, what NumPy does in references of primitives,
in ops that call no primitive, and in `dispatch.aside`. What is not: what else Python computes from the *values* in an
array, which keeps the value that it had. `capture` makes sure that there is no such thing: it compares with the
function itself on other values, bit by bit, and refuses a function for which it is not the same. What does not follow
from the inputs is not noticed: a learning rate, and which epoch it is, are what they were. Nor is a branch that is
taken for other values than these.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numba.core.registry import CPUDispatcher

from . import random
from .arena import Life, arrange
from .kernels import dispatch, memory
from .kernels.dispatch import describe, device_of
from .tensor import Arrival, Op, Tensor


class CaptureError(RuntimeError):
    """A function that cannot be captured, or a captured one called with something else than what it was made for."""


class Call(NamedTuple):
    """One call: of a compiled function, or of one of NumPy's, whose result is copied to where it lay."""

    name: str  # of the primitive or op that it belongs to
    variant: str
    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    result: Any

    def __call__(self) -> None:
        _copy(self.function(*self.args, **self.kwargs), self.result)

    def __str__(self) -> str:
        function = getattr(self.function, "__qualname__", type(self.function).__name__)
        return f"{f'{self.name}: {self.variant}':32} {function:22} {describe(tuple(_arrays(self.args)), {})}"


class Captured:
    """What `capture` returns: call it with arrays or tensors of the shapes and dtypes that it was made with.

    `calls` is what it does, `bytes` the memory that the calls share. Weights and gradients are where they lay: what is
    written into them is seen, what replaces them is not. Threads wait for each other.
    """

    def __init__(self, calls: list[Call], inputs: list[np.ndarray], output: Any, block: np.ndarray):
        self.calls, self.inputs, self.output, self.bytes = calls, inputs, output, block.nbytes
        # Most are compiled functions that return nothing: of those a plain loop over two names is all that is left.
        self._steps = [(c, ()) if c.kwargs or c.result is not None else (c.function, c.args) for c in calls]
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        """What the function would return for these inputs. Raises CaptureError on another shape or dtype."""
        arrays = [_array(x) for x in inputs]
        if [(x.shape, x.dtype) for x in arrays] != [(x.shape, x.dtype) for x in self.inputs]:
            raise CaptureError(
                f"captured for {describe(tuple(self.inputs), {})}, called with {describe(tuple(arrays), {})}: "
                "capture the function once more, for these"
            )
        with self._lock:
            for here, x in zip(self.inputs, arrays, strict=True):
                np.copyto(here, x)
            for function, args in self._steps:
                function(*args)
            return _each(self.output, lambda y: Tensor(y.data.copy()))

    def __str__(self) -> str:
        lines = [f"{i:4}  {call}" for i, call in enumerate(self.calls)]
        return "\n".join([*lines, f"{len(lines)} calls, {self.bytes:,} bytes shared by what lies between them"])


def capture(function: Callable[..., Any], *inputs: Any) -> Captured:
    """Record what `function(*inputs)` does, for tensors or arrays on the CPU.

    The function takes one tensor for each input and returns a tensor, or a tuple of them. It is run four times: to
    compile, to record, and twice to compare; what primitives change in place (running statistics, weights) is put back
    afterwards, and gradients are left as those of the example. Raises CaptureError if it does anything besides calling
    kernels that depends on the values of its inputs, such as a random draw of its own; dropout draws new masks.
    """
    arrays = [_array(x) for x in inputs]
    if any(device_of(x) != "cpu" for x in arrays):
        raise CaptureError("capture records the kernels of the CPU, and was given arrays of another device")
    if dispatch.recorder is not None:
        raise CaptureError("a profile records, and would measure the recording: capture before it begins")
    held = [np.array(x, order="C") for x in arrays]
    first = _Recorder()
    try:
        with random.repeated(), first.recording():  # compiles, and lays out constant weights: not to be repeated
            function(*map(Tensor, held))
        first.put_back()
        with random.repeated(), memory.watched() as lent:
            tape = _Tape(lent, held)
            with tape.recording():
                output = tape.place(_checked(function(*map(Tensor, held))))
        state = [*(x for where, (x, _) in first.changed.items() if where in tape.changed), *tape.gradients]
        trial = _Trial(held, tape.standing(), state, first.put_back)
        expected = trial.results(function)
        memory.trim()  # the block is to take the room of what was lent, not to lie beside it
        captured = _in_one_block(tape.calls, held, output, lent.sizes)
        trial.compare(expected, trial.results(captured))
    finally:
        first.put_back()
    return captured


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


class _Recorder(dispatch.Recorder):
    """Notes what primitives change in place."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.changed: dict[
            tuple[int, int], tuple[np.ndarray, np.ndarray]
        ] = {}  # by address and bytes: an array, and what it held before

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        dispatch.recorder = self
        try:
            yield
        finally:
            dispatch.recorder = None

    def kernel(self, primitive: dispatch.Primitive, variant: dispatch.Variant, args: tuple, kwargs: dict) -> Any:
        if primitive.inplace and threading.get_ident() == self.thread:
            for x in _arrays((args, tuple(kwargs.values()))):
                if x.flags.writeable:
                    self.changed.setdefault((_address(x), x.nbytes), (x, x.copy()))
        return variant.body(*args, **kwargs)

    def put_back(self) -> None:
        """What was changed is what it was."""
        for x, before in self.changed.values():
            x[...] = before


class _Tape(_Recorder):
    """Writes down the calls that this thread makes, and where their arrays lie.

    It keeps no array alive that the pool has lent: the recording takes no more memory than the function.
    """

    def __init__(self, lent: memory.Lent, inputs: list[np.ndarray]) -> None:
        super().__init__()
        self.lent, self.inputs = lent, {_address(x) for x in inputs}
        self.calls: list[Call] = []
        self.gradients: list[np.ndarray] = []
        self.within = ("", "")  # the primitive that runs, and its variant
        self.listens = True

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, every call from Python into compiled code passes by here."""
        into_compiled_code = CPUDispatcher.__call__

        def call(function: Any, *args: Any, **kwargs: Any) -> Any:
            result = into_compiled_code(function, *args, **kwargs)
            if self.mine():
                self.add(*self.within, function, args, kwargs, result)
            return result

        setattr(CPUDispatcher, "__call__", call)  # noqa: B010  mypy forbids it otherwise
        try:
            with super().recording():
                yield
        finally:
            delattr(CPUDispatcher, "__call__")  # what it inherits is left

    def mine(self) -> bool:
        return self.listens and threading.get_ident() == self.thread

    def place(self, x: Any) -> Any:
        """`x` with a Place for each array that the pool has lent."""

        def placed(y: Any) -> Any:
            if isinstance(y, Tensor):
                return Tensor(y.data) if self.lent.find(y.data) is None else Output(placed(y.data))
            found = self.lent.find(y)
            return y if found is None else Place(*found, y.shape, y.dtype, y.strides)

        return _each(x, placed)

    def add(self, name: str, variant: str, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        kwargs = {key: self.place(value) for key, value in kwargs.items()}
        result = self.place(result) if _arrays(result) else None
        self.calls.append(Call(name, variant, function, self.place(args), kwargs, result))

    def kernel(self, primitive: dispatch.Primitive, variant: dispatch.Variant, args: tuple, kwargs: dict) -> Any:
        if not self.mine():
            return variant.body(*args, **kwargs)
        before, self.within = self.within, (primitive.name, variant.name)
        try:
            if variant.name == "reference":
                return self.whole(partial(super().kernel, primitive, variant), variant.body, args, kwargs)
            return super().kernel(primitive, variant, args, kwargs)
        finally:
            self.within = before

    def op(self, op: Op, kind: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        calls = len(self.calls)
        result = _no_scalar(function(*args, **kwargs))
        if self.mine() and len(self.calls) == calls:  # no primitive: NumPy did it, or it is a view and nothing was done
            given = _arrays(args)
            if any(not any(np.may_share_memory(x, y) for x in given) for y in _arrays(result)):
                self.add(type(op).__name__, kind, function, args, kwargs, result)
        return result

    def aside(self, function: Callable, args: tuple) -> Any:
        if not self.mine():
            return function(*args)
        if isinstance(function, Arrival):
            self.gradients.append(function.leaf.grad_buffer)
        return self.whole(lambda args, kwargs: function(*args), function, args, {})

    def standing(self) -> list[np.ndarray]:
        """The floats that the calls find where they always lie: weights above all."""
        found = {}
        for call in self.calls:
            for x in _those((call.args, tuple(call.kwargs.values())), np.ndarray):
                if x.dtype.kind == "f" and x.flags.writeable and _address(x) not in self.inputs:
                    found[_address(x), x.shape] = x
        return list(found.values())

    def whole(self, run: Callable[[tuple, dict], Any], function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run it, and write it down as one call."""
        self.listens = False
        try:
            result = _no_scalar(run(args, kwargs))
        finally:
            self.listens = True
        self.add(*self.within, function, args, kwargs, result)
        return result


def _in_one_block(calls: list[Call], inputs: list[np.ndarray], output: Any, sizes: list[int]) -> Captured:
    """The same calls, with all that the pool had lent in one block; each place in it is used by many."""
    uses = [[p.loan for p in _those((c.args, tuple(c.kwargs.values()), c.result), Place)] for c in calls]
    uses.append([p.loan for p in _those(output, Place)])
    lives: dict[int, Life] = {}
    for when, loans in enumerate(uses):
        for i in loans:
            lives[i] = Life(sizes[i], lives[i].first if i in lives else when, when)
    offsets, size = arrange(list(lives.values()))
    offset = dict(zip(lives, offsets, strict=True))
    block = memory.empty(size, np.uint8)

    def array(p: Any) -> Any:
        if isinstance(p, Place):
            return np.ndarray(p.shape, p.dtype, block, offset[p.loan] + p.offset, p.strides)
        return Tensor(array(p.data)) if isinstance(p, Output) else p

    again = []
    for c in calls:
        kwargs = {name: _each(value, array) for name, value in c.kwargs.items()}
        again.append(c._replace(args=_each(c.args, array), kwargs=kwargs, result=_each(c.result, array)))
    return Captured(again, inputs, _each(output, array), block)


class _Trial:
    """Is it the same function, on other values than those that it was captured with, and then on these again?

    That is what it returns and what it leaves in `state`: gradients, and what is changed in place. Other values are
    those of what is `standing`, too: a kernel may have read a copy of the weights that NumPy made.
    """

    def __init__(self, inputs: list[np.ndarray], standing: list, state: list, put_back: Callable[[], None]):
        rng = np.random.default_rng(0)
        others = [rng.permutation(x.reshape(-1)).reshape(x.shape) for x in inputs]  # of integers these are valid, too
        others = [x + rng.standard_normal(x.shape).astype(x.dtype) if x.dtype.kind == "f" else x for x in others]
        self.tries = (others, 2.0), ([x.copy() for x in inputs], 1.0)
        self.standing, self.state, self.put_back = standing, state, put_back

    def results(self, function: Callable[..., Any]) -> list[tuple[list[np.ndarray], list[bytes]]]:
        """For each try, what the function returns, and digests of what it leaves."""
        found = []
        for values, factor in self.tries:
            for x in self.state:
                x[...] = 0
            self.put_back()
            with random.repeated(), _scaled(self.standing, factor):
                y = _arrays(_checked(function(*map(Tensor, values))))
                left = [hashlib.sha256(np.ascontiguousarray(x).data).digest() for x in self.state]
            found.append(([x.copy() for x in y], left))
        return found

    def compare(self, expected: list, found: list) -> None:
        """Raise CaptureError unless all is the same, bit by bit."""
        for (y, left), (y_here, left_here) in zip(expected, found, strict=True):
            same = [np.array_equal(a, b, equal_nan=True) for a, b in zip(y, y_here, strict=True)]
            if not all(same) or left != left_here:
                off = max(np.max(np.abs(a - b), initial=0) for a, b in zip(y, y_here, strict=True))
                arrays = sum(a != b for a, b in zip(left, left_here, strict=True))
                raise CaptureError(
                    "the calls that were recorded do not compute what the function does: on other values results "
                    f"differ by up to {off:.3g}, and {arrays} of {len(left)} arrays that are changed in place or "
                    "gradients. Something in it works on values outside of kernels and ops (NumPy, Python, a random "
                    "draw): leave it outside of the capture"
                )


@contextlib.contextmanager
def _scaled(arrays: list[np.ndarray], factor: float) -> Iterator[None]:
    """Every other number times a power of two, which can be undone to the last bit."""

    def scale(by: float) -> None:
        with np.errstate(all="ignore"):  # some memory was never written, and may hold anything
            for x in arrays:
                np.atleast_1d(x)[..., ::2] *= by

    scale(factor)
    try:
        yield
    finally:
        scale(1 / factor)


# ------------------------------------------------------------------ arrays in arguments


def _each(x: Any, do: Callable[[Any], Any]) -> Any:
    """`x` with `do(a)` for each array, tensor or place `a` in it: in tuples, named ones and lists."""
    if isinstance(x, np.ndarray | Tensor | Place | Output):
        return do(x)
    if isinstance(x, tuple | list):
        items = [_each(item, do) for item in x]
        return type(x)(*items) if hasattr(x, "_fields") else type(x)(items)
    return x


def _arrays(x: Any) -> list[np.ndarray]:
    """The arrays in `x`, in order."""
    found: list[np.ndarray] = []
    _each(x, lambda y: found.append(_array(y)))
    return found


def _those(x: Any, kind: type) -> list[Any]:
    """Those arrays and places in `x` that are of this kind, in order."""
    found: list[Any] = []
    _each(x, lambda y: found.append(y.data if isinstance(y, Output | Tensor) else y))
    return [y for y in found if isinstance(y, kind)]


def _array(x: Any) -> Any:
    """The array of a tensor; an array of what is neither."""
    x = x.data if isinstance(x, Tensor) else x
    return x if hasattr(x, "dtype") else np.asarray(x)


def _no_scalar(x: Any) -> Any:
    """NumPy makes a number of the sum of an array, and numbers have no place to which the next one could be copied."""
    return np.asarray(x) if isinstance(x, np.generic) else x


def _copy(new: Any, place: Any) -> None:
    """What a call returned, to where the next ones will look for it."""
    for x, y in zip(_arrays(_no_scalar(new)), _arrays(place), strict=True):
        if x is not y:
            np.copyto(y, x)


def _address(x: np.ndarray) -> int:
    return x.__array_interface__["data"][0]


def _checked(y: Any) -> Any:
    """The result of a function that is to be captured: a tensor, or a tuple of them."""
    if isinstance(y, Tensor) or (isinstance(y, tuple) and all(isinstance(item, Tensor) for item in y)):
        return y
    raise CaptureError(f"a captured function returns a tensor or a tuple of tensors, not {type(y).__name__}")
