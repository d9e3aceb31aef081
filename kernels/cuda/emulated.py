"""The device `emulated`: CUDA kernels compiled by g++ and run on the CPU, on arrays that are NumPy's.

    x = to_device(np.ones((4, 4), np.float32), "emulated")
    with counting() as traffic:
        y = nc.functional.relu(nc.Tensor(x))
    print(traffic)

Inside `counting()` every access of a kernel is checked and counted, which takes some fifty times as long; outside,
kernels just run. What is not a CUDA kernel is NumPy's work, as on the device `cuda` it is CuPy's.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from ..dispatch import DeviceError
from .source import FOLDER, Signature, each_array, edited, shared_in_a_template, signatures, with_includes

GUARD = 4096  # bytes on each side of an array while its accesses are checked, that belong to no array
OLDEST = 12  # version of g++ that knows _Float16 in C++
ALIGNED = 256  # bytes: where a GPU's allocations begin


class KernelError(RuntimeError):
    """A kernel did what it must not do; the message has the file, the line, the thread and the memory."""


# ------------------------------------------------------------------ building


def compiler() -> str:
    """The C++ compiler. Raises DeviceError where there is none that can do it."""
    found = shutil.which(os.environ.get("CXX") or "g++")
    if not found:
        raise DeviceError(
            "the device 'emulated' compiles CUDA kernels with g++, and there is none: apt-get install g++ "
            "(or conda install gxx), or name one in the variable CXX"
        )
    return _checked_compiler(found)


@cache
def _checked_compiler(path: str) -> str:
    done = subprocess.run([path, "-dumpversion"], capture_output=True, text=True, check=False)
    version = done.stdout.strip()
    if int(version.partition(".")[0] or 0) < OLDEST:
        raise DeviceError(
            f"the device 'emulated' needs g++ {OLDEST} or later, for half precision; {path} is of version "
            f"{version or 'unknown'}: apt-get install g++-{OLDEST}, and name it in the variable CXX"
        )
    return path


def cache_folder() -> Path:
    """Where compiled kernels are kept: $NANOCNN_CACHE, or ~/.cache/nanocnn; else with temporary files."""
    with contextlib.suppress(OSError, RuntimeError):  # no home folder, or none that may be written to
        folder = Path(os.environ.get("NANOCNN_CACHE") or Path.home() / ".cache" / "nanocnn") / "emulated"
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            return folder
    folder = Path(tempfile.gettempdir(), f"nanocnn-{os.getuid()}", "emulated")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


FLAGS = ("-std=c++17", "-fPIC", "-w", "-fvisibility=hidden", "-march=native", f"-I{FOLDER}")
# Checked, a kernel keeps its loads and stores as they are written: -O1, and a line for each. Sinking would move a load
# behind a branch; of DWARF 5 some versions of addr2line mistake a source's first file.
WATCHED = ("-O1", "-fno-tree-sink", "-gdwarf-4", "-DWATCHED")


def library(file: str, defines: tuple[tuple[str, Any], ...], watched: bool) -> ctypes.CDLL:
    """A .cu file as a shared library; compiled if the cache has none of the same sources and options."""
    return _library(file, edited(file), defines, watched)


@cache
def _library(file: str, edited: int, defines: tuple[tuple[str, Any], ...], watched: bool) -> ctypes.CDLL:
    path = _built(file, defines, watched)
    found = ctypes.CDLL(str(path))
    found.emulator_launch.restype = ctypes.c_char_p
    if watched:
        found.emulator_report.restype = ctypes.POINTER(_Line)
        found.emulator_image.restype = ctypes.c_void_p
    return found


def _built(file: str, defines: tuple[tuple[str, Any], ...], watched: bool) -> Path:
    options = [*FLAGS, *(WATCHED if watched else ["-O2"])]
    parts = ("emulator.cpp", "emulated_wgmma.cpp", "watch.cpp")[: 2 + watched]
    own = [_of_the_emulator(name, options) for name in parts]
    macros = [f"-D{name}={value}" for name, value in defines]
    watching = ["-fsanitize=thread", "-fsanitize=bounds"] * watched  # not for the linker, which would bring sanitizers

    def make(out: Path) -> None:
        if name := shared_in_a_template(file):  # g++ would put it where nobody watches, and say nothing
            raise KernelError(
                f"{Path(file).name}: the template {name} has __shared__ memory of its own, which the emulator cannot "
                "watch; declare it in the kernel and pass it"
            )
        calls = out.with_suffix(".cpp")
        calls.write_text(f'#include "{file}"\n' + "\n".join(map(_call, signatures(file).values())))
        _compile(calls, out.with_suffix(".o"), [*options, *macros, *watching], file)
        _run([compiler(), "-shared", str(out.with_suffix(".o")), *map(str, own), "-o", str(out)], file)

    return _kept(f"{Path(file).stem}.so", [with_includes(file), *(path.name for path in own), *options, *macros], make)


@cache
def host_library(source: str) -> ctypes.CDLL:
    """A .cpp file of this folder as a shared library: what stands in for a library of NVIDIA's."""
    options = [*FLAGS, "-O3"]  # no -ffast-math: it would change how the whole process rounds

    def make(out: Path) -> None:
        _run([compiler(), *options, "-shared", str(FOLDER / source), "-o", str(out)], source)

    return ctypes.CDLL(str(_kept(f"{Path(source).stem}.so", [with_includes(source), *options], make)))


