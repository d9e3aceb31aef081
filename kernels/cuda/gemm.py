"""The ladder of the matrix product on a GPU, from a thread for each number to tensor cores.

The last rung is cuBLAS: the reference, which computes by CuPy there, and which "fastest" takes. The others are to learn
from; `python -m nanocnn bench matmul --device emulated` counts what each asks of memory.
"""

from __future__ import annotations

import numpy as np

from ..epilogue import finish
from ..matmul import matmul
from ..narrow import HALVES
from .device import copies_asynchronously, has_warpgroups
from .launch import MOST_Y, Kernel, aligned, empty, is_aligned
from .source import macros
from .tunable import Tunable


def _matrices(*dtypes, multiple=1, tall=4):
    """Two matrices of one of these dtypes, whose rows have a multiple of so many numbers: those of one load.

    `tall`: how many rows (the first rung: columns) of C a block along y computes at the least, however it is tuned.
    """

    def supports(a, b, out=None, *, bias=None, relu=False):
        fits = a.ndim == b.ndim == 2 and a.dtype == b.dtype and a.dtype in dtypes and a.shape[1] == b.shape[0]
        fits = fits and max(a.shape[0], b.shape[1]) <= MOST_Y * tall
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


NAIVE_BLOCK = Tunable(
    "256 threads in a square: as many rows of A as columns of B",
    dict(m=16, n=16),
    dict(m=32, n=8),
    dict(m=8, n=32),
)
COALESCED_BLOCK = Tunable(
    "256 threads, a whole warp along a row of B: its loads are whole sectors",
    dict(n=32, m=8),
    dict(n=32, m=4),
    dict(n=32, m=32),
    dict(n=16, m=16),
)
TILES = Tunable(
    "the most threads that a block may have, 32 x 32: a number serves as many sums as can be",
    macros("gemm.cu", "TILE"),
    dict(TILE=16),
    dict(TILE=8),
)
REGISTER_TILES = Tunable(
    "256 threads with 16 sums each; fewer sums a thread ask more of shared memory, more leave room for fewer warps",
    macros("gemm.cu", "BLOCK_M", "BLOCK_N", "BLOCK_K", "THREAD_M", "THREAD_N"),
    dict(BLOCK_K=8),
    dict(BLOCK_M=32, BLOCK_N=32, THREAD_M=2, THREAD_N=2),
    dict(BLOCK_M=128, BLOCK_N=128, BLOCK_K=8, THREAD_M=8, THREAD_N=8),
)
TENSOR_TILES = Tunable(
    "three pairs of tiles, one in use and two on their way; registers leave room for two blocks, which fit in 164 KB",
    macros("gemm_tensor.cu", "STAGES", "BLOCK_K"),
    dict(STAGES=2),
    dict(STAGES=4),
    dict(STAGES=5),
    dict(BLOCK_K=16),
    dict(BLOCK_K=64),
)
WARPGROUP_TILES = Tunable(
    "128 x 256 sums are all that the registers of 256 threads hold; four pairs of tiles are 192 KB of a block's 227",
    macros("gemm_wgmma.cu", "STAGES", "BLOCK_N"),
    dict(STAGES=3),
    dict(BLOCK_N=128),
    dict(BLOCK_N=128, STAGES=3),
    dict(BLOCK_N=128, STAGES=6),
)

NAIVE, COALESCED = Kernel("gemm.cu", "gemm_naive"), Kernel("gemm.cu", "gemm_coalesced")
TILED, REGISTERS = Kernel("gemm.cu", "gemm_tiled", TILES), Kernel("gemm.cu", "gemm_registers", REGISTER_TILES)
VECTORISED = Kernel("gemm.cu", "gemm_vectorised")  # not tunable: each of its 256 threads brings four numbers of a tile
TENSOR = Kernel("gemm_tensor.cu", "gemm_tensor", TENSOR_TILES)
WARPGROUPS = Kernel("gemm_wgmma.cu", "gemm_wgmma", WARPGROUP_TILES)


