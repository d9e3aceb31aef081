"""Sums of gradients by NCCL, NVIDIA's library: from GPU to GPU, past the host, on a stream beside backward.

Each rank has a GPU of its own; MPI only tells the ranks how to find each other. This file was never run: it needs
several GPUs. Its calls are those of CuPy 14, and a test makes them on a stand-in.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ..buckets import Bucket
from .mpi import MPI

TYPES = {"float16": "NCCL_FLOAT16", "float32": "NCCL_FLOAT32", "float64": "NCCL_FLOAT64"}


def obstacle(comm: MPI) -> str:
    """Why NCCL cannot sum over these ranks, in words; "" if it can. The same answer on all ranks."""
    everybody = comm.all_gather_object(_own(comm))
    lacking = next((why for _, why in everybody if why), "")
    if lacking:
        return lacking
    gpus = [gpu for gpu, _ in everybody]
    shared = next((gpu for gpu in gpus if gpus.count(gpu) > 1), None)
    if shared:
        ranks = ", ".join(str(rank) for rank, gpu in enumerate(gpus) if gpu == shared)
        return f"ranks {ranks} share a GPU, and NCCL wants one each"
    return ""


def _own(comm: MPI) -> tuple[tuple[int, str], str]:
    """This rank's GPU, as no other has it, and what it lacks."""
    import cupy

    with warnings.catch_warnings(action="ignore"):  # CuPy's, which are said below
        from cupy.cuda import nccl
    major = cupy.cuda.runtime.runtimeGetVersion() // 1000
    why = "" if nccl.available else f"CuPy finds no NCCL (pip install nvidia-nccl-cu{major})"
    return (comm.leader, cupy.cuda.Device().pci_bus_id), why


class NcclReducer:
    """Puts the sum of a bucket into a stream when it leaves. Making it is collective."""

    def __init__(self, comm: MPI, buckets: Sequence[Bucket]):
        import cupy
        from cupy.cuda import nccl

        self.comm, self.buckets, self.library = comm, buckets, nccl
        name = comm.broadcast_object(nccl.get_unique_id() if comm.rank == 0 else None)
        self.ranks = nccl.NcclCommunicator(comm.size, name, comm.rank)
        self.stream = cupy.cuda.Stream(non_blocking=True)

    def leave(self, index: int) -> None:
        import cupy

        grad = self.buckets[index].grad
        if grad.size:
            self.stream.wait_event(cupy.cuda.get_current_stream().record())
            kind = getattr(self.library, TYPES[grad.dtype.name])
            place, total = grad.data.ptr, self.library.NCCL_SUM
            self.ranks.allReduce(place, place, grad.size, kind, total, self.stream.ptr)

    def move(self) -> None:
        """The GPUs move by themselves."""

    def wait(self) -> None:
        """Until the sums are there: the host waits, for so a rank finds out that it waits for one that has ended.

        It waits for backward, too, which the sums wait for: the time counts as communication and is mostly none.
        """
        import cupy

        over: Any = self.stream.record()
        self.comm.wait_until(lambda: over.done, "averager.finish()")
        cupy.cuda.get_current_stream().wait_event(over)

    def close(self) -> None:
        self.ranks.destroy()
