"""Tensor, Op and the backward pass: reverse-mode differentiation, written once for every op, device and kernel.

An op's instance is the node of the graph. This file knows no kernel and no device; `functional` attaches the operators.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .kernels import dispatch
from .kernels.dispatch import aside, device_of, to_device, xp_of
from .kernels.narrow import is_float, sum_dtype

_grad_enabled = True


class GraphError(RuntimeError):
    """A backward pass that cannot be: no graph, a freed graph, second derivatives, a gradient of the wrong shape."""


@contextlib.contextmanager
def no_grad() -> Iterator[None]:
    """Build no graph inside: nothing is saved for backward."""
    global _grad_enabled
    before, _grad_enabled = _grad_enabled, False
    try:
        yield
    finally:
        _grad_enabled = before


class Tensor:
    """An array (NumPy or CuPy) with a place in a graph.

    `data` is the raw array: its type is the device, its dtype the precision. Lists and Python numbers become float32,
    or int64 where all are integers; an array keeps its dtype.
    `grad` is a raw array of the same shape and dtype, or None where no gradient has arrived since `zero_grad()`.
    """

    # One leaf can hold its gradient in memory that somebody else gave it (a view into a bucket): `grad_buffer`.
    __slots__ = ("__weakref__", "_arrived", "data", "grad_buffer", "node", "on_grad", "requires_grad")

    data: Any
    __array_ufunc__ = None  # NumPy, on the left of an operator, leaves the work to __rmul__ and its like

    def __init__(self, data: Any, requires_grad: bool = False):
        if isinstance(data, Tensor):
            data = data.data
        if not hasattr(data, "__array__") and not hasattr(data, "__cuda_array_interface__"):
            data = np.asarray(data)
            data = data.astype(np.float32) if data.dtype == np.float64 else data
        elif isinstance(data, np.generic):
            data = np.asarray(data)
        xp_of(data)  # raises TypeError on what is neither NumPy's nor CuPy's
        if requires_grad and not is_float(data.dtype):
            raise TypeError(f"only floating-point tensors can require a gradient, got dtype {data.dtype}")
        self.data = data
        self.requires_grad = requires_grad
        self.node: Op | None = None
        self.grad_buffer: Any = None
        self._arrived = False
        self.on_grad: Callable[[Tensor], None] | None = None  # called when a leaf's gradient is complete

    @property
    def grad(self) -> Any:
        return self.grad_buffer if self._arrived else None

    @grad.setter
    def grad(self, value: Any) -> None:
        """None forgets the gradient; an array is copied into the memory that holds it, if there is some."""
        if value is not None and self.grad_buffer is None:
            self.grad_buffer = value
        elif value is not None and value is not self.grad_buffer:
            self.grad_buffer[...] = value
        self._arrived = value is not None

    def zero_grad(self) -> None:
        """Forget the gradient; its memory is kept, and the next gradient to arrive overwrites it."""
        aside(self._forget)

    def _forget(self) -> None:
        self._arrived = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.data.shape

    @property
    def dtype(self) -> np.dtype:
        return self.data.dtype

    @property
    def ndim(self) -> int:
        return self.data.ndim

    @property
    def size(self) -> int:
        return self.data.size

    @property
    def device(self) -> str:
        return device_of(self.data)

    def numpy(self) -> np.ndarray:
        """The values as a NumPy array: the same memory on the CPU, a copy from a GPU."""
        if dispatch.recorder is not None:
            dispatch.recorder.looked()
        return to_device(self.data, "cpu")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """What `np.asarray(tensor)` takes: the values, without the graph."""
        return np.array(self.numpy(), dtype, copy=copy)

    def item(self) -> float:
        """The value of a tensor of one element."""
        if dispatch.recorder is not None:
            dispatch.recorder.looked()
        return self.data.item()

    def detach(self) -> Tensor:
        """The same data without a graph."""
        return Tensor(self.data)

    def to(self, device: str) -> Tensor:
        """A tensor on `device` ("cpu", "cuda" or "emulated"), outside the graph; itself if it is there already."""
        return self if device == self.device else Tensor(to_device(self.data, device), self.requires_grad)

    if TYPE_CHECKING:  # functional/basic.py attaches these; here they are for readers, editors and type checkers
        # fmt: off
        def __add__(self, other: Any) -> Tensor: ...
        def __radd__(self, other: Any) -> Tensor: ...
        def __sub__(self, other: Any) -> Tensor: ...
        def __rsub__(self, other: Any) -> Tensor: ...
        def __mul__(self, other: Any) -> Tensor: ...
        def __rmul__(self, other: Any) -> Tensor: ...
        def __truediv__(self, other: Any) -> Tensor: ...
        def __rtruediv__(self, other: Any) -> Tensor: ...
        def __matmul__(self, other: Any) -> Tensor: ...
        def __rmatmul__(self, other: Any) -> Tensor: ...
        def __neg__(self) -> Tensor: ...
        def __pow__(self, exponent: float) -> Tensor: ...
        def __getitem__(self, index: Any) -> Tensor: ...
        def reshape(self, *shape: Any) -> Tensor: ...
        def transpose(self, *axes: Any) -> Tensor: ...
        def sum(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def mean(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        def max(self, axis: Any = None, keepdims: bool = False) -> Tensor: ...
        # fmt: on

    def __len__(self) -> int:
        return len(self.data)

    def __repr__(self) -> str:
        return f"Tensor({self.data!r}, requires_grad={self.requires_grad})"

    # ---------------------------------------------------------------- backward

    def backward(self, gy: Any = None, create_graph: bool = False) -> None:
        """Add d(self)/d(leaf) to every leaf's `grad`, and free the graph.

        `gy`, by default 1 for a tensor of one element, is the gradient of `self`: a raw array of its shape. Raises
        GraphError without a graph, on a second pass through it, and on `create_graph` (first derivatives only).
        """
        if create_graph:
            raise GraphError("nanocnn computes first derivatives only: create_graph=True is not supported")
        if not self.requires_grad:
            raise GraphError(
                "backward() on a tensor that requires no gradient: no graph was built (no_grad()? detach()?)"
            )
        if gy is None:
            if self.size != 1:
                raise GraphError(
                    f"backward() needs a gradient for a tensor of shape {self.shape}: give one, or reduce to a loss"
                )
            gy = aside(xp_of(self.data).ones_like, self.data)
        gy = gy.data if isinstance(gy, Tensor) else gy
        if gy.shape != self.shape:
            raise GraphError(f"backward() was given a gradient of shape {gy.shape} for a tensor of shape {self.shape}")
        if self.node is None:
            _arrive(self, gy)
            return
        order = _topological_order(self.node)
        uses = _count_uses(order)
        grads: dict[int, Any] = {id(self.node): gy}
        for op in order:
            gy = grads.pop(id(op), None)
            if gy is None:  # nothing downstream sent a gradient here
                gxs: Any = (None,) * len(op.needs)
            else:
                op._arrived = grads
                gxs = _run(op, "backward", op.backward, (gy,), {})
                gxs = gxs if isinstance(gxs, tuple) else (gxs,)
            op.free()
            for x, gx in zip(op.inputs, gxs, strict=True):
                if x is None:
                    continue
                if gx is not None:
                    gx = _fit(op, x, gx)
                    if x.node is not None:
                        before = grads.get(id(x.node))
                        # never +=: gx may be shared
                        grads[id(x.node)] = gx if before is None else aside(operator.add, before, gx)
                    elif x.leaf is not None:
                        _arrive(x.leaf, gx)
                if x.leaf is not None:
                    uses[id(x.leaf)] -= 1
                    if uses[id(x.leaf)] == 0 and x.leaf.on_grad is not None:
                        aside(partial(x.leaf.on_grad, x.leaf))


class Input(NamedTuple):
    """Where an op's input came from: the op that made it, or the leaf that it is. Holds no array but a leaf's, so that
    an activation that no op saved is free as soon as the forward pass lets go of it."""

    node: Op | None
    leaf: Tensor | None
    shape: tuple[int, ...]
    dtype: np.dtype


class Op:
    """A differentiable function, and the node that it leaves in the graph.

    Subclasses define `forward(self, *arrays, **parameters)`, which returns one raw array and calls `self.save(...)` for
    what backward needs, and `backward(self, gy)`, which returns one gradient an input (None where `self.needs` is
    False) and never writes into `gy`. `name = MyOp.apply` makes the function.
    """

    inputs: tuple[Input | None, ...]  # None where no gradient is needed
    needs: tuple[bool, ...]
    saved: tuple[Any, ...] | None = ()
    layer: str = ""  # the module that ran it, for the profile
    _arrived: dict[int, Any] = {}  # noqa: RUF012  during backward, the gradients on their way, by the op they go to

    @classmethod
    def apply(cls, *inputs: Any, **parameters: Any) -> Tensor:
        op = cls()
        like = None
        for x in inputs:
            if isinstance(x, Tensor):
                like = x
                break
        tensors = [x if isinstance(x, Tensor) else as_tensor(x, like) for x in inputs]
        op.needs = tuple([_grad_enabled and x.requires_grad for x in tensors])
        arrays = tuple([x.data for x in tensors])
        if len({type(a) for a in arrays}) > 1:
            dispatch.demand_one_device(cls.__name__, arrays)
        y = Tensor(_run(op, "forward", op.forward, arrays, parameters))
        if any(op.needs):
            op.inputs = tuple(
                Input(x.node, x if x.node is None else None, x.shape, x.dtype) if needed else None
                for x, needed in zip(tensors, op.needs, strict=True)
            )
            y.requires_grad, y.node, op.layer = True, op, _layers[-1] if _layers else ""
        return y

    def save(self, *arrays: Any) -> None:
        """Keep arrays for backward; a no-op where none will come."""
        if any(self.needs):
            self.saved = arrays

    def free(self) -> None:
        self.saved, self._arrived = None, {}

    def out_for(self, i: int) -> Any:
        """Memory in which backward may write the gradient of input `i`, and return it; None if it has to bring its own.

        It is the memory that holds a leaf's gradient, where none has arrived yet: what is written there need not be
        copied there. Of a large weight that saves a pass over memory.
        """
        x = self.inputs[i]
        if x is None or x.leaf is None or x.leaf._arrived or x.leaf.grad_buffer is None:
            return None
        memory = x.leaf.grad_buffer
        fits = memory.shape == x.shape and memory.dtype == x.dtype and memory.flags.c_contiguous
        once = sum(other is not None and other.leaf is x.leaf for other in self.inputs) == 1
        return memory if fits and once else None

    def take_arrived(self, i: int) -> Any:
        """What has arrived of the gradient of input `i` from other ops so far, or None; to be added to its own by an op
        that can do so while it writes. It may be shared with others: it must not be written to."""
        x = self.inputs[i]
        return None if x is None or x.node is None else self._arrived.pop(id(x.node), None)

    def forward(self, *arrays: Any, **parameters: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def backward(self, gy: Any) -> Any:
        raise TypeError(f"{type(self).__name__} defines no backward()")


def _run(op: Op, kind: str, function: Callable[..., Any], arrays: tuple, parameters: dict[str, Any]) -> Any:
    """An op's forward or backward; an error for want of memory gets a note that says whose it was."""
    recorder = dispatch.recorder
    try:
        if recorder is None:
            return function(*arrays, **parameters)
        return recorder.op(op, kind, function, arrays, parameters)
    except MemoryError as error:
        layer = op.layer or (_layers[-1] if _layers else "")
        call = f"{type(op).__name__}.{kind}({dispatch.describe(arrays, parameters)})"
        error.add_note(f"{call} of {layer}" if layer else call)
        raise


