"""Pooling: gradients in float64, PyTorch as an oracle, windows that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocnn import functional as F
from nanocnn.kernels.dispatch import using
from nanocnn.tensor import Tensor
from nanocnn.testing import check_gradients

POLICIES = ("reference", "fastest")
POOLS = {"max_pool2d": F.max_pool2d, "avg_pool2d": F.avg_pool2d}


@st.composite
def calls(draw):
    """An image batch and a window that fits it."""
    small = st.integers(1, 3)
    kernel, stride = (draw(small), draw(small)), (draw(small), draw(small))
    padding = tuple(draw(st.integers(0, k // 2)) for k in kernel)
    h, w = (draw(st.integers(max(1, k - 2 * p), 7)) for k, p in zip(kernel, padding, strict=True))
    x = np.random.default_rng(draw(st.integers(0, 2**32 - 1))).standard_normal(
        (draw(small), h, w, draw(st.integers(1, 18)))
    )
    return x, kernel, stride, padding


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", POOLS)
@settings(max_examples=30, deadline=None)
@given(call=calls())
def test_gradients(name, policy, call):
    x, *window = call
    with using(policy):
        check_gradients(lambda x: POOLS[name](x, *window), x)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", POOLS)
@settings(max_examples=30, deadline=None)
@given(call=calls(), rounded=st.booleans())
def test_equals_pytorch(name, policy, call, rounded):
    torch = pytest.importorskip("torch")
    x, *window = call
    x = (np.round(x) if rounded else x).astype(np.float32)  # rounded: many equals, of which the first counts
    theirs = torch.from_numpy(x.transpose(0, 3, 1, 2).copy()).requires_grad_()
    y_theirs = getattr(torch.nn.functional, name)(theirs, *window)
    gy = np.random.default_rng(0).standard_normal(y_theirs.shape).astype(np.float32)
    y_theirs.backward(torch.from_numpy(gy))
    mine = Tensor(x, requires_grad=True)
    with using(policy):
        y = POOLS[name](mine, *window)
        y.backward(gy.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(y.data, y_theirs.detach().numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(mine.grad, theirs.grad.numpy().transpose(0, 2, 3, 1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_max_pool_of_infinities_and_nan(policy):
    x = np.full((1, 4, 4, 1), -np.inf, np.float32)
    x[0, 0, 0] = np.nan
    mine = Tensor(x, requires_grad=True)
    with using(policy):
        y = F.max_pool2d(mine, 3, 3, 1)
        y.backward(np.ones_like(y.data))
    np.testing.assert_array_equal(y.data[0, :, :, 0], [[np.nan, -np.inf], [-np.inf, -np.inf]])
    assert mine.grad.sum() == 4  # no gradient went into the padding
    assert mine.grad[0, 0, 0, 0] == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_pixels_that_no_window_covers_get_zero(policy):
    mine = Tensor(np.ones((1, 5, 8, 20), np.float32), requires_grad=True)
    with using(policy):
        F.max_pool2d(mine, 2, 3).backward(np.ones((1, 2, 3, 20), np.float32))
    assert mine.grad.sum() == 2 * 3 * 20
    assert (mine.grad[:, 2] == 0).all()
    assert (mine.grad[:, :, [2, 5]] == 0).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 4, 4, 0)])
@pytest.mark.parametrize("name", POOLS)
def test_nothing_in_nothing_out(name, shape, policy):
    x = Tensor(np.empty(shape, np.float32), requires_grad=True)
    with using(policy):
        y = POOLS[name](x, 2)
        y.backward(y.data)
    assert y.shape == (shape[0], 2, 2, shape[3])
    assert x.grad.shape == shape


@pytest.mark.parametrize("policy", POLICIES)
def test_a_window_of_more_positions_than_a_byte_counts(policy):
    with using(policy):
        check_gradients(
            lambda x: F.max_pool2d(x, (18, 17), 1), np.random.default_rng(0).standard_normal((1, 20, 18, 2))
        )


def test_positions_take_a_byte_each():
    from nanocnn.kernels.pool2d import max_pool2d

    y, position = max_pool2d(np.zeros((2, 4, 4, 3), np.float32), (2, 2), (2, 2), (0, 0))
    assert position.dtype == np.uint8
    assert position.shape == y.shape


@pytest.mark.parametrize("size", [1, 2, (3, 2), (5, 7), (7, 7)])
def test_adaptive_average_equals_pytorch(size):
    torch = pytest.importorskip("torch")
    x = np.random.default_rng(0).standard_normal((2, 7, 6, 3))
    check_gradients(lambda x: F.adaptive_avg_pool2d(x, size), x)
    theirs = torch.nn.functional.adaptive_avg_pool2d(torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), size)
    mine = F.adaptive_avg_pool2d(Tensor(x), size)
    np.testing.assert_allclose(mine.data, theirs.numpy().transpose(0, 2, 3, 1), rtol=1e-12)


def test_global_average():
    x = np.random.default_rng(0).standard_normal((3, 5, 4, 6))
    np.testing.assert_allclose(F.global_avg_pool2d(Tensor(x)).data, x.mean(axis=(1, 2)), rtol=1e-12)
    check_gradients(F.global_avg_pool2d, x)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        (dict(kernel_size=6), r"spans \(6, 6\) is larger than the padded image \(4, 5\)"),
        (dict(kernel_size=(2, 8), padding=(0, 1)), r"larger than the padded image \(4, 7\)"),
        (dict(kernel_size=2, padding=2), "padding .* is more than half the kernel"),
        (dict(kernel_size=0), "kernel_size=0"),
        (dict(kernel_size=2, stride=0), "stride=0"),
        (dict(kernel_size=2, padding=-1), "padding=-1"),
        (dict(kernel_size=(2, 2, 2)), "kernel_size"),
        (dict(kernel_size=2.0), "kernel_size=2.0"),
    ],
)
@pytest.mark.parametrize("name", POOLS)
def test_a_window_that_does_not_fit(name, window, message):
    with pytest.raises(ValueError, match=message):
        POOLS[name](Tensor(np.ones((1, 4, 5, 2), np.float32)), **window)


@pytest.mark.parametrize("pool", [*POOLS.values(), F.adaptive_avg_pool2d])
def test_what_is_no_image(pool):
    with pytest.raises(ValueError, match=r"\(3, 4\): expected images \(N, H, W, C\)"):
        pool(Tensor(np.ones((3, 4), np.float32)), 2)
