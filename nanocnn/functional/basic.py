"""Arithmetic, shapes and sums; and the operators of Tensor, which are attached here."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

import numpy as np

from ..kernels.dispatch import xp_of
from ..kernels.elementwise import add_bias, as_rows, bias_grad
from ..kernels.half import cast as cast_kernel
from ..kernels.matmul import matmul as matmul_kernel
from ..kernels.narrow import HALVES, is_float, sum_dtype
from ..tensor import Op, Tensor, as_tensor
from .cast_together import made_of
from .fuse import back_through_epilogue, fuse, one_by_one


class Add(Op):
    def forward(self, a, b):
        return a + b

    def backward(self, gy):
        return gy, gy


class Sub(Op):
    def forward(self, a, b):
        return a - b

    def backward(self, gy):
        return gy, -gy if self.needs[1] else None


class Mul(Op):
    def forward(self, a, b):
        self.save(a, b)
        return a * b

    def backward(self, gy):
        a, b = self.saved
        return gy * b if self.needs[0] else None, gy * a if self.needs[1] else None


class Div(Op):
    def forward(self, a, b):
        self.save(a, b)
        return a / b

    def backward(self, gy):
        a, b = self.saved
        return gy / b if self.needs[0] else None, -gy * a / (b * b) if self.needs[1] else None


class Neg(Op):
    def forward(self, a):
        return -a

    def backward(self, gy):
        return -gy


class Pow(Op):
    def forward(self, a, *, exponent):
        self.exponent = exponent
        self.save(a)
        return a ** _beside(a, exponent)

    def backward(self, gy):
        (a,) = self.saved
        if self.exponent == 0:  # 0 times a to the -1 would be NaN where a is 0
            return xp_of(gy).zeros_like(gy)
        return gy * (_beside(a, self.exponent) * a ** _beside(a, self.exponent - 1))


def _beside(a, number):
    """A number in the dtype of an array, as NumPy takes it by itself, but for bfloat16."""
    return a.dtype.type(number) if a.dtype in HALVES else number


class Exp(Op):
    def forward(self, a):
        y = xp_of(a).exp(a)
        self.save(y)
        return y

    def backward(self, gy):
        return gy * self.saved[0]


class Log(Op):
    def forward(self, a):
        self.save(a)
        return xp_of(a).log(a)

    def backward(self, gy):
        return gy / self.saved[0]


class MatMul(Op):
    """(..., M, K) @ (..., K, N); leading axes broadcast."""

    def forward(self, a, b):
        if a.ndim < 2 or b.ndim < 2 or a.shape[-1] != b.shape[-2]:
            raise ValueError(f"matmul of shapes {a.shape} and {b.shape}: expected (..., M, K) and (..., K, N)")
        self.save(a, b)
        return matmul_kernel(a, b)

    def backward(self, gy):
        a, b = self.saved
        ga = matmul_kernel(gy, b.swapaxes(-1, -2)) if self.needs[0] else None
        gb = matmul_kernel(a.swapaxes(-1, -2), gy) if self.needs[1] else None
        return ga, gb


class Linear(Op):
    """x @ w + b over the last axis of x; w is (in, out)."""

    def forward(self, x, w, b=None):
        self.save(x, w)
        y = matmul_kernel(as_rows(x), w)
        if b is not None:
            add_bias(y, b)
        return y.reshape(*x.shape[:-1], w.shape[1])

    def backward(self, gy):
        x, w = self.saved
        gy = as_rows(gy)
        gx = matmul_kernel(gy, w.T).reshape(x.shape) if self.needs[0] else None
        gw = matmul_kernel(as_rows(x).T, gy, out=self.out_for(1)) if self.needs[1] else None
        gb = bias_grad(gy) if self.needs[-1] and len(self.needs) == 3 else None
        return (gx, gw, gb)[: len(self.needs)]


class FusedLinear(Op):
    """relu?(x @ w + b), finished before it is stored."""

    def forward(self, x, w, b=None, *, relu):
        y = matmul_kernel(as_rows(x), w, bias=b, relu=relu)
        self.save(x, w, y if relu else None)
        return y.reshape(*x.shape[:-1], w.shape[1])

    def backward(self, gy):
        x, w, y = self.saved
        gy, gb = back_through_epilogue(as_rows(gy), y, len(self.needs) == 3)
        gx = matmul_kernel(gy, w.T).reshape(x.shape) if self.needs[0] else None
        gw = matmul_kernel(as_rows(x).T, gy, out=self.out_for(1)) if self.needs[1] else None
        return (gx, gw, gb)[: len(self.needs)]


class Reshape(Op):
    def forward(self, a, *, shape):
        self.shape = a.shape
        return a.reshape(shape)

    def backward(self, gy):
        return gy.reshape(self.shape)


class Transpose(Op):
    def forward(self, a, *, axes):
        self.inverse = None if axes is None else tuple(int(i) for i in np.argsort(axes))
        return a.transpose(axes)

    def backward(self, gy):
        return gy.transpose(self.inverse)


class Slice(Op):
    def forward(self, a, *, index):
        self.shape, self.index = a.shape, index
        return a[index]

    def backward(self, gy):
        xp, basic = xp_of(gy), _is_basic(self.index)
        gx = xp.zeros(self.shape, gy.dtype if basic else sum_dtype(gy.dtype))
        if basic:
            gx[self.index] = gy
        else:  # an integer array may name a place twice
            xp.add.at(gx, self.index, gy.astype(gx.dtype, copy=False))
        return gx if gx.dtype == gy.dtype else cast_kernel(gx, gy.dtype)


def _is_basic(index: Any) -> bool:
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(i, int | slice | type(None) | type(Ellipsis)) for i in parts)


class Sum(Op):
    """`wide`: of halves, the sum is left in float32."""

    def forward(self, a, *, axis, keepdims, wide=False):
        self.shape, self.dtype, self.axis, self.keepdims = a.shape, a.dtype, axis, keepdims
        total = xp_of(a).asarray(
            a.sum(axis=axis, keepdims=keepdims, dtype=sum_dtype(a.dtype) if is_float(a.dtype) else None)
        )
        return total if wide else cast_kernel(total, a.dtype)

    def backward(self, gy):
        gy = gy if gy.dtype == self.dtype else cast_kernel(gy, self.dtype)
        return xp_of(gy).broadcast_to(_with_axes(gy, self.axis, self.keepdims), self.shape)


class Max(Op):
    """Where several elements are the largest, they share the gradient (as torch.amax)."""

    def forward(self, a, *, axis, keepdims):
        y = a.max(axis=axis, keepdims=True)
        self.axis, self.keepdims = axis, keepdims
        self.save(a == y)
        return y if keepdims else xp_of(a).asarray(a.max(axis=axis))

    def backward(self, gy):
        (is_max,) = self.saved
        return (
            _with_axes(gy, self.axis, self.keepdims)
            * is_max
            / is_max.sum(axis=self.axis, keepdims=True).astype(gy.dtype)
        )


def _with_axes(gy, axis, keepdims):
    """gy with the summed axes put back as axes of length 1."""
    if keepdims or axis is None:
        return gy
    return xp_of(gy).expand_dims(gy, axis)


class Concat(Op):
    def forward(self, *arrays, axis):
        self.axis, self.ends = axis, np.cumsum([a.shape[axis] for a in arrays])[:-1].tolist()
        return xp_of(arrays[0]).concatenate(arrays, axis=axis)

    def backward(self, gy):
        return tuple(xp_of(gy).split(gy, self.ends, axis=self.axis))


class Pad(Op):
    def forward(self, a, *, widths):
        self.inner = tuple(slice(before, before + n) for (before, _), n in zip(widths, a.shape, strict=True))
        return xp_of(a).pad(a, widths)

    def backward(self, gy):
        return gy[self.inner]


class Cast(Op):
    """`made` is the result, where a bucket of weights was cast at once. A weight's gradient is written in its place."""

    def forward(self, a, *, dtype, made=None):
        self.dtype = a.dtype
        return cast_kernel(a, dtype) if made is None else made

    def backward(self, gy):
        out = self.out_for(0)
        if out is None:
            return cast_kernel(gy, self.dtype)
        with np.errstate(over="ignore"):
            out[...] = gy
        return out


