"""Dropout: what is dropped, that it belongs to the sample, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest

import nanocnn.random
from nanocnn import functional as F
from nanocnn.kernels.dispatch import using
from nanocnn.kernels.random import random_bits
from nanocnn.random import KEYED_STREAMS, keyed, manual_seed
from nanocnn.tensor import Tensor
from nanocnn.testing import check_gradients

POLICIES = ("reference", "fastest")


@pytest.fixture(autouse=True)
def _seed():
    manual_seed(11)
    yield
    nanocnn.random.manual_seed(0)


def _ones(*shape):
    return Tensor(np.ones(shape, np.float32))


def _mask(samples, p=0.5, epoch=0, width=300):
    with keyed(epoch, samples):
        return F.dropout(_ones(len(samples), width), p).data != 0


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(5, 7), (3, 2, 4, 6), (4,), (2, 1025)])
def test_gradients(shape, policy):
    def fn(x):
        with keyed(3, np.arange(len(x))):
            return F.dropout(F.dropout(x, 0.3), 0.5)

    with using(policy):
        check_gradients(fn, np.random.default_rng(0).standard_normal(shape))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_scale_and_mean(p, policy):
    with using(policy):
        y = F.dropout(_ones(200, 500), p).data
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - p))}
    assert abs((y == 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / y.size)
    assert y.dtype == np.float32


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mask_is_that_of_random_bits(policy):
    with using(policy), keyed(7, [3, 10**10]):
        F.dropout(_ones(2, 5))
        y = F.dropout(_ones(2, 50), 0.25).data
    bits = random_bits(np.array([3, 10**10]), 50, 11, epoch=7, stream=KEYED_STREAMS + 1)
    np.testing.assert_array_equal(y != 0, bits >= 2**30)


def test_masks_belong_to_samples_however_they_are_dealt_out():
    samples = np.array([5, 900, 17, 3, 44, 8])
    whole = _mask(samples)
    np.testing.assert_array_equal(whole, np.concatenate([_mask(samples[:1]), _mask(samples[1:4]), _mask(samples[4:])]))
    np.testing.assert_array_equal(whole[::-1], _mask(samples[::-1]))


def test_masks_change_with_epoch_call_and_seed():
    first = _mask([1, 2])
    np.testing.assert_array_equal(first, _mask([1, 2]))
    assert (first != _mask([1, 2], epoch=1)).any()
    with keyed(0, [1, 2]):
        a, b = (F.dropout(_ones(2, 300)).data != 0 for _ in range(2))
    np.testing.assert_array_equal(a, first)
    assert (a != b).any()
    manual_seed(12)
    assert (first != _mask([1, 2])).any()


def test_without_a_key_every_call_draws_and_the_seed_starts_over():
    a, b = F.dropout(_ones(4, 100)).data, F.dropout(_ones(4, 100)).data
    assert (a != b).any()
    manual_seed(11)
    np.testing.assert_array_equal(F.dropout(_ones(4, 100)).data, a)


def test_tokens_of_a_sample_share_its_key():
    tokens = Tensor(np.ones((6, 5), np.float32))  # 2 samples of 3 tokens
    with keyed(0, [8, 9]):
        together = F.dropout(tokens).data
    with keyed(0, [9]):
        np.testing.assert_array_equal(F.dropout(_ones(3, 5)).data, together[3:])
    with keyed(0, [1, 2, 3, 4]), pytest.raises(ValueError, match="dropout of 6 rows inside keyed\\(\\) with 4 samples"):
        F.dropout(tokens)


def test_nothing_to_drop():
    x = _ones(3, 4)
    assert F.dropout(x, 0.5, training=False) is x
    assert F.dropout(x, 0.0) is x


@pytest.mark.parametrize("policy", POLICIES)
def test_everything_dropped(policy):
    x = Tensor(np.full((3, 4), 5, np.float32), requires_grad=True)
    with using(policy):
        y = F.dropout(x, 1.0)
        y.backward(np.ones((3, 4), np.float32))
    np.testing.assert_array_equal(y.data, 0)
    np.testing.assert_array_equal(x.grad, 0)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shape", [(0, 6), (3, 0)])
def test_an_empty_batch(shape, policy):
    x = Tensor(np.empty(shape, np.float32), requires_grad=True)
    with using(policy), keyed(0, np.arange(shape[0])):
        y = F.dropout(x)
        y.backward(y.data)
    assert y.shape == x.grad.shape == shape


def test_a_dropped_nan_is_gone_and_a_kept_one_stays():
    y = F.dropout(Tensor(np.full((1, 1000), np.nan, np.float32))).data
    assert 400 < np.isnan(y).sum() < 600
    assert 400 < (y == 0).sum() < 600


def test_views_that_are_not_contiguous():
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    with keyed(0, np.arange(4)):
        a = F.dropout(Tensor(x.T)).data
    with keyed(0, np.arange(4)):
        np.testing.assert_array_equal(a, F.dropout(Tensor(x.T.copy())).data)


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan")])
def test_what_is_no_probability(p):
    with pytest.raises(ValueError, match="expected a probability from 0 to 1"):
        F.dropout(_ones(2, 2), p)


def test_backward_keeps_one_byte_an_element():
    from nanocnn.tensor import saved_bytes

    assert saved_bytes(F.dropout(Tensor(np.ones((8, 16), np.float32), requires_grad=True))) == 8 * 16
