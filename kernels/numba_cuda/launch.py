"""What a kernel in Numba CUDA needs around it: compiled at its first launch, and where it can run.

    @jit
    def _relu(x, y):
        i = cuda.grid(1)
        ...

    _relu[blocks, threads](x, y)        # CuPy's arrays: on the GPU; `emulated`: in Numba's simulator
    print(_relu.ptx(x, y, cc=(9, 0)))   # what the compiler makes of it, for arrays of NumPy, without a GPU

The simulator is chosen before Numba is imported: NUMBA_ENABLE_CUDASIM=1 in the environment.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numba
import numpy as np

from ..dispatch import FLOATS, DeviceError, xp_of
from ..emulated_array import change

THREADS = 128  # of a block, where a kernel has a thread for each number


def simulating() -> bool:
    """Whether Numba runs its CUDA kernels in its simulator."""
    return bool(getattr(numba.config, "ENABLE_CUDASIM", 0))


def lacks(device: str) -> str:
    """What a rung in Numba misses on a device, and how to get it."""
    if device == "emulated" and not simulating():
        return (
            "a kernel in Numba runs there in Numba's simulator, which is chosen before Numba is imported: "
            "set NUMBA_ENABLE_CUDASIM=1 in the environment"
        )
    if device == "cuda" and simulating():
        return "Numba's simulator knows no arrays of a GPU: unset NUMBA_ENABLE_CUDASIM"
    return ""


RUNG: dict[str, Any] = dict(device="cuda", auto=False, lacks=lacks)  # how each of them is registered


class jit:
    """`numba.cuda.jit`, at the first launch: importing numba.cuda takes a second, which only they shall pay who use it.

    Until then the name `cuda` in the kernel's file means nothing; it is put there for the kernel.
    """

    def __init__(self, function: Callable):
        self.function = function

    @cached_property
    def compiled(self) -> Any:
        """What Numba makes of it: the kernel of the GPU, or of the simulator."""
        return self._cuda().jit(self.function)

    def __getitem__(self, configuration: tuple[Any, Any]) -> Callable[..., None]:
        """kernel[blocks, threads](*arguments): each of the two a number, or a tuple of two or three."""
        return lambda *args: self.launch(*configuration, *args)

    def launch(self, grid: Any, block: Any, *args: Any) -> None:
        if simulating():
            change(lambda: self.compiled[grid, block](*map(_plain, args)))
        else:
            self.compiled[grid, block, self._stream()](*args)

    def ptx(self, *args: Any, cc: tuple[int, int] = (8, 0)) -> str:
        """Its code for a GPU of a compute capability and arguments like these, NumPy's arrays and numbers.

        Needs no GPU, but NVIDIA's compiler NVVM: of a toolkit, or pip install 'nanocnn[nvrtc]'. Raises DeviceError
        where there is none, and in the simulator, which compiles nothing.
        """
        if simulating():
            raise DeviceError("Numba's simulator compiles nothing: unset NUMBA_ENABLE_CUDASIM")
        cuda = self._cuda()
        types = tuple(numba.typeof(_plain(a)) for a in args)
        _show_the_wheels(cuda)
        try:
            return cuda.compile(self.function, types, device=False, abi="numba", cc=cc, output="ptx")[0]
        except Exception as error:
            if "NVVM" not in f"{type(error).__name__} {error}".upper():
                raise
            raise DeviceError(
                f"no code for a GPU without NVVM, NVIDIA's compiler: {type(error).__name__}: {error}. "
                "It comes with a CUDA toolkit, or by pip install 'nanocnn[nvrtc]'"
            ) from error

    def _cuda(self) -> Any:
        try:
            from numba import cuda
        except ImportError as error:
            raise DeviceError(
                f"no kernels in Numba CUDA: {error}. Numba's part for GPUs is a package of its own: "
                "pip install 'nanocnn[cuda12]' or 'nanocnn[cuda13]'"
            ) from error
        self.function.__globals__["cuda"] = cuda
        return cuda

    def _stream(self) -> Any:
        """That on which CuPy works now, so that kernels of both come one after the other."""
        import cupy

        return self._cuda().external_stream(cupy.cuda.get_current_stream().ptr)


def _plain(a: Any) -> Any:
    """An array of the device `emulated` as NumPy's. The simulator writes all arrays back, so it gets a copy of one that
    must not be written: a gradient that is one number, broadcast."""
    if not isinstance(a, np.ndarray):
        return a
    return np.asarray(a) if a.flags.writeable else np.array(a)


# What Numba's own package for GPUs looks for, in toolkits only, and where NVIDIA's wheels put it.
OF_THE_WHEELS = {
    "nvvm": "*/lib/libnvvm.so.*",
    "libdevice": "*/nvvm/libdevice/libdevice.*.bc",
    "cudalib_dir": "*/lib/libcudart.so.*",  # the folder of this one, which is asked for its version
}


def _show_the_wheels(cuda: Any) -> None:
    """Let Numba find the wheels of the extra `nvrtc` where there is no toolkit. The package numba-cuda does."""
    if getattr(cuda, "implementation", "Built-in") != "Built-in":
        return
    from numba.cuda import cuda_paths

    found = cuda_paths.get_cuda_paths()  # what Numba remembers of its search, and asks again
    spec = importlib.util.find_spec("nvidia")  # the package into which all of NVIDIA's wheels put their files
    for folder in map(Path, (spec.submodule_search_locations or []) if spec and not found["nvvm"].info else []):
        for name, pattern in OF_THE_WHEELS.items():
            for path in folder.glob(pattern):
                info = path.parent if name.endswith("dir") else path
                found[name] = found[name]._replace(by="wheel", info=str(info))


# ------------------------------------------------------------------ for the files beside this one


def floats(*args: Any, **kwargs: Any) -> bool:
    """What these rungs support unless they say otherwise: arrays, not empty, all of float32 or all of float64."""
    arrays = [a for a in (*args, *kwargs.values()) if hasattr(a, "dtype") and a.ndim]
    return bool(arrays) and all(a.size and a.dtype == arrays[0].dtype for a in arrays) and arrays[0].dtype in FLOATS


def one_each(y: Any) -> tuple[int, int]:
    """Blocks and threads for a thread for each number of `y`; the last block may have some too many."""
    return math.ceil(y.size / THREADS), THREADS


def empty(like: Any, shape: Any, dtype: Any = None) -> Any:
    """An uninitialised array on the device of another one; of its dtype, unless one is given."""
    return xp_of(like).empty(shape, like.dtype if dtype is None else dtype)