def need_floats(name: str, x: Tensor) -> None:
    """Raise TypeError on anything but floating-point numbers: weights in the dtype of uint8 images would all be 0."""
    if not is_float(x.dtype):
        raise TypeError(
            f"{name} of dtype {x.dtype}: expected float16, bfloat16, float32 or float64; normalise images first "
            "(nanocnn.data.Loader does)"
        )


def linear(x: Tensor, w: Tensor, b: Tensor | None = None, *, relu: bool = False) -> Tensor:
    """(..., in), (in, out), (out,) -> (..., out): x @ w + b; then ReLU. Raises TypeError unless x is floating-point."""
    need_floats("linear", x)
    if x.ndim < 1 or w.ndim != 2 or x.shape[-1] != w.shape[0] or (b is not None and b.shape != w.shape[1:]):
        shapes = f"{x.shape}, {w.shape}" + ("" if b is None else f", {b.shape}")
        raise ValueError(f"linear of shapes {shapes}: expected x (..., in), w (in, out), b (out,)")
    inputs = (x, w) if b is None else (x, w, b)
    if fuse.value == "on":
        return FusedLinear.apply(*inputs, relu=relu)
    return one_by_one(Linear.apply(*inputs), None, relu)


def exp(x: Tensor) -> Tensor:
    """e to the x, elementwise."""
    return Exp.apply(x)


