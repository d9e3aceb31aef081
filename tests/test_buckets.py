"""Buckets: parameters and gradients are views of flat arrays, whoever holds them."""

from __future__ import annotations

import numpy as np
import pytest

from nanocnn.buckets import Bucket, make_buckets
from nanocnn.tensor import Tensor


def named(*shapes, dtype=np.float32):
    rng = np.random.default_rng(0)
    return [(f"p{i}", Tensor(rng.standard_normal(s).astype(dtype), requires_grad=True)) for i, s in enumerate(shapes)]


def test_data_become_views_with_the_same_values():
    params = named((2, 3), (4,), ())
    values = [p.data.copy() for _, p in params]
    bucket = Bucket(*zip(*params, strict=True))
    assert bucket.names == ["p0", "p1", "p2"]
    assert bucket.slices == [slice(0, 6), slice(6, 10), slice(10, 11)]
    assert bucket.size == 11
    for (_, p), value in zip(params, values, strict=True):
        np.testing.assert_array_equal(p.data, value)
        assert np.shares_memory(p.data, bucket.data)
    bucket.data[:] = 5
    assert all((p.data == 5).all() for _, p in params)


def test_gradients_arrive_in_the_bucket():
    (_, a), (_, b) = params = named((2, 2), (3,))
    bucket = Bucket(*zip(*params, strict=True))
    assert a.grad is None
    b.backward(np.arange(3, dtype=np.float32))
    b.backward(np.ones(3, np.float32))
    np.testing.assert_array_equal(bucket.grad, [0, 0, 0, 0, 1, 2, 3])
    bucket.grad[:4] = 9  # what an earlier step left there
    bucket.fill_missing()
    np.testing.assert_array_equal(bucket.grad, [0, 0, 0, 0, 1, 2, 3])
    np.testing.assert_array_equal(a.grad, np.zeros((2, 2)))
    bucket.zero()
    assert a.grad is None
    assert b.grad is None
    b.backward(np.ones(3, np.float32))
    np.testing.assert_array_equal(b.grad, np.ones(3))  # overwritten, not added to


def test_gradients_move_to_other_memory():
    (_, a), (_, b) = params = named((2,), (3,))
    a.backward(np.array([7, 8], np.float32))  # before there is a bucket
    bucket = Bucket(*zip(*params, strict=True))
    np.testing.assert_array_equal(a.grad, [7, 8])
    memory = np.full(5, -1, np.float32)
    bucket.hold_grad_in(memory)
    assert bucket.grad is memory
    np.testing.assert_array_equal(memory, [7, 8, -1, -1, -1])
    b.backward(np.ones(3, np.float32))
    np.testing.assert_array_equal(memory, [7, 8, 1, 1, 1])
    assert np.shares_memory(a.grad, memory)


def test_buckets_are_filled_from_the_last_parameter():
    params = named((10,), (20,), (300,), (5,), (6,))
    buckets = make_buckets(params, bucket_bytes=4 * 30)
    assert [b.names for b in buckets] == [["p4", "p3"], ["p2"], ["p1", "p0"]]  # p2 is larger than a bucket
    assert [b.size for b in buckets] == [11, 300, 30]


def test_a_parameter_of_odd_size_shifts_no_other():
    (bucket,) = make_buckets(named((24,), (3,), (8, 2), (10,)))
    assert bucket.names == ["p2", "p0", "p3", "p1"]
    assert [where.start for where in bucket.slices] == [0, 16, 40, 50]


def test_dtypes_never_share_a_bucket():
    params = named((3,), (3,)) + named((3,), dtype=np.float64)
    assert [b.data.dtype for b in make_buckets(params)] == [np.float64, np.float32]


def test_nothing_makes_no_bucket():
    assert make_buckets([]) == []


def test_a_generator_and_an_empty_parameter_will_do():
    (bucket,) = make_buckets(pair for pair in named((0, 4), (2,)))
    assert bucket.size == 2
    bucket.fill_missing()
    assert bucket.params[0].grad.shape == (0, 4)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_gradients_have_the_parameters_dtype(dtype):
    (bucket,) = make_buckets(named((2, 2), dtype=dtype))
    assert bucket.grad.dtype == dtype