@matmul.variant("cuda_naive", device="cuda", supports=_matrices(np.float32), auto=False)
def matmul_cuda_naive(a, b, out=None, **epilogue):
    """a thread for each number of C; what neighbours read of A lies far apart"""
    block = NAIVE_BLOCK.numbers()
    return _product(NAIVE, [("m", block["m"]), ("n", block["n"])], (block["m"], block["n"]), a, b, out, epilogue)


@matmul.variant("cuda_coalesced", device="cuda", supports=_matrices(np.float32), auto=False)
def matmul_cuda_coalesced(a, b, out=None, **epilogue):
    """neighbouring threads read neighbouring numbers: a quarter of the sectors"""
    block = COALESCED_BLOCK.numbers()
    return _product(COALESCED, [("n", block["n"]), ("m", block["m"])], (block["n"], block["m"]), a, b, out, epilogue)


@matmul.variant("cuda_tiled", device="cuda", supports=_matrices(np.float32, tall=8), auto=False)
def matmul_cuda_tiled(a, b, out=None, **epilogue):
    """tiles of 32 x 32 in shared memory: each number from global memory serves 32 sums"""
    tile = TILED["TILE"]
    return _product(TILED, [("n", tile), ("m", tile)], (tile, tile), a, b, out, epilogue)


@matmul.variant("cuda_registers", device="cuda", supports=_matrices(np.float32, tall=32), auto=False)
def matmul_cuda_registers(a, b, out=None, **epilogue):
    """4 x 4 sums in a thread's registers: 8 numbers from shared memory serve 16 multiplications, in place of 1"""
    tile = [("n", REGISTERS["BLOCK_N"]), ("m", REGISTERS["BLOCK_M"])]
    return _product(REGISTERS, tile, (REGISTERS["THREADS"],), a, b, out, epilogue)


@matmul.variant("cuda_vectorised", device="cuda", supports=_matrices(np.float32, multiple=4, tall=128), auto=False)
def matmul_cuda_vectorised(a, b, out=None, **epilogue):
    """8 x 8 sums, four numbers a load, and the next tiles on their way while these are used"""
    wide = VECTORISED["WIDE"]
    return _product(VECTORISED, [("n", wide), ("m", wide)], (256,), a, b, out, epilogue)


_eights = _matrices(*HALVES, multiple=8, tall=128)


def _on_tensor_cores(a, b, out=None, **epilogue):
    return _eights(a, b, out, **epilogue) and copies_asynchronously(a)


@matmul.variant("cuda_tensor", device="cuda", supports=_on_tensor_cores, auto=False)
def matmul_cuda_tensor(a, b, out=None, **epilogue):
    """tensor cores (Ampere or later), halves with sums in fp32; asynchronous copies three tiles ahead"""
    m, n, k, stages = (TENSOR[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "STAGES"))
    shared = stages * (m * TENSOR["PITCH_A"] + k * TENSOR["PITCH_B"]) * a.itemsize
    return _product(TENSOR, [("n", n), ("m", m)], (256,), a, b, out, epilogue, shared=shared)


def _by_warpgroups(a, b, out=None, **epilogue):
    return _eights(a, b, out, **epilogue) and has_warpgroups(a)


@matmul.variant("cuda_wgmma", device="cuda", supports=_by_warpgroups, auto=False)
def matmul_cuda_wgmma(a, b, out=None, **epilogue):
    """tensor cores by warpgroups (Hopper alone), which read shared memory themselves while copies go on"""
    m, n, stages = (WARPGROUPS[name] for name in ("BLOCK_M", "BLOCK_N", "STAGES"))
    shared = stages * (WARPGROUPS["TILE_A"] + WARPGROUPS["TILE_B"]) * a.itemsize + WARPGROUPS["ALIGNED"]
    return _product(WARPGROUPS, [("n", n), ("m", m)], (WARPGROUPS["THREADS"],), a, b, out, epilogue, shared=shared)