def log(x: Tensor) -> Tensor:
    """Natural logarithm, elementwise."""
    return Log.apply(x)


def concat(tensors: Sequence[Tensor], axis: int = -1) -> Tensor:
    """Tensors joined along an axis on which alone their shapes may differ."""
    return Concat.apply(*tensors, axis=axis)


def pad(x: Tensor, widths: Sequence[tuple[int, int]]) -> Tensor:
    """Zeros before and after: one (before, after) for each axis, as in numpy.pad."""
    return Pad.apply(x, widths=tuple(widths))


def cast(x: Tensor, dtype: Any) -> Tensor:
    """`x` in another floating-point dtype; the gradient comes back in x's own. Raises TypeError on other dtypes."""
    dtype = np.dtype(dtype)
    if not is_float(dtype):
        raise TypeError(f"cast to {dtype}: expected a floating-point dtype: float16, bfloat16, float32 or float64")
    return x if x.dtype == dtype else Cast.apply(x, dtype=dtype, made=made_of(x, dtype))


def reshape(x: Tensor, *shape: Any) -> Tensor:
    """The same elements in another shape; one length may be -1."""
    return Reshape.apply(x, shape=_unpacked(shape))


def transpose(x: Tensor, *axes: Any) -> Tensor:
    """Axes in the order given, reversed without one (as numpy.transpose)."""
    return Transpose.apply(x, axes=_unpacked(axes) or None)


def _unpacked(words: tuple) -> tuple[int, ...]:
    return tuple(words[0]) if len(words) == 1 and isinstance(words[0], tuple | list) else words


def sum(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """Sum over all axes, or over those given."""
    return Sum.apply(x, axis=axis, keepdims=keepdims)


def mean(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """Mean over all axes, or over those given. Raises ValueError where there is nothing to average."""
    axes = range(x.ndim) if axis is None else axis if isinstance(axis, tuple) else (axis,)
    count = math.prod(x.shape[i] for i in axes)
    if not count:
        along = "" if axis is None else f" over axis {axis}"
        raise ValueError(f"mean of shape {x.shape}{along}: the mean of no elements is not defined")
    average = Sum.apply(x, axis=axis, keepdims=keepdims, wide=True) * (1.0 / count)
    return cast(average, x.dtype) if x.dtype in HALVES else average


def max(x: Tensor, axis: int | tuple[int, ...] | None = None, keepdims: bool = False) -> Tensor:
    """Largest element over all axes, or over those given."""
    return Max.apply(x, axis=axis, keepdims=keepdims)


def _pow(x: Tensor, exponent: float) -> Tensor:
    if not isinstance(exponent, Real):
        raise TypeError(f"a tensor's power takes a number as its exponent, got {type(exponent).__name__}")
    exponent = exponent.item() if isinstance(exponent, np.generic) else exponent  # a np.float64 would widen float32
    return Pow.apply(x, exponent=exponent)


_OPERATORS = {
    "__add__": lambda a, b: Add.apply(a, b),
    "__radd__": lambda a, b: Add.apply(as_tensor(b, a), a),
    "__sub__": lambda a, b: Sub.apply(a, b),
    "__rsub__": lambda a, b: Sub.apply(as_tensor(b, a), a),
    "__mul__": lambda a, b: Mul.apply(a, b),
    "__rmul__": lambda a, b: Mul.apply(as_tensor(b, a), a),
    "__truediv__": lambda a, b: Div.apply(a, b),
    "__rtruediv__": lambda a, b: Div.apply(as_tensor(b, a), a),
    "__matmul__": lambda a, b: MatMul.apply(a, b),
    "__rmatmul__": lambda a, b: MatMul.apply(as_tensor(b, a), a),
    "__neg__": lambda a: Neg.apply(a),
    "__pow__": _pow,
    "__getitem__": lambda a, index: Slice.apply(a, index=index),
    "reshape": reshape,
    "transpose": transpose,
    "sum": sum,
    "mean": mean,
    "max": max,
}
for _name, _operator in _OPERATORS.items():
    setattr(Tensor, _name, _operator)