def _of_the_emulator(name: str, options: list[str]) -> Path:
    """A part of the emulator, compiled once for all kernels."""
    source = FOLDER / name
    return _kept(f"{source.stem}.o", [with_includes(name), *options], lambda out: _compile(source, out, options))


def _kept(name: str, depends_on: list[str], make: Callable[[Path], None]) -> Path:
    """A file of the cache, named by all that it depends on; made if it is not there. It appears whole or not at all."""
    key = hashlib.sha256("\0".join([*depends_on, compiler(), _processor()]).encode()).hexdigest()[:20]
    path = cache_folder() / f"{Path(name).stem}-{key}{Path(name).suffix}"
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            made = Path(folder, path.name)
            make(made)
            os.replace(made, path)
    return path


def _compile(source: Path, out: Path, options: Sequence[str], what: str | None = None) -> None:
    _run([compiler(), *options, "-c", str(source), "-o", str(out)], what or source.name)


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"{Path(what).name} does not compile:\n{done.stderr.strip()}")


def _call(kernel: Signature) -> str:
    """A function that takes a kernel's arguments from memory."""
    given = ", ".join(f"*({p.type}*)arguments[{i}]" for i, p in enumerate(kernel.parameters))
    plain = '__attribute__((visibility("default"), no_sanitize("thread")))'
    return f'extern "C" {plain} void call_{kernel.name}(void** arguments) {{ {kernel.name}({given}); }}\n'


@cache
def _processor() -> str:
    """-march=native means another thing on another machine, which may share the cache."""
    with contextlib.suppress(OSError):
        found = re.search(r"^(?:flags|Features)\s*:.*$", Path("/proc/cpuinfo").read_text(), re.M)
        return found[0] if found else ""
    return ""


# ------------------------------------------------------------------ launching


_one_at_a_time = threading.Lock()  # a library runs one kernel; its shared memory is static


def launch(
    file: str,
    defines: tuple[tuple[str, Any], ...],
    kernel: Signature,
    grid: tuple[int, int, int],
    block: tuple[int, int, int],
    shared: int,
    args: Sequence[Any],
) -> None:
    """Run a kernel on arrays and NumPy's numbers; `shared` in bytes. Raises KernelError on what must not be."""
    report = _traffic
    if signatures(file).get(kernel.name) != kernel:
        raise KernelError(
            f"{Path(file).name} was edited, and {kernel.name} takes other arguments now: make a new Kernel"
        )
    code = library(file, defines, report is not None)
    dynamic = _aligned(shared)
    with _one_at_a_time, contextlib.nullcontext(args) if report is None else _between_guards(kernel, args) as given:
        tables = [np.array([*map(_address, a)], np.uint64) if isinstance(a, list) else None for a in given]
        if report is not None:
            _watch(code, kernel, given, tables, dynamic)
        # A kernel's arguments lie in memory, each at a place of its own: addresses of arrays or tables, and numbers.
        first = [a if table is None else table for a, table in zip(given, tables, strict=True)]
        slots = [np.asarray(a) if isinstance(a, np.generic) else np.array(_address(a), np.uint64) for a in first]
        places = (ctypes.c_void_p * len(slots))(*(slot.ctypes.data for slot in slots))
        sizes = (ctypes.c_uint * 3)(*grid), (ctypes.c_uint * 3)(*block)
        error = code.emulator_launch(getattr(code, f"call_{kernel.name}"), places, *sizes, *_shared(dynamic))
        if report is not None:
            report.add(code, kernel.name)
    if error:
        raise KernelError(f"{kernel.name}: {_located(code, error.decode())}")


