"""Do the kernels compute what they should? Against the reference in float64, and against the emulator."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

import nanocnn as nc
from nanocnn.kernels import dispatch
from nanocnn.kernels.cuda.emulated import counting, library
from nanocnn.kernels.cuda.launch import REALS, Kernel
from nanocnn.kernels.cuda.source import FOLDER, NARROW, REAL, SUM, signatures
from nanocnn.kernels.dispatch import Primitive, Variant, to_device, xp_of
from nanocnn.kernels.half import dtype_of
from nanocnn.kernels.narrow import HALVES, is_float
from nanocnn.ladder import in_float64, outputs
from nanocnn.precision import check
from nanocnn.traffic import on_emulator

from . import Context, Row, not_run, section

ROOT = Path(__file__).resolve().parents[2]
DTYPES = (np.float64, np.float32, np.float16)  # and bfloat16 where the device has it
# Largest difference over largest value, by what a kernel returns. Inputs are the same; sums of halves are float32.
TOLERANCES = {"bfloat16": 1.6e-2, "float16": 2e-3, "float32": 5e-5, "float64": 1e-11}
FOUND = re.compile(r"Invalid|Race reported|Error: |Program hit|SUMMARY: [1-9]")  # of compute-sanitizer's lines
FEW = 3  # calls of each variant and dtype in a quick run, of up to 84

Call = tuple[tuple, dict[str, Any]]
Calls = Callable[[np.random.Generator, Any], Sequence[Call]]


def example_calls() -> dict[str, Calls]:
    """Those of the tests (tests/cases_*.py), whose shapes are odd where they can be."""
    folder = ROOT / "tests"
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    modules = [importlib.import_module(path.stem) for path in sorted(folder.glob("cases_*.py"))]
    return {name: calls for module in modules for name, calls in getattr(module, "CASES", {}).items()}


def on_device(context: Context) -> Iterator[tuple[Primitive, Variant, str, list[tuple[Call, Call]]]]:
    """Each CUDA variant and dtype, with its calls: on the CPU, and the same on the device.

    Variants of one primitive and dtype come one after the other, and their calls on the CPU are the same objects.
    """
    cases = example_calls()
    for p in list(dispatch.primitives.values()):
        variants = [v for v in p.variants.values() if v.device == "cuda"]
        if context.sanitized:  # Numba's are no C++ of ours, and each is compiled anew
            variants = [v for v in variants if v.name != "numba_cuda"]
        for dtype in (*DTYPES, *bfloat16(context)) if variants else ():
            calls: list[Call] = [(tuple(a), k) for a, k in cases[p.name](np.random.default_rng(7), dtype)]
            for variant in variants:
                pairs = [(call, on_emulator(call, context.device)) for call in calls]  # anew: some are written to
                able = [(call, there) for call, there in pairs if variant in p.candidates(*there[0], **there[1])]
                if context.quick:
                    able = able[:: max(1, len(able) // FEW)][:FEW]
                if able:
                    yield p, variant, np.dtype(dtype).name, able


def bfloat16(context: Context) -> tuple[Any, ...]:
    """It, or nothing where the GPU, CuPy or NumPy has none; nothing under the sanitizer, which takes long."""
    if context.sanitized:
        return ()
    with nc.using(precision="bf16"):
        try:
            check(context.device)
        except (dispatch.ChoiceError, dispatch.DeviceError):
            return ()
    return (dtype_of("bf16").type,)


@contextmanager
def poisoned(xp: Any) -> Iterator[None]:
    """New memory is full of NaN, or of a number that nobody expects: what a kernel does not write is seen."""
    empty = xp.empty

    def filled(*args: Any, **kwargs: Any) -> Any:
        made = empty(*args, **kwargs)
        made.fill(np.nan if is_float(made.dtype) else 119)
        return made

    xp.empty = filled
    try:
        yield
    finally:
        xp.empty = empty


def difference(got: Sequence[np.ndarray], want: Sequence[np.ndarray]) -> float:
    """The largest over the largest value, of the worst pair, as a multiple of what its dtype is allowed.

    Integers are equal, or it is infinite.
    """
    if [a.shape for a in got] != [a.shape for a in want]:
        return np.inf
    worst = 0.0
    for a, b in zip(got, want, strict=True):
        if not is_float(a.dtype):
            worst = worst if np.array_equal(a, b) else np.inf
        elif a.size:
            allowed = max(TOLERANCES[a.dtype.name], TOLERANCES[b.dtype.name])
            a, b = a.astype(np.float64), b.astype(np.float64)
            alike = (a == b) | (np.isnan(a) & np.isnan(b))
            with np.errstate(invalid="ignore"):
                apart = np.where(alike, 0.0, np.abs(a - b))
            scale = np.abs(b[np.isfinite(b)]).max(initial=1e-30)
            worst = max(worst, float(apart.max() / scale / allowed) if np.isfinite(apart).all() else np.inf)
    return worst


@section(seconds=90)
def kernels(context: Context) -> Iterator[Row]:
    """each CUDA kernel against the reference in float64: random data, odd shapes, poisoned memory"""
    xp = xp_of(to_device(np.zeros(1), context.device))
    watched = counting if context.device == "emulated" else nullcontext  # bounds, races, barriers
    if context.sanitized:
        xp.cuda.set_allocator(None)
    elif context.on_gpu:
        start = time.perf_counter()
        built = build_for_gpu()
        yield dict(kernel=f"{built} builds of the sources, at once", seconds=time.perf_counter() - start)
    known: tuple[Any, dict[int, Any]] = None, {}  # what the reference computes of these calls
    for p, variant, dtype, pairs in on_device(context):
        if known[0] != (p.name, dtype):
            known = (p.name, dtype), {}
        row: Row = dict(kernel=f"{p.name}={variant.name}", dtype=dtype, calls=len(pairs))
        try:
            errors = []
            for call, (args, kwargs) in pairs:
                if id(call) not in known[1]:
                    known[1][id(call)] = call, outputs(p, p.variants["reference"], *in_float64(*call))
                _, want = known[1][id(call)]
                with poisoned(xp), watched():
                    errors.append(difference(outputs(p, variant, args, kwargs), want))
            yield row | dict(of_allowed=max(errors), ok=max(errors) <= 1)
        except Exception as error:
            yield row | dict(ok=False, note=f"{type(error).__name__}: {error}")


def builds() -> dict[tuple, Kernel]:
    """A kernel of each source, by the source and each set of macros that launches compile it with."""
    found: dict[tuple, Kernel] = {}
    for file in sorted(path.name for path in FOLDER.glob("*.cu")):
        for name, signature in signatures(file).items():
            kinds = {p.kind for p in signature.parameters}
            reals = [("REAL", real) for real in REALS.values()] if kinds & {REAL, SUM} else []
            halves = [("NARROW", half.cuda) for half in HALVES.values()] if NARROW in kinds else []
            for defines in [(macro,) for macro in reals or halves] or [()]:
                found.setdefault((file, defines), Kernel(file, name))
    return found


def build_emulator() -> None:
    """Compile all kernels for it at once: one after the other would take minutes."""
    with ThreadPoolExecutor() as pool:  # each waits for a compiler
        for file, defines in builds():
            if ("REAL", "double") not in defines:
                pool.submit(library, file, defines, False)


def build_for_gpu() -> int:
    """Compile all kernels at once, each as by default: NVRTC takes seconds for some. CuPy keeps them. How many."""
    with ThreadPoolExecutor() as pool:  # what cannot be compiled says so where it is used
        found = builds()
        for (_, defines), kernel in found.items():
            pool.submit(kernel._for_the_gpu, defines, 0)
    return len(found)


@section(seconds=40)
def emulator(context: Context) -> Iterator[Row]:
    """the emulator against the hardware: the same kernels on the same numbers"""
    if not context.on_gpu:
        yield not_run("emulator against hardware")
        return
    build_emulator()
    for p, variant, dtype, pairs in on_device(Context(context.device, quick=True)):
        if dtype == "float64" or variant.name == "numba_cuda":  # which would run on the GPU both times
            continue
        row: Row = dict(kernel=f"{p.name}={variant.name}", dtype=dtype, calls=len(pairs))
        try:
            errors = []
            for call, (args, kwargs) in pairs:
                want = outputs(p, variant, *on_emulator(call))
                errors.append(difference(outputs(p, variant, args, kwargs), want))
            yield row | dict(of_allowed=max(errors), ok=max(errors) <= 1)
        except Exception as error:
            yield row | dict(ok=False, note=f"{type(error).__name__}: {error}")


@section(seconds=40)
def sanitizer(context: Context) -> Iterator[Row]:
    """NVIDIA's compute-sanitizer over the section `kernels` in its short form: memcheck, racecheck"""
    if not context.on_gpu:
        yield not_run("compute-sanitizer; in `kernels`, the emulator's own checks were on")
        return
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        yield not_run("compute-sanitizer", "not on this machine: it comes with the CUDA toolkit")
        return
    with tempfile.TemporaryDirectory() as folder:
        runs = {tool: sanitized(program, tool, Path(folder, tool)) for tool in ("memcheck", "racecheck")}
        for tool, process in runs.items():  # which run beside each other
            yield told(context, tool, process, Path(folder, tool))


