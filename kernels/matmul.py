"""The matrix product: BLAS on the CPU, cuBLAS on the GPU, and a rung of our own to learn from."""

from __future__ import annotations

import numpy as np
from numba import njit, prange

from .dispatch import Primitive, aside, plain_floats, xp_of
from .epilogue import finish
from .gemm import gemm
from .half import SINGLE, cast, is_half
from .memory import clear, contiguous, empty
from .tile import ROWS


@Primitive
def matmul(a, b, out=None, *, bias=None, relu=False):
    """(..., M, K) @ (..., K, N) -> (..., M, N), by the BLAS of NumPy or CuPy, which also takes transposed views.

    Then, where given, plus `bias` (N,) and max(y, 0): the epilogue.
    """
    return finish(_product(a, b, out), bias, relu=relu)


def _product(a, b, out):
    """Halves are added up in float32, as cuBLAS does it. (So does NumPy, but one by one: its BLAS has no halves.)"""
    if not (is_half(a) and isinstance(a, np.ndarray)):
        return xp_of(a).matmul(a, b, out=out)
    c = cast(xp_of(a).matmul(cast(a, SINGLE), cast(b, SINGLE)), a.dtype)
    if out is None:
        return c
    out[...] = c
    return out


def _two_matrices(a, b, out=None, *, bias=None, relu=False):
    return plain_floats(a, b, bias) and a.ndim == b.ndim == 2


@matmul.variant("tiled", supports=_two_matrices, auto=False)
def matmul_tiled(a, b, out=None, **epilogue):
    """our own loops, tiled so that a block of B stays in cache, parallel over rows of C"""
    if out is None:
        out = np.empty((a.shape[0], b.shape[1]), a.dtype)
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul of {a.shape} and {b.shape}: the inner sizes differ")
    c = out if out.flags.c_contiguous else np.empty(out.shape, out.dtype)
    _tiled(contiguous(a), contiguous(b), c)
    if c is not out:
        aside(np.copyto, out, c)
    return finish(out, **epilogue)


BLOCK, INNER = 8, 128  # 128 rows of B at 256 columns are 128 KB: they stay in L2 while 8 rows of C pass


@njit(parallel=True, cache=True, fastmath=True)
def _tiled(a, b, c):
    m, n = c.shape
    for block in prange((m + BLOCK - 1) // BLOCK):
        first, last = block * BLOCK, min(m, (block + 1) * BLOCK)
        c[first:last] = 0
        for k0 in range(0, a.shape[1], INNER):
            for i in range(first, last):
                row = c[i]
                for k in range(k0, min(a.shape[1], k0 + INNER)):
                    scale = a[i, k]
                    for j in range(n):
                        row[j] += scale * b[k, j]


def _enough_rows(a, b, out=None, **epilogue):
    """The fixed rule of "fastest": few rows use each number of B so seldom that copying it does not pay."""
    return a.shape[0] > 2 * ROWS and b.shape[1] > 1 and a.shape[1] > 1


@matmul.variant("packed", supports=_two_matrices, auto=_enough_rows)
def matmul_packed(a, b, out=None, **epilogue):
    """our own register tile on panels in cache; BLAS's scheme, with vectors as wide as the machine's"""
    if a.shape[1] != b.shape[0]:
        raise ValueError(f"matmul of {a.shape} and {b.shape}: the inner sizes differ")
    if out is None:
        out = empty((a.shape[0], b.shape[1]), a.dtype)
    if not out.size or not a.size:
        clear(out)
        return finish(out, **epilogue)
    c = out if out.flags.c_contiguous and out.flags.aligned else empty(out.shape, out.dtype)
    gemm(a, b, c, **epilogue)
    if c is not out:
        aside(np.copyto, out, c)
    return out


@matmul.work
def _(a, b, out=None, **epilogue):
    m, k, n = a.shape[-2], a.shape[-1], b.shape[-1]
    batch = max(a.size // max(m * k, 1), b.size // max(k * n, 1))
    return 2.0 * batch * m * n * k, a.nbytes + b.nbytes + batch * m * n * a.itemsize
