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
import threading
from collections.abc import Callable, Iterator
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
        self._own = [*inputs, block]
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

    def standing(self) -> list[np.ndarray]:
        """The floats that the calls find where they always lie: weights above all."""
        found = {
            (_address(x), x.shape): x
            for call in self.calls
            for x in _arrays((call.args, tuple(call.kwargs.values())))
            if x.dtype.kind == "f" and x.flags.writeable and not any(np.may_share_memory(x, y) for y in self._own)
        }
        return list(found.values())

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
    first, tape = _Tape(), _Tape()
    try:
        with random.repeated(), first.recording():  # compiles, and lays out constant weights: not to be repeated
            function(*map(Tensor, held))
        first.put_back()
        with random.repeated(), memory.watched() as loans, tape.recording():
            output = _checked(function(*map(Tensor, held)))
        captured = _in_one_block(tape.calls, held, output, loans)
        state = [*(x for address, (x, _) in first.changed.items() if address in tape.changed), *tape.gradients]
        del loans, output, tape
        _compare(captured, function, [x.copy() for x in held], state, first.put_back)
    finally:
        first.put_back()
    return captured


class _Tape(dispatch.Recorder):
    """Writes down the calls that this thread makes."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.thread = threading.get_ident()
        self.within = ("", "")  # the primitive that runs, and its variant
        self.listens = True
        self.changed: dict[int, tuple[np.ndarray, np.ndarray]] = {}  # by address: an array, and what it held before
        self.gradients: list[np.ndarray] = []

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
        dispatch.recorder = self
        try:
            yield
        finally:
            dispatch.recorder = None
            delattr(CPUDispatcher, "__call__")  # what it inherits is left

    def mine(self) -> bool:
        return self.listens and threading.get_ident() == self.thread

    def add(self, name: str, variant: str, function: Any, args: tuple, kwargs: dict, result: Any) -> None:
        self.calls.append(Call(name, variant, function, args, kwargs, result if _arrays(result) else None))

    def kernel(self, primitive: dispatch.Primitive, variant: dispatch.Variant, args: tuple, kwargs: dict) -> Any:
        if not self.mine():
            return variant.body(*args, **kwargs)
        if primitive.inplace:
            for x in _arrays((args, tuple(kwargs.values()))):
                if x.flags.writeable:
                    self.changed.setdefault(_address(x), (x, x.copy()))
        before, self.within = self.within, (primitive.name, variant.name)
        try:
            if variant.name == "reference":
                return self.whole(*self.within, variant.body, args, kwargs)
            return variant.body(*args, **kwargs)
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
        return self.whole(*self.within, function, args, {})

    def whole(self, name: str, variant: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run it, and write it down as one call."""
        self.listens = False
        try:
            result = _no_scalar(function(*args, **kwargs))
        finally:
            self.listens = True
        self.add(name, variant, function, args, kwargs, result)
        return result

    def put_back(self) -> None:
        """What primitives have changed in place is what it was."""
        for x, before in self.changed.values():
            x[...] = before


def _in_one_block(calls: list[Call], inputs: list[np.ndarray], output: Any, loans: list[memory.Loan]) -> Captured:
    """The same calls, with all arrays that the pool lent meanwhile in one block; each place is used by many."""
    number = {id(loan): i for i, loan in enumerate(loans)}
    first, last = [len(calls)] * len(loans), [-1] * len(loans)
    uses = [_arrays((c.args, tuple(c.kwargs.values()), c.result)) for c in calls]
    for when, arrays in enumerate([*uses, _arrays(output)]):
        for x in arrays:
            i = number.get(id(memory.loan_of(x)))
            if i is not None:
                first[i], last[i] = min(first[i], when), max(last[i], when)
    used = [i for i in range(len(loans)) if last[i] >= 0]
    offsets, size = arrange([Life(loans[i].size, first[i], last[i]) for i in used])
    offset = dict(zip(used, offsets, strict=True))
    block = memory.empty(size, np.uint8)

    def moved(x: Any) -> Any:
        if isinstance(x, Tensor):
            return Tensor(moved(x.data))
        loan = memory.loan_of(x)
        i = number.get(id(loan))
        if loan is None or i is None:
            return x
        return np.ndarray(x.shape, x.dtype, block, offset[i] + _address(x) - loan.start, x.strides)

    again = []
    for c in calls:
        kwargs = {name: _each(value, moved) for name, value in c.kwargs.items()}
        again.append(c._replace(args=_each(c.args, moved), kwargs=kwargs, result=_each(c.result, moved)))
    return Captured(again, inputs, _each(output, moved), block)


def _compare(
    captured: Captured,
    function: Callable[..., Any],
    inputs: list[np.ndarray],
    state: list[np.ndarray],
    put_back: Callable[[], None],
) -> None:
    """Raise CaptureError unless it does on other values, and then on the first ones again, what the function does.

    That is what it returns and what it leaves in `state`. Other values are those of the weights, too: a kernel may have
    read a copy of them that NumPy made.
    """
    rng = np.random.default_rng(0)
    others = [rng.permutation(x.reshape(-1)).reshape(x.shape) for x in inputs]  # of integers these are valid, too
    others = [x + rng.standard_normal(x.shape).astype(x.dtype) if x.dtype.kind == "f" else x for x in others]
    standing = [(x, x.copy(), rng.uniform(0.9, 1.1, x.shape).astype(x.dtype)) for x in captured.standing()]
    for values in (others, inputs):
        results = []
        for do in (function, captured):
            for x in state:
                x[...] = 0
            put_back()
            with np.errstate(all="ignore"):  # some was never written, and may hold anything
                for x, before, factor in standing:
                    x[...] = before * factor if values is others else before
            with random.repeated():
                y = do(*map(Tensor, values))
            results.append([x.copy() for x in (*_arrays(_checked(y)), *state)])
        for x, y in zip(*results, strict=True):
            if not np.array_equal(x, y, equal_nan=True):
                raise CaptureError(
                    f"the {len(captured.calls)} calls that were recorded do not compute what the function does: on "
                    f"other values the results differ by up to {np.max(np.abs(x - y)):.3g}. Something in it works on "
                    "values outside of kernels and ops (NumPy, Python, a random draw): leave it outside of the capture"
                )


# ------------------------------------------------------------------ arrays in arguments


def _each(x: Any, do: Callable[[Any], Any]) -> Any:
    """`x` with `do(a)` for each array or tensor `a` in it: in tuples, named ones and lists."""
    if isinstance(x, np.ndarray | Tensor):
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
