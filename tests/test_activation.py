"""Activation functions: gradients in float64, PyTorch as an oracle, odd inputs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocnn import functional as F
from nanocnn.kernels.dispatch import using
from nanocnn.tensor import Tensor
from nanocnn.testing import check_gradients

NAMES = ("relu", "sigmoid", "silu", "gelu")
POLICIES = ("reference", "fastest")
rng = np.random.default_rng(2)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(3, 4, 5, 7), (33,), (1, 1), (0, 5)])
def test_gradients(name, shape, policy):
    with using(policy):
        check_gradients(getattr(F, name), 3 * rng.standard_normal(shape))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_equals_pytorch(name, policy):
    torch = pytest.importorskip("torch")
    x = np.concatenate([np.linspace(-12, 12, 4001), [0, -0.0, np.nan]]).astype(np.float32)
    gy = rng.standard_normal(x.shape).astype(np.float32)
    theirs = torch.from_numpy(x.copy()).requires_grad_()
    y_theirs = getattr(torch, name, None) or getattr(torch.nn.functional, name)
    y_theirs = y_theirs(theirs)
    y_theirs.backward(torch.from_numpy(gy))
    mine = Tensor(x, requires_grad=True)
    with using(policy):
        y = getattr(F, name)(mine)
        y.backward(gy)
    np.testing.assert_allclose(y.data, y_theirs.detach().numpy(), rtol=3e-6, atol=1e-6)
    np.testing.assert_allclose(mine.grad, theirs.grad.numpy(), rtol=3e-6, atol=1e-6)
    assert np.isnan(y.data[-1])  # a NaN must come out as one
    assert y.dtype == mine.grad.dtype == np.float32


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", NAMES)
def test_a_view_that_is_not_contiguous(name, policy):
    x = rng.standard_normal((4, 6, 5)).astype(np.float32)
    view = x.transpose(2, 0, 1)[:, ::2]
    with using(policy):
        got, expected = getattr(F, name)(Tensor(view)), getattr(F, name)(Tensor(view.copy()))
    np.testing.assert_array_equal(got.data, expected.data)


@pytest.mark.parametrize("name", NAMES)
def test_backward_leaves_its_gradient_alone(name):
    x, gy = Tensor(rng.standard_normal((5, 8)), requires_grad=True), rng.standard_normal((5, 8))
    before = gy.copy()
    getattr(F, name)(x).backward(gy)
    np.testing.assert_array_equal(gy, before)


def test_no_overflow_far_out():
    x = Tensor(np.array([-1e4, -200, 200, 1e4], np.float32), requires_grad=True)
    for name in NAMES:
        with np.errstate(over="raise", invalid="raise"):
            y = getattr(F, name)(x)
            y.backward(np.ones(4, np.float32))
        assert np.isfinite(y.data).all()
        assert np.isfinite(x.grad).all()


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=10, deadline=None)
@given(name=st.sampled_from(NAMES), shape=st.lists(st.integers(1, 7), max_size=4), seed=st.integers(0, 2**32 - 1))
def test_gradients_of_any_shape(policy, name, shape, seed):
    with using(policy):
        check_gradients(getattr(F, name), 3 * np.random.default_rng(seed).standard_normal(shape))
