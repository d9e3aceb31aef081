"""What the environment tells BLAS, OpenMP and Numba that would make us slow, and what is done about it.

Clusters, containers and other programs export such words, for reasons that are not ours. Each library reads its own
once, when it is loaded; so they are mended before, and each is named with what was done. NANOCNN_KEEP_ENV=1 keeps all.

| on 2 cores, AlexNet, batch 128     | ms a step |                            |     |
| ---------------------------------- | --------: | -------------------------- | --: |
| as mended                          |       113 | OMP_DYNAMIC=true           | 148 |
| OMP_WAIT_POLICY=active             |       187 | OMP_THREAD_LIMIT=1         | 148 |
| OPENBLAS_THREAD_TIMEOUT=26 (usual) |       129 | NUMBA_NUM_THREADS=1        | 134 |

OMP_PROC_BIND=true ties the main thread to one core as soon as OpenMP is loaded. What that thread starts later, such as
the thread that loads images, is tied to the same core, and so is the first thread of every other rank.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Set
from pathlib import Path

AVX512_CORES = ("SKYLAKEX", "COOPERLAKE", "SAPPHIRERAPIDS", "ZEN")
BLAS_THREADS = ("OPENBLAS_NUM_THREADS", "GOTO_NUM_THREADS", "MKL_NUM_THREADS", "BLIS_NUM_THREADS")
BINDINGS = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
NO_BINDING = ("", "none", "false", "disabled")


def mend(threads: int, cores: int, flags: Set[str]) -> list[str]:
    """Change what is wrong for a rank of so many `threads` on so many `cores`; what was found and done, a line each.

    `flags`: the processor's instruction sets.
    """
    notes: list[str] = []

    def trap(name: str, reader: str, wrong: bool, why: str, instead: str | None = None) -> None:
        if not wrong:
            return
        was = os.environ[name]
        if os.environ.get("NANOCNN_KEEP_ENV"):
            notes.append(f"{name}={was} {why}")
        elif _is_loaded(reader):
            notes.append(f"{name}={was} {why}, and it is too late to change it: import nanocnn first")
        elif instead is None:
            del os.environ[name]
            notes.append(f"unset {name}={was}, which {why} (NANOCNN_KEEP_ENV=1 keeps it)")
        else:
            os.environ[name] = instead
            notes.append(f"set {name}={instead}, since {was} {why} (NANOCNN_KEEP_ENV=1 keeps it)")

    core = _word("OPENBLAS_CORETYPE").upper()
    narrow = bool(core) and core not in AVX512_CORES and "avx512f" in flags
    trap("OPENBLAS_CORETYPE", "BLAS", narrow, "keeps BLAS off this processor's AVX-512")
    spins = (_number("OPENBLAS_THREAD_TIMEOUT") or 0) > 10
    trap("OPENBLAS_THREAD_TIMEOUT", "BLAS", spins, "lets idle threads of BLAS hold the cores that kernels need", "4")
    for name in BLAS_THREADS:  # in time or not: threads.limit() has the last word
        if _word(name) not in ("", str(threads)) and not os.environ.get("NANOCNN_KEEP_ENV"):
            notes.append(f"{name}={_word(name)} is not this rank's share of the cores: BLAS takes {threads}")
            os.environ[name] = str(threads)

    spins = _word("OMP_WAIT_POLICY") == "active"
    trap("OMP_WAIT_POLICY", "OpenMP", spins, "lets idle threads of kernels hold the cores that BLAS needs", "passive")
    for name in BINDINGS:
        trap(name, "OpenMP", _word(name) not in NO_BINDING, "ties BLAS, loader and other ranks to the same core")
    fewer = _word("OMP_DYNAMIC") in ("true", "1")
    trap("OMP_DYNAMIC", "OpenMP", fewer, "lets OpenMP start fewer threads than are asked for")
    if (_number("OMP_NUM_THREADS") or 0) > cores:
        notes.append(f"OMP_NUM_THREADS={_word('OMP_NUM_THREADS')} is more than the cores that we may use: {cores}")

    most = max(cores, threads)
    wrong = bool(_word("NUMBA_NUM_THREADS")) and not threads <= (_number("NUMBA_NUM_THREADS") or 0) <= most
    trap("NUMBA_NUM_THREADS", "Numba", wrong, f"does not fit {threads} threads on {cores} cores", str(most))
    unsafe = _word("NUMBA_THREADING_LAYER") == "workqueue"
    trap("NUMBA_THREADING_LAYER", "Numba", unsafe, "ends the process when two threads start kernels at once")
    return notes


def _word(name: str) -> str:
    return os.environ.get(name, "").strip().lower()


def _number(name: str) -> int | None:
    """The first whole number of a list such as "4,2"."""
    first = _word(name).partition(",")[0]
    return int(first) if first.isdecimal() else None


def _is_loaded(reader: str) -> bool:
    """Has it read its words already?"""
    if reader == "OpenMP":
        try:
            return bool(re.search(r"/lib[gi]?omp\d?\b", Path("/proc/self/maps").read_text()))
        except OSError:
            return "numba" in sys.modules
    return {"BLAS": "numpy", "Numba": "numba"}[reader] in sys.modules
