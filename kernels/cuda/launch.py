"""CUDA C++ kernels: found in a .cu file of this folder, compiled once, launched on the GPU or in the emulator.

    tiled = Kernel("gemm.cu", "gemm_tiled", TILE=16)
    tiled((blocks, blocks), (16, 16), a, b, c, m, n, k)   # arrays of CuPy: on the GPU; `emulated`: on the CPU

A macro of the source is a parameter that the reader can see; tunable.py changes some. One, REAL, is the type of a
kernel's arrays: a kernel whose parameters say `real*` is compiled for the dtype of the arrays that it is given. NARROW
is the same for `narrow*`, where there are arrays of 16 bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .. import emulated_array
from ..dispatch import DeviceError, device_of, xp_of
from ..memory import address
from ..narrow import HALVES, is_float, sum_dtype
from . import device, emulated
from .resources import cubin_of
from .source import (
    ARRAYS,
    FOLDER,
    NARROW,
    NUMBERS,
    REAL,
    SUM,
    Parameter,
    Signature,
    each_array,
    macros,
    path_of,
    signatures,
    target,
    with_includes,
)
from .tunable import Tunable

REALS = {np.dtype(np.float32): "float", np.dtype(np.float64): "double"}
REALS |= {dtype: half.cuda for dtype, half in HALVES.items()}
PLAIN_SHARED = 48 << 10  # bytes that a block may have without asking for more
MOST_THREADS = 1024  # of a block, on every GPU
MOST_Y = 65535  # blocks along y (or z) of a grid, on every GPU
NULL = np.uint64(0)  # a null pointer as CuPy takes it: of None some versions make another (cupy issue 9046)


class Kernel:
    """One kernel of one file, with the macros that it is compiled with.

    A file of this folder goes by its name, one of your own by its whole path: Kernel("/home/me/mine.cu", "mine"). When
    it was edited, make a new Kernel of it.
    """

    def __init__(self, file: str | Path, name: str, tunable: Tunable | None = None, **defines: Any):
        self.file, self.name, self.tunable, self.defines = str(file), name, tunable, defines
        self._compiled: dict[tuple, Any] = {}  # for the GPU, by their macros

    @cached_property
    def signature(self) -> Signature:
        found = signatures(self.file)
        if self.name not in found:
            raise ValueError(f"{self.file} has no kernel {self.name!r}; there are: {', '.join(found)}")
        return found[self.name]

    def __getitem__(self, macro: str) -> int:
        """A number of the source, as the kernel is compiled now: TILED["TILE"] is 32."""
        return macros(self.file, **self._defines())[macro]

    def _defines(self) -> dict[str, Any]:
        """The macros that are not as in the source."""
        numbers = self.tunable.numbers() if self.tunable else {}
        if not self.tunable or numbers == self.tunable.default:
            return self.defines
        known = macros(self.file)
        return {**self.defines, **{name: number for name, number in numbers.items() if name in known}}

    def __call__(self, grid: Sequence[int], block: Sequence[int], *args: Any, shared: int = 0) -> None:
        """Run it on `grid` blocks of `block` threads (x, y, z) with `shared` bytes of dynamic shared memory.

        Arrays, of one device, must be C-contiguous and of the type that the kernel's pointer has; None is a null
        pointer. Where the kernel has pointers to several arrays (`real* const*`), it takes a list of such. Raises
        TypeError or ValueError on anything else, and on sizes that no GPU can do.
        """
        parameters = self.signature.parameters
        if len(args) != len(parameters):
            names = ", ".join(p.name for p in parameters)
            raise TypeError(f"{self.name} takes {len(parameters)} arguments ({names}), got {len(args)}")
        pairs = zip(parameters, args, strict=True)
        given = [(p.kind, a.dtype) for p, a in each_array(pairs) if p.kind in (REAL, SUM, NARROW)]
        dtypes = dict(reversed(given))  # of the first of each kind; sums alone are of the type that they come in
        real = dtypes.get(REAL, dtypes.get(SUM))
        if real is not None and real not in REALS:
            raise TypeError(f"{self.name} takes arrays of {', '.join(map(str, REALS))}; got {real}")
        narrow = dtypes.get(NARROW)
        if narrow is not None and narrow not in HALVES:
            raise TypeError(f"{self.name} takes arrays of {', '.join(map(str, HALVES))}; got {narrow}")
        kinds = {REAL: real, SUM: np.dtype(np.float32) if real is None else sum_dtype(real), NARROW: narrow}
        checked = [_argument(self.name, p, a, kinds) for p, a in zip(parameters, args, strict=True)]
        named = {macro: REALS[dtype] for macro, dtype in (("REAL", real), ("NARROW", narrow)) if dtype is not None}
        defines = tuple(sorted({**self._defines(), **named}.items()))
        grid, block = _three(grid), _three(block)
        if min(*grid, *block) < 1 or np.prod(block) > MOST_THREADS or max(grid[1:]) > MOST_Y:
            raise ValueError(
                f"{self.name}: {grid} blocks of {block} threads; expected 1 or more, {MOST_THREADS} threads at "
                f"most, and {MOST_Y} blocks along y and z"
            )
        devices = {device_of(a) for _, a in each_array(zip(parameters, args, strict=True))}
        if len(devices) != 1 or devices == {"cpu"}:
            raise DeviceError(f"{self.name} needs arrays of one device, 'cuda' or 'emulated'; got {sorted(devices)}")
        if _launches is not None:
            _launches.append(Launch(self, dict(defines), grid, block, shared))
        if devices == {"emulated"}:
            emulated_array.change(
                lambda: emulated.launch(self.file, defines, self.signature, grid, block, shared, checked)
            )
        else:
            arguments = tuple(NULL if a is None else _pointers(a) if isinstance(a, list) else a for a in checked)
            self._for_the_gpu(defines, shared)(grid, block, arguments, shared_mem=shared)

    def _for_the_gpu(self, defines: tuple, shared: int) -> Any:
        import cupy

        if defines not in self._compiled:
            module = self._module(defines)
            try:
                self._compiled[defines] = module.get_function(self.name)
            except cupy.cuda.compiler.CompileException as error:
                device.check_headers(str(error))
                raise
        kernel = self._compiled[defines]
        if shared > PLAIN_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared
        return kernel

    def _module(self, defines: tuple) -> Any:
        """The file for CuPy, which compiles it for the GPU at hand, but has no option for a target like sm_90a."""
        import cupy

        if only := target(self.file):
            cuda = cupy.cuda.runtime.runtimeGetVersion() // 1000
            return cupy.RawModule(path=str(cubin_of(self.file, only, cuda, **dict(defines))))
        path = path_of(self.file)
        # CuPy finds what it has compiled by source and options, and does not look into what is included.
        version = hashlib.sha256(with_includes(self.file).encode()).hexdigest()[:16]
        named = *(f"-D{name}={value}" for name, value in defines), f"-DSOURCES_{version}"
        options = ("-std=c++17", f"-I{path.parent}", f"-I{FOLDER}", *named)
        return cupy.RawModule(code=path.read_text(), options=options)


_tables: dict[tuple[int, ...], Any] = {}


def _pointers(arrays: list[Any]) -> Any:
    """Their addresses, on the GPU: copied there once, and kept for good, as a recorded launch may read them later."""
    import cupy

    addresses = tuple(0 if a is None else a.data.ptr for a in arrays)
    if addresses not in _tables:
        _tables[addresses] = cupy.asarray(np.array(addresses, np.uint64))
    return _tables[addresses]


class Launch(NamedTuple):
    """One call of a kernel."""

    kernel: Kernel
    defines: dict[str, Any]
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    shared: int  # bytes of dynamic shared memory

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.block[0] * self.block[1] * self.block[2]


_launches: list[Launch] | None = None


@contextmanager
def launches() -> Iterator[list[Launch]]:
    """What is launched inside, in order."""
    global _launches
    before, _launches = _launches, []
    try:
        yield _launches
    finally:
        _launches = before


def reals(*args: Any, **kwargs: Any) -> bool:
    """What a variant supports whose kernels take `real*`: float arrays, not empty, all of one such dtype."""
    arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype") and is_float(a.dtype) and a.ndim]
    return bool(arrays) and all(a.dtype == arrays[0].dtype and a.size for a in arrays) and arrays[0].dtype in REALS


def _three(size: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*map(int, size), 1, 1)[:3]
    return x, y, z


ONE_EACH = Tunable(
    "8 warps: enough blocks to balance, and eight of them fill a multiprocessor's 64 warps",
    dict(threads=256),
    *(dict(threads=n) for n in (64, 128, 512, 1024)),
)


def one_each(count: int, tunable: Tunable = ONE_EACH) -> tuple[tuple[int], tuple[int]]:
    """Grid and block for `count` threads, one for each number; the last block may have some too many."""
    threads = tunable["threads"]
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


def _argument(kernel: str, p: Parameter, a: Any, kinds: dict[str, Any]) -> Any:
    """An array as it is, None, or a number of the size that C++ wants. `kinds`: dtypes of types that macros name."""
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
    if p.many and isinstance(a, list | tuple):
        one = replace(p, many=False)
        return [_argument(kernel, one, array, kinds) for array in a]
    if p.many:
        raise TypeError(f"{kernel}: {p.name} is a list of arrays, got {type(a).__name__}")
    expected = np.dtype(kinds[p.kind] if p.kind in kinds else ARRAYS[p.kind])
    if getattr(a, "dtype", None) != expected or not a.flags.c_contiguous:
        order = "" if not hasattr(a, "flags") or a.flags.c_contiguous else ", not C-contiguous"
        raise TypeError(f"{kernel}: {p.name} points to {expected}; got {getattr(a, 'dtype', type(a).__name__)}{order}")
    return a
