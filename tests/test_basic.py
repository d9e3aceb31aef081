"""Arithmetic, shapes and sums: derivatives in float64, values against NumPy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanocnn.functional as F
from nanocnn.kernels.dispatch import using
from nanocnn.kernels.narrow import HALVES
from nanocnn.tensor import Tensor
from nanocnn.testing import check_gradients

rng = np.random.default_rng(1)


def positive(*shape):
    return rng.uniform(0.5, 2, shape)


@pytest.mark.parametrize(
    "fn",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: 1.0 - a * 2.0 + 3.0 / b,
        lambda a, b: (-a) ** 2 + b**0.5,
        lambda a, b: F.exp(a) + F.log(b),
    ],
)
@pytest.mark.parametrize("shapes", [((3, 4), (3, 4)), ((3, 4), (4,)), ((1, 4), (3, 1)), ((), (2, 3)), ((0, 3), (3,))])
def test_arithmetic(fn, shapes):
    check_gradients(fn, *(positive(*s) for s in shapes))


@pytest.mark.parametrize(
    "shapes", [((3, 4), (4, 2)), ((5, 3, 4), (4, 2)), ((5, 3, 4), (5, 4, 2)), ((2, 1, 3, 4), (5, 4, 2))]
)
def test_matmul(shapes):
    check_gradients(lambda a, b: a @ b, *(positive(*s) for s in shapes))


def test_matmul_of_transposed_views():
    check_gradients(lambda a, b: a.transpose(1, 0) @ b.transpose(), positive(4, 3), positive(2, 4))


@pytest.mark.parametrize("leading", [(3,), (2, 3), (0,)])
def test_linear(leading):
    check_gradients(F.linear, positive(*leading, 4), positive(4, 5), positive(5))
    check_gradients(F.linear, positive(*leading, 4), positive(4, 5))


def test_linear_names_the_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 3\), \(4, 5\)"):
        F.linear(Tensor(positive(2, 3)), Tensor(positive(4, 5)))


@pytest.mark.parametrize("axis", [None, 0, 1, (0, 2), -1])
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("op", ["sum", "mean", "max"])
def test_reductions(op, axis, keepdims):
    x = positive(3, 4, 2)
    y = getattr(Tensor(x), op)(axis=axis, keepdims=keepdims)
    np.testing.assert_allclose(y.data, getattr(x, op)(axis=axis, keepdims=keepdims))
    check_gradients(lambda t: getattr(t, op)(axis=axis, keepdims=keepdims), x)


def test_equal_maxima_share_the_gradient():
    x = Tensor(np.array([[1.0, 2.0, 2.0]]), requires_grad=True)
    x.max(axis=1).sum().backward()
    np.testing.assert_array_equal(x.grad, [[0, 0.5, 0.5]])


@pytest.mark.parametrize(
    "index",
    [
        1,
        slice(0, 2),
        (slice(None), 1),
        (..., 0),
        (None, 2),
        np.array([0, 2, 2]),
        (slice(1, None, 2), slice(None, None, -1)),
    ],
)
def test_slicing(index):
    x = positive(4, 3)
    np.testing.assert_array_equal(Tensor(x)[index].data, x[index])
    check_gradients(lambda t: t[index], x)


def test_shapes():
    x = positive(2, 3, 4)
    check_gradients(lambda t: t.reshape(6, 4), x)
    check_gradients(lambda t: t.reshape((4, -1)), x)
    check_gradients(lambda t: t.transpose(2, 0, 1), x)
    check_gradients(lambda t: t.transpose(), x)
    check_gradients(lambda a, b: F.concat([a, b, a], axis=1), x, positive(2, 5, 4))
    check_gradients(lambda t: F.pad(t, [(0, 0), (1, 2), (3, 0)]), x)


def test_cast_returns_the_gradient_in_the_dtype_of_its_input():
    x = Tensor(np.ones(3), requires_grad=True)
    y = F.cast(x, np.float32)
    assert y.dtype == np.float32
    y.sum().backward()
    assert x.grad.dtype == np.float64
    assert F.cast(x, np.float64) is x


@pytest.mark.parametrize("shape", [(2, 5, 4), (2, 3, 5, 4)])
def test_attention(shape):
    check_gradients(F.scaled_dot_product_attention, *(rng.standard_normal(shape) for _ in range(3)))


def test_attention_equals_pytorch():
    torch = pytest.importorskip("torch")
    q, k, v = (rng.standard_normal(s) for s in ((2, 3, 5, 4), (2, 3, 6, 4), (2, 3, 6, 7)))
    theirs = torch.nn.functional.scaled_dot_product_attention(*map(torch.from_numpy, (q, k, v)))
    np.testing.assert_allclose(F.scaled_dot_product_attention(*map(Tensor, (q, k, v))).data, theirs, rtol=1e-12)


def test_check_gradients_sees_a_wrong_gradient():
    from nanocnn.tensor import Op

    class Wrong(Op):
        def forward(self, a):
            return a * a

        def backward(self, gy):
            return gy * 1.001

    with pytest.raises(AssertionError, match="central difference"):
        check_gradients(Wrong.apply, positive(3))
    with pytest.raises(TypeError, match="float64"):
        check_gradients(lambda a: a, np.ones(3, np.float32))


@pytest.mark.parametrize(("shape", "axis"), [((0,), None), ((3, 0), 1), ((0, 2), (0, 1))])
def test_the_mean_of_nothing_is_refused(shape, axis):
    with pytest.raises(ValueError, match=rf"mean of shape \({shape[0]},.*no elements"):
        Tensor(np.empty(shape)).mean(axis=axis)


def test_a_mean_beside_an_empty_axis_is_empty():
    assert Tensor(np.empty((0, 3))).mean(axis=np.int64(1)).shape == (0,)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("exponent", [0, 0.0, 1, 2])
def test_powers_at_zero(exponent):
    x = Tensor(np.array([0.0, 2.0]), requires_grad=True)
    (x**exponent).sum().backward()
    np.testing.assert_array_equal(x.grad, {0: [0, 0], 1: [1, 1], 2: [0, 4]}[exponent])


def test_cast_and_linear_take_floats_only():
    with pytest.raises(TypeError, match="cast to uint8: expected a floating-point dtype"):
        F.cast(Tensor(np.ones(3)), np.uint8)
    with pytest.raises(TypeError, match="linear of dtype int64: expected float16, bfloat16, float32 or float64"):
        F.linear(Tensor([[1, 2]]), Tensor([[1], [2]]))


@pytest.mark.parametrize("policy", ["fastest", "reference"])
@settings(max_examples=10, deadline=None)
@given(shape=st.lists(st.integers(1, 5), max_size=4), seed=st.integers(0, 2**32 - 1))
def test_elementwise_gradients_of_any_shape(policy, shape, seed):
    x = np.random.default_rng(seed).uniform(0.5, 2, shape)
    with using(policy):
        check_gradients(F.exp, x)
        check_gradients(F.log, x)
        check_gradients(lambda t: F.cast(F.cast(t, np.longdouble) ** 2, np.float64), x)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_long_sums_of_halves_are_made_in_float32(dtype):
    many = Tensor(np.ones(70_000, dtype), requires_grad=True)
    mean = F.mean(many)
    mean.backward()
    assert mean.dtype == many.grad.dtype == dtype
    assert float(mean.data) == 1
    assert float(many.grad[0]) == float(dtype.type(1 / 70_000))
    once = Tensor(np.ones(3, dtype), requires_grad=True)
    once[np.zeros(5000, int)].sum().backward()
    np.testing.assert_array_equal(once.grad, np.array([5000, 0, 0]).astype(dtype))
