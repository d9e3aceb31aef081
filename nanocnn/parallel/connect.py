"""`connect()`: which ranks there are, found out once."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from . import gpu
from .comm import Alone, Comm
from .failure import install_hooks
from .launcher import OPEN_MPI, Launch, launched
from .mpi import MPI, library


class ConnectError(RuntimeError):
    """A launcher started us, but its ranks cannot find each other; the message says what to install or to use."""


_comm: Comm | None = None


def connect(quiet: bool = False, device: str = "cpu") -> Comm:
    """The ranks of this job; the first call connects, later ones return the same. Prints one line on rank 0.

    Alone unless a launcher (mpiexec, srun) started us. Otherwise this also sets the threads of this rank and lets an
    uncaught exception on any rank end the job. With `device="cuda"` the rank's GPU becomes the current one, and each
    rank says which; DeviceError if there is none. Raises ConnectError if mpi4py or an MPI library is missing, or if
    the launcher belongs to another MPI than mpi4py's.
    """
    global _comm
    if _comm is None:
        launch = launched()
        if launch is None:
            _comm = Alone()
        else:
            _comm = MPI(_import_mpi(launch))
            install_hooks(_comm)
        if _comm.rank == 0 and not quiet:
            print(_comm.describe(), flush=True)
    if device == "cuda":
        words = gpu.pick(_comm)
        if not quiet:
            print(words, flush=True)
    return _comm


def _import_mpi(launch: Launch) -> Any:
    who = f"this process was started by {launch.by}" + (f" as one of {launch.size}" if launch.size else "")
    try:
        import mpi4py

        if "mpi4py.MPI" not in sys.modules:  # else it is running already
            mpi4py.rc.initialize, mpi4py.rc.finalize = False, True  # we start it, mpi4py ends it
        from mpi4py import MPI as mpi
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is an mpi4py, but no MPI library
        raise ConnectError(
            f"{who}, but MPI cannot be used: {error}. Install it with pip install 'nanocnn[mpi]' (on a cluster, "
            "mpi4py alone for the cluster's own MPI), or run without a launcher"
        ) from None
    # MPICH, started by Open MPI's launcher, would end the process in MPI_Init; the other way round, each rank is alone.
    strange = launch.by == OPEN_MPI and "Open MPI" not in mpi.Get_library_version()
    if not strange and not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
    if strange or ((launch.size or 1) > 1 and mpi.COMM_WORLD.size == 1):
        beside = Path(sys.executable).parent / "mpiexec"
        raise ConnectError(
            f"{who}, but finds itself alone in MPI: the launcher belongs to another MPI than mpi4py's {library(mpi)}. "
            + (f"Start it with {beside}" if beside.exists() else "Use the launcher of that MPI")
            + ", or reinstall mpi4py for the launcher's MPI (with srun, see srun --mpi=list)"
        )
    return mpi
