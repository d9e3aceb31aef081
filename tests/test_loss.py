"""Softmax and losses: gradients in float64, PyTorch as an oracle, NaN, infinities and labels that are no class."""

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
rng = np.random.default_rng(4)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize(("shape", "axis"), [((3, 5), -1), ((2, 3, 4, 7), 1), ((6, 4), 0), ((1, 1), -1), ((5, 40), 1)])
def test_softmax_gradients_and_pytorch(name, shape, axis, policy):
    x = 3 * rng.standard_normal(shape)
    with using(policy):
        check_gradients(lambda x: getattr(F, name)(x, axis), x)
        torch = pytest.importorskip("torch")
        x = x.astype(np.float32)
        theirs = getattr(torch, name)(torch.from_numpy(x), axis).numpy()
        np.testing.assert_allclose(getattr(F, name)(Tensor(x), axis).data, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_softmax_of_large_and_infinite_numbers(policy):
    x = np.array([[1e4, 1e4 - 1, 0], [-np.inf, 2, 2], [0, 1, np.nan], [np.nan, 0, 1]], np.float32)
    with using(policy):
        y, log_y = F.softmax(Tensor(x)).data, F.log_softmax(Tensor(x)).data
    np.testing.assert_allclose(y[:2], [[0.7310586, 0.2689414, 0], [0, 0.5, 0.5]], rtol=1e-6)
    half = np.log(0.5)
    np.testing.assert_allclose(log_y[:2], [[-0.3132617, -1.3132617, -10000.313], [-np.inf, half, half]], rtol=1e-6)
    assert np.isnan(y[2:]).all()
    assert np.isnan(log_y[2:]).all()


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_softmax_of_nothing(name, shape, policy):
    x = Tensor(np.empty(shape, np.float32), requires_grad=True)
    with using(policy):
        y = getattr(F, name)(x)
        y.backward(y.data)
    assert y.shape == x.grad.shape == shape


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(5, 10), (1, 3), (20, 40)])
def test_cross_entropy_gradients_and_pytorch(shape, smoothing, reduction, policy):
    logits, labels = 3 * rng.standard_normal(shape), rng.integers(0, shape[1], shape[0])
    with using(policy):
        check_gradients(lambda x: F.cross_entropy(x, labels, smoothing, reduction), logits)
        torch = pytest.importorskip("torch")
        mine, theirs = Tensor(logits.astype(np.float32), requires_grad=True), torch.from_numpy(logits).requires_grad_()
        loss = F.cross_entropy(mine, labels, smoothing, reduction)
        loss_theirs = torch.nn.functional.cross_entropy(
            theirs, torch.from_numpy(labels), label_smoothing=smoothing, reduction=reduction
        )
        loss.backward(np.ones(loss.shape, np.float32))
    loss_theirs.backward(torch.ones_like(loss_theirs))
    assert loss.shape == loss_theirs.shape
    assert loss.dtype == mine.grad.dtype == np.float32
    np.testing.assert_allclose(loss.data, loss_theirs.detach().numpy(), rtol=2e-6, atol=1e-6)
    np.testing.assert_allclose(mine.grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("place", [(0, 0), (0, 2), (0, 1)])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.filterwarnings("ignore:invalid value")  # infinity minus infinity, in NumPy's words
def test_a_bad_logit_is_a_nan_in_the_loss(bad, place, smoothing, policy):
    logits = np.ones((2, 3), np.float32)
    logits[place] = bad
    with using(policy):
        x = Tensor(logits, requires_grad=True)
        loss = F.cross_entropy(x, [1, 2], smoothing, "none")
        loss.backward(np.ones(2, np.float32))
    np.testing.assert_array_equal(np.isnan(loss.data), [True, False])
    assert np.isnan(x.grad[0]).all()
    assert np.isfinite(x.grad[1]).all()


@pytest.mark.parametrize("policy", POLICIES)
def test_an_impossible_class_costs_nothing_and_a_true_one_everything(policy):
    with using(policy):
        losses = F.cross_entropy(Tensor([[0.0, 0.0, -np.inf], [0.0, 0.0, -np.inf]]), [0, 2], reduction="none").data
    np.testing.assert_allclose(losses, [np.log(2), np.inf], rtol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_large_logits_keep_their_differences(policy):
    """At 1e6 a float32 is known to 0.06; the differences below are exact, and so must be what comes of them."""
    x = Tensor(np.array([[1e6, 1e6 - 1, 0]], np.float32), requires_grad=True)
    with using(policy):
        loss = F.cross_entropy(x, [1])
        loss.backward()
    np.testing.assert_allclose(loss.data, 1.3132617, rtol=1e-6)
    np.testing.assert_allclose(x.grad, [[0.7310586, -0.7310586, 0]], rtol=1e-6)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_batch_has_sum_zero_and_zero_gradients(policy):
    x = Tensor(np.empty((0, 10), np.float32), requires_grad=True)
    with using(policy):
        loss = F.cross_entropy(x, np.empty(0, np.int64), 0.1, "sum")
        loss.backward()
    assert loss.item() == 0
    assert x.grad.shape == (0, 10)
    with pytest.raises(ValueError, match="mean over an empty batch"):
        F.cross_entropy(x, np.empty(0, np.int64))


@pytest.mark.parametrize(
    "labels", [[1, 0], np.array([1, 0], np.uint8), Tensor(np.array([1, 0])), np.array([1, 9, 0, 9])[::2]]
)
def test_labels_of_any_integer_kind(labels):
    x = Tensor(np.log(np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)))
    np.testing.assert_allclose(F.cross_entropy(x, labels, reduction="none").data, -np.log([0.75, 0.5]), rtol=1e-6)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 10, -1], "label 10 in row 2 is no class: expected 0 to 9"),
        ([0, -1, 3, 4], "label -1 in row 1 is no class"),
        ([0, 1, 2], r"labels of shape \(3,\) for logits of shape \(4, 10\), expected \(4,\)"),
        (np.zeros((4, 10), np.int64), r"labels of shape \(4, 10\)"),
        (np.zeros(4, np.float32), "labels of dtype float32, expected integers"),
        (np.zeros(4, bool), "labels of dtype bool, expected integers"),
    ],
)
def test_labels_that_are_wrong(labels, message):
    with pytest.raises(ValueError, match=message):
        F.cross_entropy(Tensor(np.zeros((4, 10), np.float32)), labels)


