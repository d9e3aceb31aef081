"""Can the device `cuda` be used? If not: what is missing, and the command that mends it.

`check()` asks for one thing after the other, the cheapest first, and raises DeviceError with the first that is not as
it must be. No step of it takes memory on a GPU. Never run where there is a GPU; the tests run it on stand-ins.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

from ..dispatch import DeviceError, device_of
from ..narrow import Narrow

PIP = "python -m pip"
DRIVER = "libcuda.so.1"
WHEELS = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")  # of which there may be one
EXTRAS = {12: "cuda12", 13: "cuda13"}  # CUDA's major version: what of nanocnn's installs the CuPy for it
# NVIDIA's oldest driver for a major version: https://docs.nvidia.com/deploy/cuda-compatibility/
DRIVERS = {11: "450", 12: "525", 13: "580"}
OLDEST = (7, 5)  # compute capability: Turing, the oldest that CUDA 13 compiles for
ASYNCHRONOUS = (8, 0)  # Ampere: cp.async and mma.sync.m16n8k16, which the rungs `cuda_tensor` are made of
WARPGROUPS = (9, 0)  # Hopper, and no other: `wgmma`, of the rung `cuda_wgmma`, is not in later GPUs
ELSEWHERE = "without a GPU, the device 'emulated' runs the same kernels, and 'cpu' trains"


@cache
def check() -> None:
    """Raise DeviceError if the device `cuda` cannot be used. An answer is kept if it is a good one."""
    found = wheels()
    if len(found) > 1:
        raise _error(
            f"there are {len(found)} CuPy wheels, which overwrite each other's files: {', '.join(found)}",
            f"keep one: {PIP} uninstall -y {' '.join(found)}, then {install(_extra(_drivers_cuda()))}",
        )
    driver = _drivers_cuda()
    if importlib.util.find_spec("cupy") is None:
        if driver:
            raise _error("CuPy is not installed", install(_extra(driver)))
        raise _error(
            f"CuPy is not installed, and there is no NVIDIA driver ({DRIVER})",
            "install the driver, on Ubuntu by sudo ubuntu-drivers install (a container must be given the GPU: "
            f"docker run --gpus all ...), then {install(_extra(driver))}",
        )
    if not driver:
        raise _error(
            f"there is no NVIDIA driver that can be loaded ({DRIVER})",
            "a container must be given the GPU: docker run --gpus all ...; else install the driver, on Ubuntu by "
            "sudo ubuntu-drivers install, and look with nvidia-smi",
        )
    cupy = _imported()
    _check_versions(driver, cupy.cuda.runtime.runtimeGetVersion(), found)
    _check_gpu(cupy)
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # its library is loaded at the first call
        major = cupy.cuda.runtime.runtimeGetVersion() // 1000
        raise _error(
            f"the compiler of CUDA {major}, NVRTC, cannot be loaded ({error}): it must be of CuPy's CUDA",
            install(EXTRAS.get(major, "cuda13")),
        ) from error


def used() -> bool:
    """Whether this process has found that it can use a GPU; it imports nothing to find out."""
    return check.cache_info().currsize > 0


def wheels() -> list[str]:
    """The CuPy packages that are installed."""
    return [name for name in WHEELS if _version(name)]


def install(extra: str) -> str:
    """The command that installs one of nanocnn's extras: from the source tree that we run in, where there is one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / "pyproject.toml").exists():
        return f"{PIP} install 'nanocnn[{extra}]'"
    return f"{PIP} install -e '{'.' if root == Path.cwd() else root}[{extra}]'"


def copies_asynchronously(x: Any) -> bool:
    """Whether the device of an array knows `cp.async` and `mma.sync.m16n8k16`: the emulator, and Ampere or later."""
    if device_of(x) != "cuda":
        return True
    return _capability(x.device.id) >= ASYNCHRONOUS


def has_warpgroups(x: Any) -> bool:
    """Whether the device of an array knows `wgmma`: the emulator, and Hopper, but nothing later."""
    return device_of(x) != "cuda" or _capability(x.device.id) == WARPGROUPS


