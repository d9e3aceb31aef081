"""CUDA C++ kernels: found in a .cu file of this folder, compiled once, launched on the GPU or in the emulator.

    tiled = Kernel("gemm.cu", "gemm_tiled", TILE=16)
    tiled((blocks, blocks), (16, 16), a, b, c, m, n, k)   # arrays of CuPy: on the GPU; `emulated`: on the CPU

A macro of the source is a parameter that the reader can see. One, REAL, is the type of a kernel's arrays: a kernel
whose parameters say `real*` is compiled for the dtype of the arrays that it is given.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from .. import emulated_array
from ..dispatch import DeviceError, device_of, xp_of
from ..memory import address
from . import device, emulated
from .source import ARRAYS, FOLDER, NUMBERS, REAL, SUM, Parameter, Signature, signatures

REALS = {np.dtype(np.float32): "float", np.dtype(np.float64): "double", np.dtype(np.float16): "half"}
PLAIN_SHARED = 48 << 10  # bytes that a block may have without asking for more
MOST_THREADS = 1024  # of a block, on every GPU


class Kernel:
    """One kernel of one file, with the macros that it is compiled with."""

    def __init__(self, file: str, name: str, **defines: Any):
        self.file, self.name, self.defines = file, name, defines
        self._compiled: dict[tuple, Any] = {}  # for the GPU, by their macros

    @cached_property
    def signature(self) -> Signature:
        found = signatures(self.file)
        if self.name not in found:
            raise ValueError(f"{self.file} has no kernel {self.name!r}; there are: {', '.join(found)}")
        return found[self.name]

    def __call__(self, grid: Sequence[int], block: Sequence[int], *args: Any, shared: int = 0) -> None:
        """Run it on `grid` blocks of `block` threads (x, y, z) with `shared` bytes of dynamic shared memory.

        Arrays, of one device, must be C-contiguous and of the type that the kernel's pointer has; None is a null
        pointer. Raises TypeError or ValueError on anything else, and on sizes that no GPU can do.
        """
        parameters = self.signature.parameters
        if len(args) != len(parameters):
            names = ", ".join(p.name for p in parameters)
            raise TypeError(f"{self.name} takes {len(parameters)} arguments ({names}), got {len(args)}")
        pairs = zip(parameters, args, strict=True)
        given = [(p.kind, a.dtype) for p, a in pairs if p.kind in (REAL, SUM) and a is not None]
        dtypes = dict(reversed(given))  # of the first of each kind; sums alone are of the type that they come in
        real = dtypes.get(REAL, dtypes.get(SUM))
        if real is not None and real not in REALS:
            raise TypeError(f"{self.name} takes arrays of {', '.join(map(str, REALS))}; got {real}")
        checked = [_argument(self.name, p, a, real) for p, a in zip(parameters, args, strict=True)]
        defines = tuple(sorted({**self.defines, **({"REAL": REALS[real]} if real else {})}.items()))
        grid, block = _three(grid), _three(block)
        if min(*grid, *block) < 1 or np.prod(block) > MOST_THREADS:
            raise ValueError(
                f"{self.name}: {grid} blocks of {block} threads; expected 1 or more, {MOST_THREADS} threads at most"
            )
        devices = {device_of(a) for a, p in zip(args, parameters, strict=True) if p.pointer and a is not None}
        if len(devices) != 1 or devices == {"cpu"}:
            raise DeviceError(f"{self.name} needs arrays of one device, 'cuda' or 'emulated'; got {sorted(devices)}")
        if devices == {"emulated"}:
            emulated_array.change(
                lambda: emulated.launch(self.file, defines, self.signature, grid, block, shared, checked)
            )
        else:
            self._for_the_gpu(defines, shared)(grid, block, tuple(checked), shared_mem=shared)

    def _for_the_gpu(self, defines: tuple, shared: int) -> Any:
        import cupy

        if defines not in self._compiled:
            options = ("-std=c++17", f"-I{FOLDER}", *(f"-D{name}={value}" for name, value in defines))
            module = cupy.RawModule(code=(FOLDER / self.file).read_text(), options=options)
            try:
                self._compiled[defines] = module.get_function(self.name)
            except cupy.cuda.compiler.CompileException as error:
                device.check_headers(str(error))
                raise
        kernel = self._compiled[defines]
        if shared > PLAIN_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared
        return kernel


def reals(*args: Any, **kwargs: Any) -> bool:
    """What a variant supports whose kernels take `real*`: float arrays, not empty, all of one such dtype."""
    arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype") and a.dtype.kind == "f" and a.ndim]
    return bool(arrays) and all(a.dtype == arrays[0].dtype and a.size for a in arrays) and arrays[0].dtype in REALS


def _three(size: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*map(int, size), 1, 1)[:3]
    return x, y, z


def one_each(count: int, threads: int = 256) -> tuple[tuple[int], tuple[int]]:
    """Grid and block for `count` threads, one for each number; the last block may have some too many."""
    return (max(1, -(-count // threads)),), (threads,)


def empty(like: Any, shape: Any, dtype: Any = None) -> Any:
    """An uninitialised array on the device of another one; of its dtype, unless one is given."""
    return xp_of(like).empty(shape, like.dtype if dtype is None else dtype)


def contiguous(x: Any) -> Any:
    """`x` itself if it is C-contiguous, else a copy that is."""
    return x if x.flags.c_contiguous else x.copy(order="C")


def is_aligned(x: Any) -> bool:
    """Whether it is C-contiguous and begins at a multiple of 16 bytes, as loads and stores of 16 bytes need it."""
    begins = x.data.ptr if device_of(x) == "cuda" else address(x)
    return begins % 16 == 0 and x.flags.c_contiguous


def aligned(x: Any) -> Any:
    """`x` itself if it is aligned so, else a copy that is."""
    return x if is_aligned(x) else x.copy(order="C")


def _argument(kernel: str, p: Parameter, a: Any, real: Any) -> Any:
    """An array as it is, None, or a number of the size that C++ wants. `real` is the dtype of arrays of that type."""
    if not p.pointer:
        if isinstance(a, np.ndarray) and a.ndim:
            raise TypeError(f"{kernel}: {p.name} is a number ({p.kind}), got an array of {a.shape}")
        try:
            number = NUMBERS[p.kind](a)
        except OverflowError:
            number = None
        if number is None or (p.kind not in ("float", "double") and number != a):
            raise ValueError(f"{kernel}: {p.name} = {a} is no {p.kind}")
        return number
    if a is None:
        return None
    expected = np.dtype(real if p.kind == REAL else _sum_of(real) if p.kind == SUM else ARRAYS[p.kind])
    if getattr(a, "dtype", None) != expected or not a.flags.c_contiguous:
        order = "" if not hasattr(a, "flags") or a.flags.c_contiguous else ", not C-contiguous"
        raise TypeError(f"{kernel}: {p.name} points to {expected}; got {getattr(a, 'dtype', type(a).__name__)}{order}")
    return a


def _sum_of(real: Any) -> Any:
    """The dtype of `sum` where that of `real` is this one: as in real.cuh."""
    return np.float64 if real == np.float64 else np.float32
