"""Were we started by an MPI launcher? The environment says so, without importing any MPI."""

from __future__ import annotations

import os
from typing import NamedTuple

OPEN_MPI = "Open MPI's mpiexec"
# (launcher, variable with the number of ranks, variable with ours)
LAUNCHERS = (
    ("mpiexec (PMI)", "PMI_SIZE", "PMI_RANK"),
    (OPEN_MPI, "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("MVAPICH's launcher", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
)


class Launch(NamedTuple):
    """Who started us, as rank `rank` of `size`; None where the launcher does not say."""

    by: str
    size: int | None
    rank: int | None


def launched() -> Launch | None:
    """The launcher's word, or None if there was no launcher: a plain `python script.py`."""
    for by, size, rank in LAUNCHERS:
        if os.environ.get(size):
            return Launch(by, _number(size), _number(rank))
    # A shell that srun started for us to type in is a job step of one task: one task is no parallel run.
    tasks = _number("SLURM_STEP_NUM_TASKS") if os.environ.get("SLURM_STEP_ID") else None
    if tasks is not None and tasks > 1:
        return Launch("srun", tasks, _number("SLURM_PROCID"))
    if os.environ.get("PMIX_RANK"):
        return Launch("a PMIx launcher", tasks, _number("PMIX_RANK"))
    return None


def _number(name: str) -> int | None:
    word = os.environ.get(name, "")
    return int(word) if word.isdecimal() else None
