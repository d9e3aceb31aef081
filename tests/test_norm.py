"""Batch norm and layer norm: gradients in float64, PyTorch as an oracle, accuracy, odd batches."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanocnn import functional as F
from nanocnn.kernels import batch_norm as kernels
from nanocnn.kernels import memory, threads
from nanocnn.kernels.dispatch import using
from nanocnn.tensor import Tensor
from nanocnn.testing import check_gradients

POLICIES = ("reference", "fastest")
SHAPES = [(6, 5), (2, 3, 4, 7), (9, 1), (40, 33)]
rng = np.random.default_rng(3)


def _statistics(channels, dtype=np.float64):
    return rng.standard_normal(channels).astype(dtype), rng.random(channels).astype(dtype) + dtype(0.5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_norm_gradients(shape, training, policy):
    c = shape[-1]
    running = _statistics(c)
    x, weight, bias = rng.standard_normal(shape) * 2 + 1, rng.standard_normal(c), rng.standard_normal(c)
    with using(policy):
        check_gradients(lambda x, w, b: F.batch_norm(x, *running, w, b, training, momentum=0), x, weight, bias)
        check_gradients(lambda x: F.batch_norm(x, *running, None, None, training, momentum=0), x)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(8, 5), (3, 4, 5, 6)])
def test_batch_norm_and_its_running_statistics_equal_pytorch(shape, policy):
    torch = pytest.importorskip("torch")
    c = shape[-1]
    theirs = (torch.nn.BatchNorm1d if len(shape) == 2 else torch.nn.BatchNorm2d)(c, momentum=0.3, eps=1e-3)
    mean, var = np.zeros(c, np.float32), np.ones(c, np.float32)
    weight, bias = rng.standard_normal((2, c)).astype(np.float32)
    with torch.no_grad():
        theirs.weight.copy_(torch.from_numpy(weight))
        theirs.bias.copy_(torch.from_numpy(bias))
    w, b = Tensor(weight, requires_grad=True), Tensor(bias, requires_grad=True)
    for step in range(4):
        training = step < 3
        theirs.train(training)
        theirs.zero_grad()
        w.zero_grad()
        b.zero_grad()
        x = (rng.standard_normal(shape) * 3 + 2).astype(np.float32)
        gy = rng.standard_normal(shape).astype(np.float32)
        x_theirs = torch.from_numpy(np.moveaxis(x, -1, 1).copy()).requires_grad_()
        y_theirs = theirs(x_theirs)
        y_theirs.backward(torch.from_numpy(np.moveaxis(gy, -1, 1).copy()))
        mine = Tensor(x, requires_grad=True)
        with using(policy):
            y = F.batch_norm(mine, mean, var, w, b, training, momentum=0.3, eps=1e-3)
            y.backward(gy)
        close = dict(rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(np.moveaxis(y.data, -1, 1), y_theirs.detach().numpy(), **close)
        np.testing.assert_allclose(np.moveaxis(mine.grad, -1, 1), x_theirs.grad.numpy(), **close)
        np.testing.assert_allclose(w.grad, theirs.weight.grad.numpy(), **close)
        np.testing.assert_allclose(b.grad, theirs.bias.grad.numpy(), **close)
        np.testing.assert_allclose(mean, theirs.running_mean.numpy(), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(var, theirs.running_var.numpy(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_statistics_of_many_rows_far_from_zero(policy):
    """float32 sums in a row, or E[x^2] - E[x]^2, would be wrong in the second digit here."""
    x = (rng.standard_normal((100_003, 3)) + np.array([1e3, -1e4, 0])).astype(np.float32)
    with using(policy):
        mean, var = kernels.batch_norm_stats(x)
    np.testing.assert_allclose(mean, x.mean(axis=0, dtype=np.float64), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(var, x.var(axis=0, dtype=np.float64), rtol=1e-5)


def test_a_constant_channel_has_variance_zero():
    _, var = kernels.batch_norm_stats(np.full((1000, 2), 12345.678, np.float32))
    np.testing.assert_array_equal(var, 0)


def test_sums_do_not_depend_on_the_number_of_threads():
    x, gy = rng.standard_normal((2, 50_000, 20)).astype(np.float32)
    results = []
    before = threads.count()
    try:
        for count in (1, 2):
            threads.limit(count)
            results.append([*kernels.batch_norm_stats(x), *kernels.batch_norm_grad_stats(gy, x, x[0])])
    finally:
        threads.limit(before)
    for a, b in zip(*results, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("training", [True, False])
def test_an_empty_batch_changes_nothing(training, policy):
    mean, var = _statistics(3, np.float32)
    before = mean.copy(), var.copy()
    x = Tensor(np.empty((0, 4, 4, 3), np.float32), requires_grad=True)
    w, b = (Tensor(np.ones(3, np.float32), requires_grad=True) for _ in range(2))
    with using(policy):
        y = F.batch_norm(x, mean, var, w, b, training)
        y.backward(y.data)
    assert y.shape == x.grad.shape == x.shape
    for g in (w.grad, b.grad):
        np.testing.assert_array_equal(g, 0)
    np.testing.assert_array_equal((mean, var), before)


def test_nan_reaches_the_output_and_the_statistics():
    x = np.ones((4, 2), np.float32)
    x[2, 1] = np.nan
    mean, var = np.zeros(2, np.float32), np.ones(2, np.float32)
    y = F.batch_norm(Tensor(x), mean, var, training=True)
    assert np.isnan(y.data[:, 1]).all()
    assert np.isfinite(y.data[:, 0]).all()
    assert np.isnan(mean[1])
    assert np.isnan(var[1])


def test_evaluation_leaves_the_running_statistics_alone():
    mean, var = _statistics(5, np.float32)
    before = mean.copy(), var.copy()
    F.batch_norm(Tensor(rng.standard_normal((7, 5)).astype(np.float32)), mean, var)
    np.testing.assert_array_equal((mean, var), before)


def test_views_that_are_not_contiguous():
    x, gy = rng.standard_normal((2, 4, 3, 5, 6)).transpose(0, 1, 3, 4, 2)
    mean, var = _statistics(3)

    def run(x, gy):
        mine = Tensor(x, requires_grad=True)
        y = F.batch_norm(mine, mean, var, training=True, momentum=0)
        y.backward(gy)
        return y.data, mine.grad

    np.testing.assert_array_equal(run(x, gy), run(x.copy(), gy.copy()))


@pytest.mark.parametrize(
    ("shape", "running", "weight", "message"),
    [
        ((3, 4, 5), 5, None, r"expected \(N, C\) or \(N, H, W, C\)"),
        ((3, 4), 5, None, "running statistics"),
        ((3, 4), 4, 5, "expected one of each for every one of the 4 channels"),
        ((1, 4), 4, None, "one row has no variance"),
    ],
)
def test_batch_norm_of_shapes_that_do_not_fit(shape, running, weight, message):
    weight = None if weight is None else Tensor(np.ones(weight, np.float32))
    with pytest.raises(ValueError, match=message):
        F.batch_norm(Tensor(np.ones(shape, np.float32)), np.zeros(running), np.ones(running), weight, training=True)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(6, 5), (2, 3, 4, 7), (70, 33), (4, 2), (1, 8)])
def test_layer_norm_gradients(shape, policy):
    c = shape[-1]
    x, weight, bias = rng.standard_normal(shape) * 2 + 1, rng.standard_normal(c), rng.standard_normal(c)
    with using(policy):
        check_gradients(F.layer_norm, x, weight, bias)
        check_gradients(F.layer_norm, x)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("far", [0, 1e3])
def test_layer_norm_equals_pytorch(far, policy):
    torch = pytest.importorskip("torch")
    x = (rng.standard_normal((3, 50, 40)) + far).astype(np.float32)
    gy = rng.standard_normal(x.shape).astype(np.float32)
    weight, bias = rng.standard_normal((2, 40)).astype(np.float32)
    theirs = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in (x, weight, bias)]
    y_theirs = torch.nn.functional.layer_norm(theirs[0], (40,), *theirs[1:])
    y_theirs.backward(torch.from_numpy(gy.astype(np.float64)))
    mine = [Tensor(a, requires_grad=True) for a in (x, weight, bias)]
    with using(policy):
        y = F.layer_norm(*mine)
        y.backward(gy)
    tolerance = 2e-5 if far == 0 else 1e-3  # the input itself is rounded to 6e-5 there
    np.testing.assert_allclose(y.data, y_theirs.detach().numpy(), rtol=tolerance, atol=tolerance)
    for a, b in zip(mine, theirs, strict=True):
        np.testing.assert_allclose(a.grad, b.grad.numpy(), rtol=tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("policy", POLICIES)
def test_layer_norm_of_nothing(policy):
    x = Tensor(np.empty((0, 3), np.float32), requires_grad=True)
    w = Tensor(np.ones(3, np.float32), requires_grad=True)
    with using(policy):
        F.layer_norm(x, w).backward(np.empty((0, 3), np.float32))
    np.testing.assert_array_equal(w.grad, 0)


def test_layer_norm_of_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="the 4 channels"):
        F.layer_norm(Tensor(np.ones((2, 4), np.float32)), Tensor(np.ones(3, np.float32)))
    with pytest.raises(ValueError, match="at least one channel"):
        F.layer_norm(Tensor(np.ones((2, 0), np.float32)))


def test_layer_norm_keeps_nan_in_its_row():
    x = np.arange(12, dtype=np.float32).reshape(3, 4)
    x[1, 2] = np.nan
    np.testing.assert_array_equal(np.isnan(F.layer_norm(Tensor(x)).data).all(axis=1), [False, True, False])


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=10, deadline=None)
@given(
    shape=st.tuples(st.integers(3, 9), st.integers(1, 4), st.integers(1, 4), st.integers(3, 9)),
    seed=st.integers(0, 2**32 - 1),
)
def test_gradients_of_any_shape(policy, shape, seed):
    rng = np.random.default_rng(seed)
    x, (weight, bias) = rng.standard_normal(shape), rng.standard_normal((2, shape[3]))
    running = np.zeros(shape[3]), np.ones(shape[3])
    with using(policy):
        check_gradients(F.layer_norm, x, weight, bias)
        for training in (True, False):
            check_gradients(
                lambda *t, on=training: F.batch_norm(t[0], *running, *t[1:], on, momentum=0), x, weight, bias
            )


@pytest.mark.parametrize("norm", [F.layer_norm, lambda x: F.batch_norm(x, np.zeros(3), np.ones(3))])
def test_integers_are_refused(norm):
    with pytest.raises(
        TypeError, match=r"norm of dtype uint8: expected float16, bfloat16, float32 or float64; normalise"
    ):
        norm(Tensor(np.ones((4, 3), np.uint8)))


@pytest.mark.parametrize("channels", [32, 20])
def test_results_larger_than_the_caches(monkeypatch, channels):
    """They are written past the caches, where whole vectors allow it: the same numbers."""
    rng = np.random.default_rng(0)
    x, gy, residual = (rng.standard_normal((4, 5, 6, channels)).astype(np.float32) for _ in range(3))
    mean, scale, shift, b = (rng.standard_normal(channels).astype(np.float32) for _ in range(4))
    calls = [
        (kernels.batch_norm_apply, (x, mean, scale, shift, residual, True)),
        (kernels.batch_norm_apply, (x, mean, scale, shift)),
        (kernels.batch_norm_residual_grad_stats, (gy, residual, x, mean)),
        (kernels.batch_norm_grad, (gy, x, mean, scale, shift, b, mean)),
    ]
    expected = [primitive(*args) for primitive, args in calls]
    monkeypatch.setattr(memory, "SMALL", 0)  # all arrays on pages of the pool
    monkeypatch.setattr(memory, "L3", 0)
    for (primitive, args), want in zip(calls, expected, strict=True):
        got = primitive(*args)
        for g, e in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
            np.testing.assert_array_equal(g, e)