def check_half(what: str, half: Narrow) -> None:
    """Raise DeviceError if the current GPU, or CuPy, has no such numbers; `what` it was that asked for them."""
    import cupy

    found = _capability(cupy.cuda.Device().id)
    if found < half.capability:
        raise DeviceError(
            f"{what} needs a GPU of compute capability {'.'.join(map(str, half.capability))} (Ampere) or later, and "
            f"this one is of {'.'.join(map(str, found))}. To do: precision=fp16"
        )
    if int(cupy.__version__.partition(".")[0]) < half.cupy:
        raise DeviceError(
            f"{what} needs CuPy {half.cupy} or later, and this is CuPy {cupy.__version__}. To do: "
            f"{PIP} install -U {' '.join(wheels()) or 'cupy'}; or precision=fp16"
        )


def check_headers(error: str) -> None:
    """Raise DeviceError if a compiler's error is for want of CUDA's headers, which CuPy's wheels do not bring."""
    if found := re.search(r"""(?:cannot|could not) open source file "?(cuda\w+\.h)""", error):
        raise _error(
            f"CuPy finds no headers of CUDA ({found[1]})",
            f"{install(_extra(_drivers_cuda()))}, or name CUDA's folder in the variable CUDA_PATH",
        )


# ------------------------------------------------------------------ the steps


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _drivers_cuda() -> int:
    """The newest CUDA that the driver knows: 13010 is 13.1. 0 without a driver."""
    number = ctypes.c_int()
    try:
        status = ctypes.CDLL(DRIVER).cuDriverGetVersion(ctypes.byref(number))
    except (OSError, AttributeError):
        return 0
    return 0 if status else number.value


def _extra(driver: int) -> str:
    """For a driver; for none, that of the newest CUDA."""
    return EXTRAS.get(driver // 1000, "cuda13")


def _imported() -> Any:
    try:
        import cupy
    except Exception as error:  # whatever a broken installation raises
        raise _error(
            f"CuPy cannot be imported ({type(error).__name__}: {error})",
            f"install it anew: {PIP} uninstall -y {' '.join(wheels())}, then {install(_extra(_drivers_cuda()))}",
        ) from error
    return cupy


def _check_versions(driver: int, runtime: int, found: list[str]) -> None:
    """A driver runs what was made for its own major version of CUDA or an older one."""
    has, needs = driver // 1000, runtime // 1000
    if has >= needs:
        return
    newer = f"a driver of version {DRIVERS.get(needs, 'that fits')} or later (nvidia-smi shows yours)"
    if has in EXTRAS:
        remedy = f"{PIP} uninstall -y {' '.join(found) or 'cupy'}, then {install(EXTRAS[has])}; or install {newer}"
    else:
        remedy = f"install {newer}"
    raise _error(f"the driver is for CUDA {_words(driver)}, and CuPy for CUDA {needs}: too new for it", remedy)


def _check_gpu(cupy: Any) -> None:
    try:
        count, why = cupy.cuda.runtime.getDeviceCount(), ""
    except Exception as error:
        count, why = 0, f" ({error})"
    if not count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}: unset CUDA_VISIBLE_DEVICES"
        raise _error(f"there is a driver, but no GPU that it shows{why}", f"see what nvidia-smi -L lists{hidden}")
    found = _capability(cupy.cuda.Device().id)
    if found < OLDEST:
        raise _error(
            f"the GPU is of compute capability {found[0]}.{found[1]}, and our kernels need {OLDEST[0]}.{OLDEST[1]} "
            "(Turing) or later",
            "choose another GPU by CUDA_VISIBLE_DEVICES=NUMBER (nvidia-smi -L lists them)",
        )


@cache
def _capability(number: int) -> tuple[int, int]:
    """Of a GPU: (9, 0) is Hopper."""
    import cupy

    word = cupy.cuda.Device(number).compute_capability  # "90", "120"
    return int(word[:-1]), int(word[-1])


def _words(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _error(cause: str, remedy: str) -> DeviceError:
    return DeviceError(f"cannot use the device 'cuda': {cause}. To do: {remedy}; {ELSEWHERE}")
