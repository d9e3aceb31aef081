"""Sums in float16 on a GPU: added up in float32, and more than half precision holds only if the result is."""

from __future__ import annotations

import numpy as np
import pytest
from launch import NEEDS_GXX

from nanocnn.kernels.conv2d import conv2d_grad_w
from nanocnn.kernels.dispatch import to_device
from nanocnn.kernels.elementwise import bias_grad

pytestmark = NEEDS_GXX


@pytest.mark.parametrize("variant", ["cuda_naive", "cuda"])
def test_a_gradient_of_biases_is_infinite_where_the_reference_is(variant):
    gy = np.full((5000, 3), 10, np.float16) * np.array([1, 2, -2], np.float16)
    with np.errstate(over="ignore"):
        want = bias_grad.__wrapped__(gy)
    np.testing.assert_array_equal(want, np.array([50_000, np.inf, -np.inf], np.float16))
    got = bias_grad.variants[variant].body(to_device(gy, "emulated"))
    assert got.dtype == np.float16
    np.testing.assert_array_equal(got, want)


def test_parts_of_a_gradient_of_weights_do_not_overflow():
    """Four parts of 256 positions each: two come to 76,800, two to minus that, and 1 is left."""
    gy, x = np.ones((2, 16, 32, 5), np.float16), np.full((2, 16, 32, 3), 300, np.float16)
    x[1] = -300
    x[1, -1, -1] = -299
    conv2d_grad_w.ran.clear()
    gw = conv2d_grad_w(to_device(gy, "emulated"), to_device(x, "emulated"), (1, 1, 3, 5), (1, 1), (0, 0), (1, 1), 1)
    assert conv2d_grad_w.ran == {"cuda_implicit"}
    assert gw.dtype == np.float16
    np.testing.assert_array_equal(gw, np.ones((1, 1, 3, 5)))
