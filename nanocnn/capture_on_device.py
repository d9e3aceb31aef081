"""A function's work on a GPU, recorded once and then launched as a whole; for capture.py.

A CUDA graph is there what a recording of calls is on the CPU (kernels/cuda/graph.py). What lies on the device may
change from call to call, and nothing else: so the inputs have places of their own, to which each call's are copied, and
what keys dropout's masks lies there, too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from . import random
from .kernels import dispatch
from .kernels.cuda.graph import Graph
from .kernels.dispatch import describe, device_of, to_device, xp_of
from .tape import CaptureError, arrays_like, checked
from .tensor import Tensor


class CapturedOnDevice:
    """What `capture` returns for a device: call it with arrays of the shapes and dtypes that it was made with.

    They may be of the device or of the host. Weights and gradients are where they lay: what is written into them is
    seen, what replaces them is not.
    """

    def __init__(self, function: Callable[..., Any], inputs: list[Any]):
        self.device = device_of(inputs[0])
        self.inputs = [x.copy() for x in inputs]
        self._keys = random.KeysOnDevice(self.device, len(inputs[0]) if inputs[0].ndim else 0)
        self._lock = threading.Lock()
        self.graph = Graph(self.device)

        def work() -> Any:
            with self._keys.in_use():
                return checked(function(*map(Tensor, self.inputs)))

        with random.repeated():
            self._keys.draw()
        changes = _Changes()
        try:
            with self.graph.warming_up(), changes:
                expected = [y.data.copy() for y in _tensors(work())]
        finally:  # a function that fails half way has changed nothing, either
            changes.put_back()
        with self.graph.recording():
            self.output = work()
        self.graph.launch()
        changes.put_back()
        for x, y in zip(expected, _tensors(self.output), strict=True):
            close = xp_of(x).isclose(x, y.data, *TOLERANCES[x.dtype.name], equal_nan=True)
            if not bool(close.all()):
                raise CaptureError(
                    f"what was recorded does not compute what the function does: of a result ({describe((x,), {})}) "
                    f"{x.size - int(close.sum())} numbers differ. Something in it depends on what Python knows at the "
                    "time: leave it outside of the capture"
                )

    def __call__(self, *inputs: Any) -> Any:
        """What the function would return for these inputs. Raises CaptureError on another shape or dtype."""
        arrays = arrays_like(self.inputs, inputs)
        with self._lock:
            for here, x in zip(self.inputs, arrays, strict=True):
                here[...] = to_device(x, self.device)
            self._keys.draw()
            self.graph.launch()
            copies = tuple(Tensor(y.data.copy()) for y in _tensors(self.output))
            return copies if isinstance(self.output, tuple) else copies[0]

    def __str__(self) -> str:
        return f"a graph of the device {self.device!r} for {describe(tuple(self.inputs), {})}"


# What two runs of the same kernels may differ by: nothing, unless cuBLAS takes another way for another stream. What a
# recorded step tells in float64 (recorded_step.py) was computed in float32.
TOLERANCES = {
    "float64": (1e-4, 1e-6),
    "float32": (1e-4, 1e-6),
    "float16": (1e-2, 1e-3),
    "bfloat16": (5e-2, 1e-2),
}


def _tensors(output: Any) -> tuple[Tensor, ...]:
    return output if isinstance(output, tuple) else (output,)


def _flat(values: Any) -> Iterator[Any]:
    """The items, and those of lists and tuples among them."""
    for value in values:
        yield from _flat(value) if isinstance(value, list | tuple) else (value,)


class _Changes(dispatch.Recorder):
    """Inside, what primitives change in place is noted, so that it can be put back: running statistics, weights."""

    def __init__(self) -> None:
        self.before: dict[int, tuple[Any, Any]] = {}

    def __enter__(self) -> None:
        dispatch.recorder = self

    def __exit__(self, *_: object) -> None:
        dispatch.recorder = None

    def kernel(self, primitive: dispatch.Primitive, variant: dispatch.Variant, args: tuple, kwargs: dict) -> Any:
        if primitive.inplace:
            for x in _flat((*args, *kwargs.values())):
                if hasattr(x, "dtype") and x.ndim and getattr(x.flags, "writeable", True):
                    self.before.setdefault(id(x), (x, x.copy()))
        return variant.body(*args, **kwargs)

    def put_back(self) -> None:
        """All that was changed is what it was."""
        for x, before in reversed(self.before.values()):
            x[...] = before
