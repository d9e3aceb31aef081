"""The ladder of the matrix product on a GPU, from a thread for each number to tensor cores.

The last rung is cuBLAS: the reference, which computes by CuPy there, and which "fastest" takes. The others are to learn
from; `python -m nanocnn bench matmul --device emulated` counts what each asks of memory.
"""

from __future__ import annotations

import numpy as np

from ..epilogue import finish
from ..matmul import matmul
from .device import copies_asynchronously
from .launch import Kernel, aligned, empty, is_aligned


def _matrices(dtype, multiple=1):
    """Two matrices of a dtype, whose rows have a multiple of so many numbers: those of one load."""

    def supports(a, b, out=None, *, bias=None, relu=False):
        fits = a.ndim == b.ndim == 2 and a.dtype == b.dtype == dtype and a.shape[1] == b.shape[0]
        return fits and bool(a.size and b.size) and a.shape[1] % multiple == b.shape[1] % multiple == 0

    return supports


def _product(kernel, grid, block, a, b, out, epilogue, shared=0):
    """C = A B by a kernel; `grid` holds the rows and columns that a block computes, in the order of its x and y."""
    (m, k), n = a.shape, b.shape[1]
    a, b = aligned(a), aligned(b)
    c = out if out is not None and is_aligned(out) else empty(a, (m, n))
    kernel([-(-(m if axis == "m" else n) // size) for axis, size in grid], block, a, b, c, m, n, k, shared=shared)
    if out is not None and c is not out:
        out[...] = c
        c = out
    return finish(c, **epilogue)


NAIVE, COALESCED, TILED, REGISTERS, VECTORISED = (
    Kernel("gemm.cu", f"gemm_{name}") for name in ("naive", "coalesced", "tiled", "registers", "vectorised")
)
TENSOR = Kernel("gemm_tensor.cu", "gemm_tensor")


@matmul.variant("cuda_naive", device="cuda", supports=_matrices(np.float32), auto=False)
def matmul_cuda_naive(a, b, out=None, **epilogue):
    """a thread for each number of C; what neighbours read of A lies far apart"""
    return _product(NAIVE, [("m", 16), ("n", 16)], (16, 16), a, b, out, epilogue)


@matmul.variant("cuda_coalesced", device="cuda", supports=_matrices(np.float32), auto=False)
def matmul_cuda_coalesced(a, b, out=None, **epilogue):
    """neighbouring threads read neighbouring numbers: a quarter of the sectors"""
    return _product(COALESCED, [("n", 32), ("m", 8)], (32, 8), a, b, out, epilogue)


@matmul.variant("cuda_tiled", device="cuda", supports=_matrices(np.float32), auto=False)
def matmul_cuda_tiled(a, b, out=None, **epilogue):
    """tiles of 32 x 32 in shared memory: each number from global memory serves 32 sums"""
    return _product(TILED, [("n", 32), ("m", 32)], (32, 32), a, b, out, epilogue)


@matmul.variant("cuda_registers", device="cuda", supports=_matrices(np.float32), auto=False)
def matmul_cuda_registers(a, b, out=None, **epilogue):
    """4 x 4 sums in a thread's registers: 8 numbers from shared memory serve 16 multiplications, in place of 1"""
    return _product(REGISTERS, [("n", 64), ("m", 64)], (256,), a, b, out, epilogue)


@matmul.variant("cuda_vectorised", device="cuda", supports=_matrices(np.float32, multiple=4), auto=False)
def matmul_cuda_vectorised(a, b, out=None, **epilogue):
    """8 x 8 sums, four numbers a load, and the next tiles on their way while these are used"""
    return _product(VECTORISED, [("n", 128), ("m", 128)], (256,), a, b, out, epilogue)


STAGES = 3  # pairs of tiles in shared memory, as in gemm_tensor.cu, with rows 8 numbers longer than a tile's
TENSOR_SHARED = STAGES * (128 * (32 + 8) + 32 * (128 + 8)) * 2  # bytes


_eights = _matrices(np.float16, multiple=8)


def _on_tensor_cores(a, b, out=None, **epilogue):
    return _eights(a, b, out, **epilogue) and copies_asynchronously(a)


@matmul.variant("cuda_tensor", device="cuda", supports=_on_tensor_cores, auto=False)
def matmul_cuda_tensor(a, b, out=None, **epilogue):
    """tensor cores (Ampere or later), fp16 with sums in fp32; asynchronous copies three tiles ahead"""
    return _product(TENSOR, [("n", 128), ("m", 128)], (256,), a, b, out, epilogue, shared=TENSOR_SHARED)
