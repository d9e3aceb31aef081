"""The last rung of the matrix product on a GPU: NVIDIA's library, called by ourselves.

CuPy calls it, too, but not while a stream is recorded (kernels/cuda/graph.py), as its handle may take memory then. Ours
has a workspace of its own. One call does any product of matrices that lie in rows or in columns, one or a batch of
them: cuBLAS thinks in columns, and a matrix in rows is its transpose in columns, so C = A B is asked for as C' = B' A'.
Of one matrix and many, the one is as far from the next as 0 numbers.

On the device `emulated` the same calls go to emulated_cublas.cpp. On a GPU this was not yet run.
"""

from __future__ import annotations

import ctypes
import math
import threading
from ctypes import c_int, c_longlong, c_size_t, c_void_p
from functools import cache
from typing import Any

import numpy as np

from .. import emulated_array
from ..dispatch import DeviceError, Switch, device_of, xp_of
from ..epilogue import finish
from ..memory import address
from ..narrow import HALVES
from . import emulated
from .gemm import matmul  # with its rungs: this is the last one
from .launch import empty

tf32 = Switch(
    "tf32",
    "how cuBLAS multiplies numbers in fp32",
    off="as they are",
    on="their first 10 binary places, on tensor cores (Ampere and later); sums in fp32",
)

WORKSPACE = 32 << 20  # bytes: what NVIDIA recommends for Hopper
TYPES = {np.dtype(np.float32): 0, np.dtype(np.float64): 1}  # cudaDataType
TYPES |= {dtype: half.cublas for dtype, half in HALVES.items()}
COMPUTE_32F, COMPUTE_64F, COMPUTE_TF32 = 68, 70, 77  # cublasComputeType_t
BEST = -1  # cublasGemmAlgo_t: the library's own choice
STATUS = {1: "not initialised", 3: "no memory", 7: "an invalid value", 8: "an architecture mismatch", 13: "a failure",
          14: "an internal error", 15: "not supported"}  # fmt: skip
GEMM: Any = [c_void_p, *[c_int] * 5, c_void_p, *[c_void_p, c_int, c_int, c_longlong] * 2, c_void_p,
        *[c_void_p, c_int, c_int, c_longlong], c_int, c_int, c_int]  # fmt: skip


class CublasError(RuntimeError):
    """cuBLAS refused; the message has its reason."""


@cache
def _library(device: str) -> ctypes.CDLL:
    found = emulated.host_library("emulated_cublas.cpp") if device == "emulated" else _nvidias()
    found.cublasGemmStridedBatchedEx.argtypes = GEMM
    found.cublasCreate_v2.argtypes = [c_void_p]
    found.cublasSetStream_v2.argtypes = [c_void_p, c_void_p]
    found.cublasSetWorkspace_v2.argtypes = [c_void_p, c_void_p, c_size_t]
    return found


def _nvidias() -> ctypes.CDLL:
    """The library that fits CuPy: of CUDA's folder or of NVIDIA's wheels."""
    import cupy

    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    try:
        from cuda.pathfinder import load_nvidia_dynamic_lib  # comes with CuPy 14

        return ctypes.CDLL(load_nvidia_dynamic_lib("cublas").abs_path)
    except Exception:  # not there, or it found nothing
        try:
            return ctypes.CDLL(f"libcublas.so.{major}")
        except OSError as error:
            raise DeviceError(
                f"cuBLAS of CUDA {major} was not found ({error}): pip install nvidia-cublas, or name CUDA's folder in "
                "LD_LIBRARY_PATH"
            ) from error


_local = threading.local()  # a handle is one thread's


def _handle(device: str) -> c_void_p:
    """This thread's handle, working on the stream that is current."""
    handles = _local.__dict__.setdefault("handles", {})
    number = 0
    if device == "cuda":
        import cupy

        number, stream = cupy.cuda.Device().id, cupy.cuda.get_current_stream().ptr
    if (device, number) not in handles:
        handle = c_void_p()
        _done(_library(device).cublasCreate_v2(ctypes.byref(handle)))
        handles[device, number] = [handle, None, None]
    entry = handles[device, number]
    if device == "cuda" and entry[1] != stream:
        if entry[2] is None:
            entry[2] = cupy.cuda.alloc(WORKSPACE)
        _done(_library(device).cublasSetStream_v2(entry[0], stream))  # which forgets the workspace
        _done(_library(device).cublasSetWorkspace_v2(entry[0], entry[2].ptr, WORKSPACE))
        entry[1] = stream
    return entry[0]