_layers: list[str] = []  # names of the modules being run, outermost first; filled by nn.Module while a profile records


def as_tensor(x: Any, like: Tensor | None = None) -> Tensor:
    """`x` as a tensor; a Python or NumPy number takes the dtype (and device) of `like`: float64 cannot creep in.

    A fraction beside a tensor of integers is the exception, where it would be cut off: it becomes float32.
    """
    if isinstance(x, Tensor):
        return x
    if like is not None and isinstance(x, int | float | np.generic):
        number = x.item() if isinstance(x, np.generic) else x
        fits = is_float(like.dtype) or isinstance(number, int)
        return Tensor(xp_of(like.data).full((), number, like.dtype if fits else np.float32))
    return Tensor(x)


def saved_bytes(y: Tensor) -> int:
    """Bytes that the graph behind `y` keeps for backward, each array counted once."""
    arrays: dict[int, int] = {}
    for op in _topological_order(y.node) if y.node else ():
        for a in op.saved or ():
            if hasattr(a, "nbytes"):
                memory = a
                while getattr(memory, "base", None) is not None:  # a view's array; an array's block in the pool
                    memory = memory.base
                arrays[id(memory)] = max(a.nbytes, arrays.get(id(memory), 0))
    return sum(arrays.values())


def _topological_order(root: Op) -> list[Op]:
    """Every op before the ops that made its inputs. Iterative: a deep network must not hit the recursion limit."""
    if root.saved is None:
        raise GraphError(f"backward() a second time: the graph of {type(root).__name__} was freed by the first pass")
    order: list[Op] = []
    seen: set[int] = set()
    stack: list[tuple[Op, bool]] = [(root, False)]
    while stack:
        op, done = stack.pop()
        if done:
            order.append(op)
        elif id(op) not in seen:
            if op.saved is None:
                raise GraphError(
                    f"backward() through {type(op).__name__}, whose graph was freed by an earlier backward()"
                )
            seen.add(id(op))
            stack.append((op, True))
            stack.extend((x.node, False) for x in op.inputs if x and x.node and id(x.node) not in seen)
    return order[::-1]