def sanitized(program: str, tool: str, folder: Path) -> subprocess.Popen:
    """Start the section `kernels` under a tool, with its words in a file."""
    folder.mkdir()
    script = [sys.executable, str(ROOT / "experiments" / "gpu_proof.py"), "--worker", "kernels", "--quick"]
    script += ["--device", "cuda", "--sanitized", "--out", str(folder)]
    command = [program, "--tool", tool, "--error-exitcode", "9", *script]
    with open(folder / "words", "w") as words:
        return subprocess.Popen(command, stdout=words, stderr=subprocess.STDOUT)


def told(context: Context, tool: str, process: subprocess.Popen, folder: Path) -> Row:
    """What a tool has found; if it must be ended, until then."""
    cut = ""
    try:
        process.wait(timeout=max(1.0, context.left - 3))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        cut = "ended at its limit"
    lines = [line for line in (folder / "words").read_text(errors="replace").splitlines() if line.startswith("=====")]
    found = [line.strip("= ") for line in lines if FOUND.search(line)]
    rows = folder / "kernels.jsonl"
    checks = len(rows.read_text().splitlines()) if rows.exists() else 0
    row: Row = dict(tool=tool, checks=checks)
    if found or not cut:
        row |= dict(ok=not found and process.returncode == 0 and checks > 0)
    words = found[:3] or [line.strip("= ") for line in lines[-1:]] if not row.get("ok") else []
    return row | dict(note="; ".join(filter(None, [cut, *words])))