def _address(a: np.ndarray | None) -> int:
    return 0 if a is None else a.ctypes.data


def _is_array(a: Any) -> bool:
    return isinstance(a, np.ndarray)


def _pointer(x: np.ndarray) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data)


def _shared(dynamic: np.ndarray) -> tuple[ctypes.c_void_p, ctypes.c_size_t]:
    return _pointer(dynamic), ctypes.c_size_t(dynamic.nbytes)


def _aligned(size: int, before: int = 0) -> np.ndarray:
    """Bytes that begin where a GPU's allocations may, with `before` and more on both sides that are nobody's."""
    raw = np.empty(size + 2 * before + ALIGNED, np.uint8)
    first = before + -(raw.ctypes.data + before) % ALIGNED
    return raw[first : first + size]


@contextlib.contextmanager
def _between_guards(kernel: Signature, args: Sequence[Any]) -> Iterator[list[Any]]:
    """The arguments, arrays as copies with nothing of the kernel's on both sides; what it wrote is copied back.

    Arrays that share memory (an output that is an input) share it there, too.
    """
    arrays = list(each_array(zip(kernel.parameters, args, strict=True)))
    spans: list[list[int]] = []
    for begin, end in sorted((a.ctypes.data, a.ctypes.data + a.nbytes) for _, a in arrays):
        if spans and begin < spans[-1][1]:
            spans[-1][1] = max(spans[-1][1], end)
        else:
            spans.append([begin, end])
    rooms = [_aligned(end - begin, GUARD) for begin, end in spans]

    def moved(a: Any) -> Any:
        if isinstance(a, list):
            return [*map(moved, a)]
        if not _is_array(a):
            return a
        which = bisect.bisect_right(spans, [a.ctypes.data, float("inf")]) - 1
        copy = np.ndarray(a.shape, a.dtype, rooms[which], a.ctypes.data - spans[which][0])
        copy[...] = a
        return copy

    copies = [moved(a) for a in args]
    try:
        yield copies
    finally:
        done = each_array(zip(kernel.parameters, copies, strict=True))
        for (p, a), (_, copy) in zip(arrays, done, strict=True):
            if not p.constant:
                a[...] = copy


# ------------------------------------------------------------------ what kernels do to memory


class _Line(ctypes.Structure):  # as in watch.cpp
    _fields_ = [
        ("pc", ctypes.c_void_p),
        *((name, ctypes.c_uint32) for name in ("shared", "write", "atomic")),
        *((name, ctypes.c_uint64) for name in ("requests", "bytes", "units", "ideal")),
    ]


@dataclass
class Traffic:
    """What one line of a kernel asked of one kind of memory. A request is what a warp's lanes ask for together.

    `units`: of global memory, sectors of 32 bytes; of shared memory, turns of its 32 banks. `ideal`: as few as would
    do, were all lanes' places neighbours and no two in one bank.
    """

    kernel: str
    place: str
    memory: str  # "global" or "shared"
    kind: str  # "load", "store" or "atomic"
    requests: int = 0
    bytes: int = 0
    units: int = 0
    ideal: int = 0