def _count_uses(order: list[Op]) -> dict[int, int]:
    """How often each leaf that needs a gradient appears, so that `on_grad` fires when its gradient is complete."""
    uses: dict[int, int] = {}
    for op in order:
        for x in op.inputs:
            if x and x.leaf is not None:
                uses[id(x.leaf)] = uses.get(id(x.leaf), 0) + 1
    return uses


def _fit(op: Op, x: Input, gx: Any) -> Any:
    """`gx` summed over the axes along which `x` was broadcast; GraphError if its shape or dtype is still not `x`'s."""
    rank = len(x.shape)
    if gx.ndim > rank:
        gx = aside(_sum, gx, tuple(range(gx.ndim - rank)), False)
    if gx.shape != x.shape and gx.ndim == rank:
        gx = aside(_sum, gx, tuple(i for i, n in enumerate(x.shape) if n == 1), True)
    if gx.shape != x.shape or gx.dtype != x.dtype:
        raise GraphError(
            f"{type(op).__name__}.backward() returned a gradient of shape {gx.shape} and dtype {gx.dtype} "
            f"for an input of shape {x.shape} and dtype {x.dtype}"
        )
    return gx


def _arrive(leaf: Tensor, g: Any) -> None:
    """The first gradient of a leaf is copied, later ones are added: `g` may be shared with another leaf.

    Nothing is copied that the op wrote in its place (`Op.out_for`).
    """
    aside(Arrival(leaf), g)


class Arrival:
    """Called with a gradient, it adds that to the leaf's."""

    __slots__ = ("leaf",)

    def __init__(self, leaf: Tensor):
        self.leaf = leaf

    def __call__(self, g: Any) -> None:
        leaf = self.leaf
        if leaf.grad_buffer is None:
            leaf.grad_buffer = xp_of(g).array(g)
        elif leaf._arrived:
            leaf.grad_buffer += g
        elif g is not leaf.grad_buffer:
            leaf.grad_buffer[...] = g
        leaf._arrived = True


def _sum(x: Any, axis: tuple[int, ...], keepdims: bool) -> Any:
    return x.sum(axis=axis, keepdims=keepdims, dtype=sum_dtype(x.dtype)).astype(x.dtype, copy=False)