def _done(status: int) -> None:
    if status:
        raise CublasError(f"cuBLAS: {STATUS.get(status, 'an error')} (status {status})")


def _layout(x: Any) -> tuple[Any, bool, int]:
    """A matrix, or a batch: whether it lies in columns, and how far its rows (or columns) are apart; a copy if need be.

    Both within each matrix; matrices of a batch lie one after the other.
    """
    rows, columns = x.shape[-2:]
    step = x.itemsize
    if x.ndim == 2:
        if x.strides[1] == step and x.strides[0] >= columns * step and x.strides[0] % step == 0:
            return x, False, x.strides[0] // step
        if x.strides[0] == step and x.strides[1] >= rows * step and x.strides[1] % step == 0:
            return x, True, x.strides[1] // step
    elif x.flags.c_contiguous:
        return x, False, columns
    elif x.swapaxes(-1, -2).flags.c_contiguous:
        return x, True, rows
    return x.copy(order="C"), False, columns


def _products(a: Any, b: Any, out: Any = None, *, bias: Any = None, relu: bool = False) -> bool:
    """Matrices or batches of them, of one dtype, not empty."""
    fit = min(a.ndim, b.ndim) >= 2 and a.shape[-1] == b.shape[-2] and _batch(a, b) is not None
    return fit and a.dtype == b.dtype and a.dtype in TYPES and bool(a.size and b.size)


def _batch(a: Any, b: Any) -> tuple[int, ...] | None:
    """The leading axes of the product; None if they do not fit."""
    if a.shape[:-2] == b.shape[:-2]:
        return a.shape[:-2]
    try:
        return np.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except ValueError:
        return None


def _matrices(x: Any, batch: tuple[int, ...]) -> tuple[Any, int]:
    """A matrix for each of the batch, or one for all; and how many numbers one is from the next."""
    rows, columns = x.shape[-2:]
    if x.size == rows * columns:
        return x[(0,) * (x.ndim - 2)], 0
    if x.shape[:-2] != batch:  # some for several: a copy for each
        x = xp_of(x).broadcast_to(x, (*batch, rows, columns))
    return x, rows * columns


@matmul.variant("cublas", device="cuda", supports=_products)
def matmul_cublas(a, b, out=None, **epilogue):
    """cuBLAS, by a handle of our own, which can be recorded in a graph; sums of halves in fp32"""
    shape = (*(_batch(a, b) or ()), a.shape[-2], b.shape[-1])
    c = out if out is not None and out.flags.c_contiguous and out.dtype == a.dtype else empty(a, shape)
    multiply(a, b, c)
    if out is not None and c is not out:
        out[...] = c
        c = out
    return finish(c, **epilogue)


def multiply(a: Any, b: Any, c: Any) -> None:
    """c = a b, for arrays (..., M, K), (..., K, N) and (..., M, N), the last C-contiguous. Raises CublasError."""
    (m, k), n, batch = a.shape[-2:], b.shape[-1], c.shape[:-2]
    (a, a_next), (b, b_next), count = _matrices(a, batch), _matrices(b, batch), math.prod(batch)
    (a, a_columns, lda), (b, b_columns, ldb) = _layout(a), _layout(b)
    device, kind = device_of(c), TYPES[c.dtype]
    number = ctypes.c_double if c.dtype == np.float64 else ctypes.c_float
    one, zero = number(1), number(0)
    compute = COMPUTE_64F if c.dtype == np.float64 else COMPUTE_32F
    if c.dtype == np.float32 and tf32.value == "on":
        compute = COMPUTE_TF32
    library, handle = _library(device), _handle(device)

    def call() -> None:
        _done(
            library.cublasGemmStridedBatchedEx(
                handle, b_columns, a_columns, n, m, k, ctypes.addressof(one),
                _begin(b), kind, ldb, b_next, _begin(a), kind, lda, a_next, ctypes.addressof(zero),
                _begin(c), kind, n, m * n, count, compute, BEST,
            )
        )  # fmt: skip

    if device == "emulated":
        emulated_array.change(call)
    else:
        call()


def _begin(x: Any) -> int:
    return x.data.ptr if device_of(x) == "cuda" else address(x)