@dataclass
class Report:
    """What the kernels did that ran inside `counting()`."""

    launches: Counter[str] = field(default_factory=Counter)
    lines: dict[tuple[str, str, str, str], Traffic] = field(default_factory=dict)
    blocks: int = 0
    barriers: int = 0
    meetings: int = 0  # of warps: shuffles, votes, matrix instructions
    barriers_of: Counter[str] = field(default_factory=Counter)  # of each kernel

    def __str__(self) -> str:
        words = [f"{', '.join(f'{name} x {n}' for name, n in self.launches.items())}: {self.blocks} blocks"]
        for memory, unit in (("global", "sectors"), ("shared", "turns")):
            for kind in ("load", "store", "atomic"):
                t = self.total(memory, kind)
                if t.requests:
                    words.append(f"{memory} {kind}: {t.bytes:,} bytes, {t.units:,} {unit} ({t.ideal:,} at best)")
        return "\n".join([*words, f"barriers: {self.barriers:,}, meetings of warps: {self.meetings:,}"])

    def total(self, memory: str, *kinds: str) -> Traffic:
        """All lines of one memory, and of some kinds if they are named, in one."""
        chosen = [t for t in self.lines.values() if t.memory == memory and (not kinds or t.kind in kinds)]
        sums = (sum(getattr(t, name) for t in chosen) for name in ("requests", "bytes", "units", "ideal"))
        return Traffic("", "", memory, " and ".join(kinds) or "all", *sums)

    def add(self, code: ctypes.CDLL, kernel: str) -> None:
        """What a library has counted in the launch that is over."""
        count, totals = ctypes.c_int(), (ctypes.c_uint64 * 3)()
        found = code.emulator_report(ctypes.byref(count), totals)
        rows = [found[i] for i in range(count.value)]
        places = _places(code, [row.pc for row in rows])
        self.launches[kernel] += 1
        self.barriers_of[kernel] += totals[1]
        self.blocks, self.barriers, self.meetings = (
            a + b for a, b in zip((self.blocks, self.barriers, self.meetings), totals, strict=True)
        )
        for row, place in zip(rows, places, strict=True):
            kind = "atomic" if row.atomic else "store" if row.write else "load"
            key = kernel, place, "shared" if row.shared else "global", kind
            line = self.lines.setdefault(key, Traffic(*key))
            line.requests += row.requests
            line.bytes += row.bytes
            line.units += row.units
            line.ideal += row.ideal


_traffic: Report | None = None


@contextlib.contextmanager
def counting() -> Iterator[Report]:
    """Check and count every access of the kernels that run inside."""
    global _traffic
    before, _traffic = _traffic, Report()
    try:
        yield _traffic
    finally:
        _traffic = before


_names: dict[ctypes.CDLL, Any] = {}


def _watch(
    code: ctypes.CDLL, kernel: Signature, args: Sequence[Any], tables: Sequence[Any], dynamic: np.ndarray
) -> None:
    """Tell the library which memory the kernel may touch: arrays, and tables of where they are."""
    known: dict[tuple[int, int], bytes] = {}
    for given in (args, tables):
        for p, a in each_array(zip(kernel.parameters, given, strict=True)):
            known.setdefault((a.ctypes.data, a.nbytes), f"{p.name} ({a.dtype}{list(a.shape)})".encode())
    count = len(known)
    begins = (ctypes.c_void_p * count)(*(begin for begin, _ in known))
    sizes = (ctypes.c_size_t * count)(*(size for _, size in known))
    names = _names[code] = (ctypes.c_char_p * count)(*known.values())  # the library has pointers into it
    code.emulator_watch(count, begins, sizes, names, *_shared(dynamic))


def _located(code: ctypes.CDLL, message: str) -> str:
    """The message without folders; it may begin with the address of an instruction, for which its line is put."""
    message = re.sub(r"/\S*/(?=[\w.]+:\d+)", "", message)
    match = re.match(r"(0x[0-9a-f]+) ", message)
    if not match:
        return message
    return f"{_places(code, [int(match[1], 16)])[0]}: {message[match.end() :]}"


def _places(code: ctypes.CDLL, addresses: list[int]) -> list[str]:
    """file:line of instructions."""
    known = _lines_of(code)
    missing = [a for a in addresses if a not in known]
    if missing:
        first = code.emulator_image()
        words = [hex(a - first - 1) for a in missing]  # the address is where the call returns to
        done = subprocess.run(["addr2line", "-e", code._name, *words], capture_output=True, text=True, check=True)
        for a, line in zip(missing, done.stdout.splitlines(), strict=True):
            known[a] = Path(line.partition(" ")[0]).name
    return [known[a] for a in addresses]


@cache
def _lines_of(code: ctypes.CDLL) -> dict[int, str]:
    return {}
