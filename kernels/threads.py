"""How many threads, whose, and what the environment tried to do about it.

`configure()` runs before NumPy and Numba are imported, since both read the environment once. Two things are settled:

*How many.* Cores of our affinity mask (and cgroup quota) divided by the ranks on this host, for BLAS and Numba both.
Four ranks with each library's own default made a step 6.3 times slower.

*Whose turn it is.* BLAS and Numba's OpenMP run one after the other, and the workers of each by default spin for a while
after their work is done, on the very cores that the other needs now. On 2 cores, eight GEMMs and eight ReLUs in turn
took 60 ms with spinning workers and 40 ms with workers that sleep at once; so both are told to sleep.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

LOCAL_RANKS = ("MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE", "SLURM_NTASKS_PER_NODE")
AVX512_CORES = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS", "ZEN")

notes: list[str] = []  # what configure() found and did, for the line that connect() prints and for `doctor`


def cores() -> int:
    """Processors that this process may use: affinity mask and cgroup quota; at least 1."""
    mask = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        mask = min(mask, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        pass
    return max(1, mask)


def local_ranks() -> int:
    """Ranks on this host as the launcher announces them; 1 without a launcher. Open MPI's and Slurm's words included."""
    for name in LOCAL_RANKS:
        digits = re.match(r"\d+", os.environ.get(name, ""))  # Slurm may say "4(x2)"
        if digits:
            return max(1, int(digits.group()))
    return 1


def share() -> int:
    """Threads for this rank: $NANOCNN_THREADS, else $OMP_NUM_THREADS, else cores() / local_ranks()."""
    for name in ("NANOCNN_THREADS", "OMP_NUM_THREADS"):
        word = os.environ.get(name, "").partition(",")[0]
        if word.isdigit() and int(word) > 0:
            return min(int(word), cores())
    return max(1, cores() // local_ranks())


def configure() -> None:
    """Set what BLAS and Numba read at their import. Called by `nanocnn.kernels`; what it did is in `notes`."""
    notes.clear()
    if "numpy" in sys.modules:
        notes.append("NumPy was imported before nanocnn: BLAS keeps its own idle policy and core type")
    coretype = os.environ.get("OPENBLAS_CORETYPE", "")
    if coretype and coretype.upper() not in AVX512_CORES and "avx512f" in _cpu_flags():
        if os.environ.get("NANOCNN_KEEP_ENV"):
            notes.append(f"OPENBLAS_CORETYPE={coretype} keeps BLAS off this processor's AVX-512")
        else:
            del os.environ["OPENBLAS_CORETYPE"]
            notes.append(
                f"unset OPENBLAS_CORETYPE={coretype}, which keeps BLAS off AVX-512 (NANOCNN_KEEP_ENV=1 keeps it)"
            )
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")  # 2^4 cycles of spinning, then sleep
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", str(share()))
    os.environ.setdefault("NUMBA_NUM_THREADS", str(cores()))  # the most that limit() can set later


def limit(threads: int) -> None:
    """Let BLAS and Numba use `threads` threads each, from now on, in the calling thread."""
    import numba
    import threadpoolctl

    numba.set_num_threads(min(max(1, threads), numba.config.NUMBA_NUM_THREADS))
    threadpoolctl.threadpool_limits(max(1, threads))


def count() -> int:
    """Threads that Numba's parallel kernels use now."""
    import numba

    return numba.get_num_threads()


def processor() -> str:
    """The processor's name, as the system gives it."""
    import platform

    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    return set(_cpuinfo("flags").split())


def _cpuinfo(key: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), "")
