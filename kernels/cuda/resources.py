"""What a kernel takes of a GPU's multiprocessor, from its compiler, without a GPU: registers, spills, shared memory.

    resources("gemm.cu", "sm_90")["gemm_tiled"]     # Resources(registers=32, spilled=0, shared=8192)

The compiler is NVRTC from the wheels (pip install 'nanocnn[nvrtc]'), or else nvcc, which takes several times as long.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..dispatch import DeviceError
from . import device
from .emulated import cache_folder
from .source import FOLDER, target, with_includes

ARCHITECTURES = ("sm_80", "sm_90")  # Ampere (A100), Hopper (H100, H200)
# As ptxas reports them (-v), one after the other for each kernel.
ENTRY = re.compile(r"Compiling entry function '(\w+)'")
SPILLED = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


class Resources(NamedTuple):
    """Of one kernel, compiled for one architecture."""

    registers: int  # of each thread
    spilled: int  # bytes that go to memory and back for want of registers
    shared: int  # bytes of static shared memory of each block


class CompileError(RuntimeError):
    """A source that does not compile; the message is the compiler's."""


class Compiled(NamedTuple):
    report: str  # the compiler's words
    cubin: bytes  # the GPU's instructions


def resources(file: str, architecture: str, **defines: Any) -> dict[str, Resources]:
    """Of each kernel of a .cu file. Raises CompileError, and DeviceError where there is no compiler."""
    return parse(compiled(file, architecture, **defines).report)


def compiled(file: str, architecture: str, cuda: int | None = None, **defines: Any) -> Compiled:
    """A .cu file, by NVRTC (of that major version of CUDA, where it matters) or else by nvcc. Raises as `resources`."""
    folders = dict.fromkeys([f"-I{(FOLDER / file).parent}", f"-I{FOLDER}"])
    options = ["-std=c++17", *folders, *(f"-D{name}={value}" for name, value in sorted(defines.items()))]
    try:
        return _by_nvrtc(file, architecture, options, cuda)
    except DeviceError:
        if not shutil.which("nvcc"):
            raise
        return _by_nvcc(file, architecture, options)


def cubin_of(file: str, architecture: str, cuda: int, **defines: Any) -> Path:
    """A .cu file compiled for a driver of this major version of CUDA, as a file that is kept. Raises as `resources`."""
    told = f"{with_includes(file)}{architecture}{cuda}{sorted(defines.items())}"
    folder = cache_folder().parent / "cuda"
    folder.mkdir(exist_ok=True)
    path = folder / f"{Path(file).stem}-{hashlib.sha256(told.encode()).hexdigest()[:20]}.cubin"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as made:
            new = Path(made, path.name)
            new.write_bytes(compiled(file, architecture, cuda, **defines).cubin)
            os.replace(new, path)  # it appears whole or not at all
    return path


def architectures(file: str) -> tuple[str, ...]:
    """Those that a .cu file is compiled for."""
    only = target(file)
    return (only,) if only else ARCHITECTURES


def parse(report: str) -> dict[str, Resources]:
    """The words of `ptxas -v`, as numbers."""
    found = {}
    for part in re.split(r"(?=Compiling entry function)", report)[1:]:
        name, spilled, used = ENTRY.search(part), SPILLED.search(part), USED.search(part)
        if not name or not used:
            raise CompileError(f"not understood of the compiler: {part}")
        found[name[1]] = Resources(int(used[1]), sum(map(int, spilled.groups())) if spilled else 0, int(used[2] or 0))
    return found


def _by_nvcc(file: str, architecture: str, options: list[str]) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.cubin")
        # Not -arch: of sm_90a some versions of nvcc would make a plain sm_90, too, which has not all its instructions.
        generate = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
        command = ["nvcc", generate, *options, "-cubin", "--ptxas-options=-v", "-o", str(out), str(FOLDER / file)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise CompileError(f"{file} for {architecture}:\n{done.stderr.strip()}")
        return Compiled(done.stderr, out.read_bytes())


# ------------------------------------------------------------------ NVRTC, which takes the source as text


def _by_nvrtc(file: str, architecture: str, options: list[str], cuda: int | None) -> Compiled:
    library, includes = _nvrtc(cuda)
    program = ctypes.c_void_p()
    text, name = (FOLDER / file).read_bytes(), file.encode()
    library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None)
    words = [f"--gpu-architecture={architecture}", "--ptxas-options=-v", *options, *includes]
    given = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    status = library.nvrtcCompileProgram(program, len(words), given)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise CompileError(f"{file} for {architecture}:\n{log.value.decode().strip()}")
    return Compiled(log.value.decode(), cubin.raw)


@cache
def _nvrtc(cuda: int | None) -> tuple[ctypes.CDLL, tuple[str, ...]]:
    """The library, of this major version of CUDA or of any, and where its headers are, as options."""
    folders = list(_of_the_wheels())
    for path in (path for folder in folders for path in sorted(folder.glob(f"**/libnvrtc.so.{cuda or '*'}"))):
        if "alt" not in path.name:
            one = path.parent.parent / "include"  # from CUDA 13 on, of all wheels; before, each wheel had a folder
            several = (d for f in folders for d in f.glob("*/include") if not d.parent.name.startswith("cu1"))
            headers = [one] if (one / "cuda_fp16.h").exists() else [one, *several]
            return ctypes.CDLL(str(path)), tuple(f"-I{d}" for d in headers)
    compiler = f"compiler for CUDA{f' {cuda}' if cuda else ''}"
    remedy = device.install(device.EXTRAS.get(cuda or 0, "nvrtc"))
    raise DeviceError(f"no {compiler}: neither nvcc on PATH nor NVRTC from the wheels; {remedy}")


def _of_the_wheels() -> Iterator[Path]:
    """Folders of the package `nvidia`, in which all of its wheels put their files."""
    spec = importlib.util.find_spec("nvidia")
    yield from map(Path, (spec.submodule_search_locations or []) if spec else [])
