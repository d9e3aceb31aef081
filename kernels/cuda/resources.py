"""What a kernel takes of a GPU's multiprocessor, from its compiler, without a GPU: registers, spills, shared memory.

    resources("gemm.cu", "sm_90")["gemm_tiled"]     # Resources(registers=32, spilled=0, shared=8192)

The compiler is NVRTC from the wheels (pip install 'nanocnn[nvrtc]'), or else nvcc, which takes several times as long.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from ..dispatch import DeviceError
from .source import FOLDER, target

ARCHITECTURES = ("sm_80", "sm_90")  # Ampere (A100), Hopper (H100, H200)
SERIALIZED = re.compile(r".*\bC75\d\d\b.*|.*wgmma.*serialized.*")  # of wgmma: correct, and slow
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


def resources(file: str, architecture: str, **defines: Any) -> dict[str, Resources]:
    """Of each kernel of a .cu file. Raises CompileError, and DeviceError where there is no compiler."""
    options = ["-std=c++17", *(f"-D{name}={value}" for name, value in sorted(defines.items()))]
    try:
        report = _by_nvrtc(file, architecture, options)
    except DeviceError:
        if not shutil.which("nvcc"):
            raise
        report = _by_nvcc(file, architecture, options)
    return parse(report)


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


def _by_nvcc(file: str, architecture: str, options: list[str]) -> str:
    command = ["nvcc", f"-arch={architecture}", *options, "-cubin", "--ptxas-options=-v", "-o", os.devnull]
    done = subprocess.run([*command, str(FOLDER / file)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{file} for {architecture}:\n{done.stderr.strip()}")
    return done.stderr


# ------------------------------------------------------------------ NVRTC, which takes the source as text


def _by_nvrtc(file: str, architecture: str, options: list[str]) -> str:
    library, includes = _nvrtc()
    program = ctypes.c_void_p()
    text, name = (FOLDER / file).read_bytes(), file.encode()
    library.nvrtcCreateProgram(ctypes.byref(program), text, name, 0, None, None)
    words = [f"--gpu-architecture={architecture}", "--ptxas-options=-v", f"-I{FOLDER}", *includes, *options]
    given = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    status = library.nvrtcCompileProgram(program, len(words), given)
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    if status:
        raise CompileError(f"{file} for {architecture}:\n{log.value.decode().strip()}")
    return log.value.decode()


@cache
def _nvrtc() -> tuple[ctypes.CDLL, tuple[str, ...]]:
    """The library, and where its headers are, as options."""
    folders = list(_of_the_wheels())
    for folder in folders:
        for path in sorted(folder.glob("**/libnvrtc.so.*")):
            if "alt" not in path.name:
                includes = (f"-I{d}" for f in folders for d in (*f.glob("include"), *f.glob("*/include")))
                return ctypes.CDLL(str(path)), tuple(includes)
    raise DeviceError(
        "no compiler for CUDA: neither nvcc on PATH nor NVRTC from the wheels; pip install 'nanocnn[nvrtc]'"
    )


def _of_the_wheels() -> Iterator[Path]:
    """Folders of the package `nvidia`, in which all of its wheels put their files."""
    spec = importlib.util.find_spec("nvidia")
    yield from map(Path, (spec.submodule_search_locations or []) if spec else [])