def test_other_wrong_arguments():
    x, labels = Tensor(np.zeros((2, 3), np.float32)), [0, 1]
    with pytest.raises(ValueError, match=r"logits of shape \(3,\): expected \(N, classes\)"):
        F.cross_entropy(Tensor(np.zeros(3, np.float32)), [0])
    with pytest.raises(ValueError, match=r"label_smoothing=1\.5"):
        F.cross_entropy(x, labels, 1.5)
    with pytest.raises(ValueError, match="unknown reduction 'avg'"):
        F.cross_entropy(x, labels, reduction="avg")


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mse_loss(reduction):
    torch = pytest.importorskip("torch")
    x, target = rng.standard_normal((2, 5, 4))
    check_gradients(lambda x, target: F.mse_loss(x, target, reduction), x, target)
    theirs = torch.nn.functional.mse_loss(torch.from_numpy(x), torch.from_numpy(target), reduction=reduction)
    np.testing.assert_allclose(F.mse_loss(Tensor(x), target, reduction).data, theirs.numpy(), rtol=1e-12)


def test_mse_loss_of_shapes_that_differ():
    with pytest.raises(ValueError, match="expected equal shapes"):
        F.mse_loss(Tensor(np.zeros((2, 3), np.float32)), np.zeros((2, 1)))
    assert F.mse_loss(Tensor(np.zeros((2, 3), np.float32)), np.ones((2, 3))).dtype == np.float32


@pytest.mark.parametrize("policy", POLICIES)
@settings(max_examples=10, deadline=None)
@given(data=st.data(), n=st.integers(1, 9), c=st.integers(2, 20), seed=st.integers(0, 2**32 - 1))
def test_gradients_of_any_shape(policy, data, n, c, seed):
    rng = np.random.default_rng(seed)
    x, target, labels = rng.standard_normal((n, c)), rng.standard_normal((n, c)), rng.integers(0, c, n)
    smoothing, axis = data.draw(st.floats(0, 1)), data.draw(st.sampled_from([0, 1, -1]))
    reduction = data.draw(st.sampled_from(["mean", "sum", "none"]))
    with using(policy):
        check_gradients(lambda x: F.cross_entropy(x, labels, smoothing, reduction), x)
        check_gradients(lambda x, t: F.mse_loss(x, t, reduction), x, target)
        check_gradients(lambda x: F.softmax(x, axis), x)
        check_gradients(F.log_softmax, x)
