"""How many threads, whose, and what the environment tried to do about it.

`configure()` runs before NumPy and Numba are imported, since both read the environment once. Two things are settled:

*How many.* Cores of our affinity mask (and cgroup quota) divided by the ranks on this host, for BLAS and Numba both.
Four ranks with each library's own default made a step 6.3 times slower. A core that shows itself as two processors
(hyperthreads) counts once: one thread keeps its arithmetic busy, two share its caches.

*Whose turn it is.* BLAS and Numba's OpenMP run one after the other, and the workers of each by default spin for a while
after their work is done, on the very cores that the other needs now. On 2 cores, eight GEMMs and eight ReLUs in turn
took 60 ms with spinning workers and 40 ms with workers that sleep at once; so BLAS's are told to sleep, and OpenMP's to
spin for no longer than it takes Python to start the next kernel.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from . import environment

# MPICH, Open MPI, MVAPICH, and srun, whose word describes this job step and not the whole allocation.
LOCAL_RANKS = (
    "MPI_LOCALNRANKS",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "MV2_COMM_WORLD_LOCAL_SIZE",
    "SLURM_STEP_TASKS_PER_NODE",
)
NUMBA_CACHES = (  # where Numba keeps compiled kernels, if it can; if it can in neither, it refuses to be imported
    Path(__file__).resolve().parent / "__pycache__",
    Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "numba"),
)
CGROUP = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")
PROCESSORS = Path("/sys/devices/system/cpu")

notes: list[str] = []  # what configure() found and did, for the line that connect() prints and for `doctor`


def mask() -> list[int]:
    """The processors of our affinity mask, in order."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def quota() -> int | None:
    """Processors' worth of time that our cgroup may use (a container's `--cpus`), at least 1; None without a limit.

    A group is bound by the limits of all groups around it.
    """
    found = []
    for controller, files in (("", ["cpu.max"]), ("cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"])):  # cgroup v2, v1
        for group in _groups(controller):
            try:
                most, period = map(
                    int, " ".join((CGROUP / controller / group / name).read_text() for name in files).split()
                )
            except (OSError, ValueError):  # no such file, or "max"
                continue
            if most > 0 and period > 0:
                found.append(most / period)
    return max(1, round(min(found))) if found else None


def _groups(controller: str) -> list[PurePosixPath]:
    """Our group and those around it, as paths below the controller's folder."""
    with contextlib.suppress(OSError, ValueError):
        for line in OWN_CGROUP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                group = PurePosixPath(path.strip("/"))
                return [group, *group.parents]
    return [PurePosixPath()]


def cores() -> int:
    """Cores that this process may use: affinity mask and cgroup quota; at least 1."""
    return max(1, min(len(_cores_of(mask())), quota() or sys.maxsize))


def _cores_of(processors: Iterable[int]) -> set[str]:
    """The cores to which these processors belong, each by the list of its processors."""
    found = set()
    for number in processors:
        try:
            found.add((PROCESSORS / f"cpu{number}/topology/thread_siblings_list").read_text().strip())
        except OSError:
            found.add(str(number))
    return found


def local_ranks() -> int:
    """Ranks on this host as the launcher announces them; 1 without a launcher."""
    for name in LOCAL_RANKS:
        digits = re.match(r"\d+", os.environ.get(name, ""))  # Slurm may say "4(x2)" or "4,3"
        if digits:
            return max(1, int(digits.group()))
    return 1


def share(masks: Iterable[Iterable[int]] | None = None) -> int:
    """Threads for this rank: $NANOCNN_THREADS if it is set, else its part of the cores.

    No more than $OMP_NUM_THREADS and $OMP_THREAD_LIMIT, which OpenMP obeys.

    `masks`, the affinity masks of all ranks on this host, ours included, are known once we are connected. A rank
    divides its mask by the number of ranks that share some of it: ranks that the launcher bound to cores of their own
    use all of them, ranks that see the whole host use an equal part. Until then the launcher's word must do. Raises
    ValueError if $NANOCNN_THREADS is no positive whole number.
    """
    word = os.environ.get("NANOCNN_THREADS", "")
    if word:
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"NANOCNN_THREADS={word!r}: expected the number of threads of a rank, 1 or more")
        return int(word)
    if masks is None:
        part = cores() // local_ranks()
    else:
        ours, others = _cores_of(mask()), [_cores_of(m) for m in masks]
        part = len(ours) // max(1, sum(not ours.isdisjoint(m) for m in others))
        part = min(part, (quota() or sys.maxsize) // max(1, len(others)))
    for name in ("OMP_NUM_THREADS", "OMP_THREAD_LIMIT"):
        most = os.environ.get(name, "").partition(",")[0]
        if most.isdecimal() and int(most) > 0:
            part = min(part, int(most))
    return max(1, part)


def configure() -> None:
    """Set what BLAS and Numba read at their import. Called by `nanocnn.kernels`; what it did is in `notes`."""
    notes.clear()
    notes.extend(environment.mend(share(), cores(), _cpu_flags()))
    if "numpy" in sys.modules:
        notes.append("NumPy was imported before nanocnn, too early for BLAS to be told anything: import nanocnn first")
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles of spinning, then sleep
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # GNU's passive threads would not spin at all
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(share()))
    os.environ.setdefault("NUMBA_NUM_THREADS", str(max(cores(), share())))  # the most that limit() can set later
    os.environ.setdefault("NUMBA_THREADING_LAYER_PRIORITY", "omp tbb workqueue")
    if "NUMBA_CACHE_DIR" not in os.environ and not any(map(_can_write, NUMBA_CACHES)):
        folder = _private_folder()
        os.environ["NUMBA_CACHE_DIR"] = str(folder)
        notes.append(f"neither {' nor '.join(map(str, NUMBA_CACHES))} can be written: compiled kernels go to {folder}")


def limit(threads: int) -> None:
    """Let BLAS and Numba use `threads` threads each, from now on, in the calling thread."""
    import numba
    import threadpoolctl

    most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
    numba.set_num_threads(min(max(1, threads), most))
    threadpoolctl.threadpool_limits(max(1, threads))


def count() -> int:
    """Threads that Numba's parallel kernels use now."""
    import numba

    return numba.get_num_threads()


def processor() -> str:
    """The processor's name, as the system gives it."""
    import platform

    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _can_write(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _private_folder() -> Path:
    """A folder for temporary files that is ours alone: the same one each time, unless somebody else took its name."""
    folder = Path(tempfile.gettempdir(), f"nanocnn-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    state = folder.lstat()
    if stat.S_ISDIR(state.st_mode) and state.st_uid == os.getuid() and not state.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="nanocnn-"))


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
