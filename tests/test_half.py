"""Halves on a GPU: added up in float32, and more than they hold only if the result is; and bfloat16 in the emulator."""

from __future__ import annotations

import numpy as np
import pytest
from launch import NEEDS_BFLOAT16, NEEDS_GXX

from nanocnn.kernels.conv2d import conv2d, conv2d_grad_w
from nanocnn.kernels.cuda.conv2d import ADD_UP
from nanocnn.kernels.cuda.emulated import counting
from nanocnn.kernels.dispatch import to_device
from nanocnn.kernels.elementwise import bias_grad
from nanocnn.kernels.half import dtype_of
from nanocnn.kernels.matmul import matmul

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


@NEEDS_BFLOAT16
def test_every_bfloat16_and_what_lies_between_two_is_rounded_as_by_ml_dtypes():
    """Each of the 65,536, a little less than half way to the next, half way, a little more: NaN and infinities, too."""
    first = np.arange(1 << 16, dtype=np.uint32)[:, None] << 16
    numbers = (first + np.array([0, 0x7FFF, 0x8000, 0x8001], np.uint32)).view(np.float32)
    rounded = to_device(np.zeros(numbers.shape, dtype_of("bf16")), "emulated")
    ADD_UP((numbers.size // 256,), (256,), to_device(numbers, "emulated"), rounded, 1, numbers.size)
    with np.errstate(all="ignore"):
        want = numbers.astype(dtype_of("bf16")).astype(np.float32)
    np.testing.assert_array_equal(np.asarray(rounded).astype(np.float32), want)


@NEEDS_BFLOAT16
@pytest.mark.parametrize("variant", ["cuda_naive", "cuda_implicit", "cuda_tensor"])
def test_the_emulator_sees_loads_and_stores_of_bfloat16_where_it_sees_those_of_float16(variant):
    """bfloat16 is no type of g++'s: what is counted, and for which lines, must not depend on that."""
    found = []
    for dtype in (np.float16, dtype_of("bf16")):
        x, w, bias = (to_device(np.ones(n, dtype), "emulated") for n in ((1, 5, 5, 8), (3, 3, 8, 8), (8,)))
        with counting() as report:
            conv2d.variants[variant].body(x, w, (1, 1), (1, 1), (1, 1), 1, bias=bias, relu=True)
        found.append({key: (t.requests, t.bytes, t.units, t.ideal) for key, t in report.lines.items()})
    assert found[0] == found[1]
    assert any(memory == "global" and kind == "load" for _, _, memory, kind in found[0])


@NEEDS_BFLOAT16
def test_halves_of_two_kinds_are_not_mixed():
    a, b = (to_device(np.ones((8, 8), dtype), "emulated") for dtype in (np.float16, dtype_of("bf16")))
    assert not [v.name for v in matmul.candidates(a, b) if v.name in ("cuda_tensor", "cublas")]
