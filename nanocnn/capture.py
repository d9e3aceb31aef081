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

What is recorded (tape.py): calls of Numba's functions, and whole, as one call each, what NumPy does in references of
primitives, in ops that call no primitive, and in `dispatch.aside`. What is not: what else Python computes from the
*values* in an array, which keeps the value that it had. So a captured function is compared with the function itself on
other inputs and other weights, bit by bit, and refused if it is not the same (trial.py).

What that cannot notice: what does not follow from the arrays, such as a learning rate or a counter of steps, and stays
what it was; a branch that other values than the ones tried would take; what NumPy changes in place in arrays that no
kernel reads. While a function is captured, no other thread may use its weights.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
from numba.core.registry import CPUDispatcher

from . import random
from .arena import Life, arrange
from .capture_on_device import CapturedOnDevice
from .kernels import dispatch, memory
from .kernels.dispatch import describe, device_of
from .tape import (
    Call,
    CaptureError,
    Output,
    Place,
    Tape,
    arrays_in,
    arrays_like,
    as_array,
    checked,
    each,
    key_of,
    those_in,
)
from .tensor import Tensor
from .trial import Trial

__all__ = ["CaptureError", "Captured", "capture"]


class Captured:
    """What `capture` returns: call it with arrays or tensors of the shapes and dtypes that it was made with.

    `calls` is what it does, `bytes` the memory that the calls share. Weights and gradients are where they lay: what is
    written into them is seen, what replaces them is not. Threads wait for each other.
    """

    def __init__(self, calls: list[Call], inputs: list[np.ndarray], output: Any, block: np.ndarray):
        self.calls, self.inputs, self.output, self.bytes = calls, inputs, output, block.nbytes
        # Most are compiled functions that return nothing: of those a plain loop over two names is all that is left.
        plain = [isinstance(c.function, CPUDispatcher) and not c.kwargs and c.result is None for c in calls]
        self._steps = [(c.function, c.args) if p else (c, ()) for c, p in zip(calls, plain, strict=True)]
        self._choices = dispatch.in_force()  # a reference calls other primitives
        self._lock = threading.Lock()

    def __call__(self, *inputs: Any) -> Any:
        """What the function would return for these inputs. Raises CaptureError on another shape or dtype."""
        arrays = arrays_like(self.inputs, inputs)
        with self._lock, dispatch.put_in_force(self._choices):
            for here, x in zip(self.inputs, arrays, strict=True):
                np.copyto(here, x)
            for function, args in self._steps:
                function(*args)
            return each(self.output, lambda y: Tensor(y.data.copy()))

    def __str__(self) -> str:
        lines = [f"{i:4}  {call}" for i, call in enumerate(self.calls)]
        return "\n".join([*lines, f"{len(lines)} calls, {self.bytes:,} bytes shared by what lies between them"])


_one_at_a_time = threading.Lock()


def capture(function: Callable[..., Any], *inputs: Any) -> Captured | CapturedOnDevice:
    """Record what `function(*inputs)` does, for tensors or arrays; for those of a GPU as a CUDA graph.

    The function takes one tensor for each input and returns a tensor, or a tuple of them. It is run four times: to
    compile, to record, and twice to compare (on a GPU twice: to compile and compare, and to record). What primitives
    change in place (running statistics, weights) is put back afterwards, and gradients are left as those of the
    example. Raises CaptureError if it does anything besides calling kernels that depends on the values of its inputs,
    such as a random draw of its own; dropout draws new masks.
    """
    arrays = [as_array(x) for x in inputs]
    dispatch.demand_one_device("capture", arrays)
    with _one_at_a_time:
        if dispatch.recorder is not None:
            raise CaptureError("a profile records, and would measure the recording: capture before it begins")
        if arrays and device_of(arrays[0]) != "cpu":
            return CapturedOnDevice(function, arrays)
        return _captured(function, [np.array(x, order="C") for x in arrays])


def _captured(function: Callable[..., Any], inputs: list[np.ndarray]) -> Captured:
    tapes = []
    try:
        for _ in range(2):  # the first run compiles, and lays out constant weights: that is not to be repeated
            with random.repeated(), memory.watched() as lent:
                tape = Tape(lent)
                tapes.append(tape)
                with tape.recording():
                    output = tape.place(checked(function(*map(Tensor, inputs))))
            tape.put_back()
        first, tape = tapes
        _check_origin(output, tape, inputs)
        # What lies in the same place in both runs, though neither gave it back, was there before.
        mine, before = {key_of(x) for x in inputs}, first.found()
        standing = [x for key, x in tape.found().items() if key in before and key not in mine]
        state = [*(x for key, (x, _) in first.changed.items() if key in tape.changed), *tape.gradients]
        trial = Trial(inputs, standing, state, first.put_back)
        expected = trial.results(lambda *x: checked(function(*x)))
        memory.trim()  # the block is to take the room of what was lent, not to lie beside it
        captured = _in_one_block(tape.calls, inputs, output, lent.sizes)
        trial.compare(expected, trial.results(captured))
        return captured
    finally:
        if tapes:
            tapes[0].put_back()


def _check_origin(output: Any, tape: Tape, inputs: list[np.ndarray]) -> None:
    """Raise CaptureError for a result that no call has to do with: it would be the same for ever."""
    known = [*inputs, *(x for c in tape.calls for x in arrays_in((c.args, tuple(c.kwargs.values()), c.result)))]
    for y in arrays_in(output):
        if y.size and not any(np.may_share_memory(y, x) for x in known):
            raise CaptureError(
                f"a result, {describe((y,), {})}, was made by no kernel and no op: the calls that were recorded do not "
                "compute what the function does. Return what NumPy makes it of, and compute it outside"
            )


def _in_one_block(calls: list[Call], inputs: list[np.ndarray], output: Any, sizes: list[int]) -> Captured:
    """The same calls, with all that the pool had lent in one block; each place in it is used by many."""
    uses = [those_in((c.args, tuple(c.kwargs.values()), c.result, c.reads), Place) for c in calls]
    lives: dict[int, Life] = {}
    for when, places in enumerate([*uses, those_in(output, Place)]):
        for p in places:
            lives[p.loan] = Life(sizes[p.loan], lives[p.loan].first if p.loan in lives else when, when)
    offsets, size = arrange(list(lives.values()))
    offset = dict(zip(lives, offsets, strict=True))
    room = memory.empty(size + memory.PAGE, np.uint8)
    start = -memory.address(room) % memory.PAGE  # as the pool lends it: kernels may have looked at that
    block = room[start : start + size]

    def array(p: Any) -> Any:
        if isinstance(p, Place):
            return np.ndarray(p.shape, p.dtype, block, offset[p.loan] + p.offset, p.strides)
        return Tensor(array(p.data)) if isinstance(p, Output) else p

    again = []
    for c in calls:
        kwargs = {name: each(value, array) for name, value in c.kwargs.items()}
        again.append(c._replace(args=each(c.args, array), kwargs=kwargs, result=each(c.result, array), reads=()))
    return Captured(again, inputs, each(output, array), block)
