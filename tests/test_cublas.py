"""cuBLAS as we call it; here the library is emulated_cublas.cpp, which reads the same arguments."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from launch import NEEDS_GXX

from nanocnn.kernels.cuda import cublas
from nanocnn.kernels.dispatch import device_of, to_device, using
from nanocnn.kernels.matmul import matmul
from nanocnn.kernels.narrow import HALVES

pytestmark = NEEDS_GXX
SIZES = (1, 1, 1), (3, 5, 7), (1, 9, 4), (33, 64, 17), (8, 1, 5)  # M, K, N


def matrix(rng, batch, rows, columns, dtype, transposed):
    """On the device, in rows or as the transpose of a matrix in rows."""
    shape = (columns, rows) if transposed else (rows, columns)
    x = to_device(rng.standard_normal((*batch, *shape)).astype(dtype), "emulated")
    return x.swapaxes(-1, -2) if transposed else x


TOLERANCES = {"float32": 1e-5, "float64": 1e-13, "float16": 1e-3, "bfloat16": 8e-3}


@pytest.mark.parametrize("dtype", ["float32", "float64", *map(str, HALVES)])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_every_layout_of_every_shape(dtype, batch):
    rng = np.random.default_rng(0)
    for (m, k, n), ta, tb in itertools.product(SIZES, (False, True), (False, True)):
        a, b = matrix(rng, batch, m, k, dtype, ta), matrix(rng, batch, k, n, dtype, tb)
        with using(matmul="cublas"):
            c = matmul(a, b)
        want = np.matmul(np.asarray(a, np.float64), np.asarray(b, np.float64))
        assert c.dtype == dtype
        assert device_of(c) == "emulated"
        np.testing.assert_allclose(np.asarray(c, np.float64), want, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * k)


@pytest.mark.parametrize(("left", "right"), [((), (3,)), ((2, 3), ()), ((1,), (3,)), ((2, 1), (3,)), ((3,), (2, 3))])
@pytest.mark.parametrize("transposed", [False, True])
def test_one_matrix_and_many(left, right, transposed):
    rng = np.random.default_rng(0)
    a, b = matrix(rng, left, 3, 5, "float32", transposed), matrix(rng, right, 5, 7, "float32", not transposed)
    with using(matmul="cublas"):
        c = matmul(a, b)
    np.testing.assert_allclose(c, np.matmul(np.asarray(a), np.asarray(b)), rtol=1e-5, atol=1e-5)


def test_parts_of_matrices_and_memory_of_the_callers():
    rng = np.random.default_rng(0)
    whole = matrix(rng, (), 10, 12, "float32", False)
    part, out = whole[:, 2:7], to_device(np.full((10, 10), np.nan, np.float32), "emulated")
    with using(matmul="cublas"):
        assert matmul(part, part.T, out) is out
        columns = matmul(part, part.T, to_device(np.empty((10, 10), np.float32), "emulated").T)  # not in rows
    want = np.asarray(part) @ np.asarray(part).T
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(columns, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*HALVES], ids=str)
def test_sums_of_halves_are_made_in_fp32(dtype):
    """Added up in fp16, ones end at 2,048; in bf16 at 256."""
    ones = to_device(np.ones((1, 4096), dtype), "emulated")
    with using(matmul="cublas"):
        assert float(matmul(ones, ones.T)[0, 0]) == 4096


def test_tf32_keeps_ten_binary_places():
    """Of 1 + 2^-10 + 2^-12 the last is lost, which has no place there."""
    x = to_device(np.array([[1 + 2**-10 + 2**-12]], np.float32), "emulated")
    one = to_device(np.ones((1, 1), np.float32), "emulated")
    for choice, want in (("off", 1 + 2**-10 + 2**-12), ("on", 1 + 2**-10)):
        with using(matmul="cublas", tf32=choice):
            assert float(matmul(x, one)[0, 0]) == want


def test_the_epilogue():
    rng = np.random.default_rng(0)
    a, b = (matrix(rng, (), 6, 6, "float32", False) for _ in range(2))
    bias = to_device(rng.standard_normal(6).astype(np.float32), "emulated")
    with using(matmul="cublas"):
        y = matmul(a, b, bias=bias, relu=True)
    want = np.maximum(np.asarray(a) @ np.asarray(b) + np.asarray(bias), 0)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)


def test_a_refusal_is_an_error_with_its_reason():
    library, handle = cublas._library("emulated"), cublas._handle("emulated")
    x = np.zeros(4, np.float32).ctypes.data
    with pytest.raises(cublas.CublasError, match=r"an invalid value \(status 7\)"):
        cublas._done(
            library.cublasGemmStridedBatchedEx(
                handle, 0, 0, 2, 2, 2, x, x, 0, 1, 0, x, 0, 2, 0, x, x, 0, 2, 0, 1, 68, -1
            )  # matrices of two rows cannot be one number apart
        )
