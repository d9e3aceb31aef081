"""Sums within a host through shared memory: the fastest way there is, and without a single barrier.

All ranks' gradients live in one MPI shared-memory window, so that a rank can read the others' directly. Bucket after
bucket, each rank sums its own slice of all the ranks' copies and writes the sum into every copy: two passes over
memory, no message. What must be agreed goes through two counters of each rank in the same window:

    filled[r]   buckets that rank r has filled, ever     rank r may sum bucket k once min(filled) > k
    reduced[r]  buckets whose slice r has summed, ever   a step is over once min(reduced) has reached all its buckets

A rank never waits in between: it looks at the counters whenever a gradient arrives and sums what is ready. The order
of the summands is the order of the ranks, whoever comes first, so that equal gradients give equal bits.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import numpy as np

from ..buckets import Bucket
from .mpi import MPI

LINE = 128  # bytes: a cache line and the one that is fetched with it; no two ranks write within one
PAGE = 4096
BLOCK = 1 << 15  # elements that are summed at a time: a block of each copy and the sum stay in the cache
SHM = "/dev/shm"


class SharedMemory:
    """`nbytes` of memory for each rank of this host that all of them see: `segments` is (local_size, nbytes) uint8."""

    def __init__(self, comm: MPI, nbytes: int):
        mpi, self.nbytes = comm.mpi, -(-nbytes // PAGE) * PAGE
        self._window = mpi.Win.Allocate_shared(self.nbytes, 1, comm=comm.host)
        first, _ = self._window.Shared_query(0)
        # MPI lays the ranks' parts end to end. Each rank is the first to write to its part, so that it is near it.
        memory = mpi.buffer.fromaddress(first.address, self.nbytes * comm.local_size)
        self.segments = np.frombuffer(memory, np.uint8).reshape(comm.local_size, self.nbytes)
        self._window.Lock_all(mpi.MODE_NOCHECK)

    def sync(self) -> None:
        """A memory fence: what we wrote before it is seen by whoever sees what we write after it."""
        self._window.Sync()

    def free(self) -> None:
        """Collective over the host. No array may look into the memory any more."""
        del self.segments
        self._window.Unlock_all()
        self._window.Free()


def shortage(comm: MPI, buckets: Sequence[Bucket]) -> str:
    """Why a window for these buckets cannot be had, in words; "" if it can. The same answer on all ranks."""
    if comm.local_size < comm.size:
        return f"the ranks are on {len(comm.hosts)} hosts, and a shared-memory window spans one"
    needed = sum(_layout(buckets)) * comm.local_size
    free = comm.broadcast_object(free_bytes())
    if free < needed:  # a rank that writes beyond would die by SIGBUS, without a word
        return (
            f"{SHM} has {free >> 20} MB free of the {-(-needed >> 20)} MB that the gradients of {comm.local_size} "
            "ranks need (in a container: docker run --shm-size)"
        )
    return ""


def free_bytes() -> int:
    """What shared memory still has room for."""
    try:
        disk = os.statvfs(SHM)
    except OSError:  # not Linux
        return sys.maxsize
    return disk.f_bavail * disk.f_frsize if disk.f_blocks else sys.maxsize  # 0 blocks: no limit


class WindowReducer:
    """Moves the buckets' gradients into shared memory, and sums them there. Making it and closing it are collective."""

    def __init__(self, comm: MPI, buckets: Sequence[Bucket]):
        self.comm, self.buckets = comm, buckets
        head, *sizes = _layout(buckets)
        self.memory = SharedMemory(comm, head + sum(sizes))
        counters = self.memory.segments[:, :head].view(np.int64)
        self.filled, self.reduced = counters[:, 0], counters[:, LINE // 8]  # (ranks,) each
        self.copies: list[np.ndarray] = []  # of each bucket: (ranks, size), one row a rank
        offset = head
        for bucket, size in zip(buckets, sizes, strict=True):
            nbytes = bucket.grad.nbytes
            self.copies.append(self.memory.segments[:, offset : offset + nbytes].view(bucket.grad.dtype))
            bucket.hold_grad_in(self.copies[-1][comm.local_rank])
            offset += size
        self.filled[comm.local_rank] = self.reduced[comm.local_rank] = 0
        self.before = 0  # buckets of earlier steps
        self.left: list[int] = []  # buckets that left in this step, in order
        self.done = 0  # how many of those we have summed our slice of
        comm.barrier()

    def leave(self, index: int) -> None:
        """Bucket `index` is full here."""
        self.left.append(index)
        self.memory.sync()
        self.filled[self.comm.local_rank] = self.before + len(self.left)

    def move(self) -> None:
        """Sum our slice of each bucket that is full on all ranks; waits for nobody."""
        ready = int(self.filled.min()) - self.before
        if ready <= self.done:
            return
        self.memory.sync()
        for index in self.left[self.done : ready]:
            self._sum_slice(self.copies[index])
        self.done = ready
        self.memory.sync()
        self.reduced[self.comm.local_rank] = self.before + self.done

    def wait(self) -> None:
        """Until every bucket that left is summed, on all ranks."""
        goal = self.before + len(self.left)

        def over() -> bool:
            self.move()
            return self.reduced.min() >= goal

        self.comm.wait_until(over, "averager.finish()")
        self.memory.sync()
        self.before, self.done = goal, 0
        self.left.clear()

    def _sum_slice(self, copies: np.ndarray) -> None:
        ranks, size = copies.shape
        line = LINE // copies.itemsize
        lines = -(-size // line)
        start, stop = (lines * r // ranks * line for r in (self.comm.local_rank, self.comm.local_rank + 1))
        total = np.empty(BLOCK, copies.dtype)
        for a in range(start, min(stop, size), BLOCK):
            b = min(a + BLOCK, stop, size)
            t = np.add(copies[0, a:b], copies[1, a:b], out=total[: b - a])
            for r in range(2, ranks):
                t += copies[r, a:b]
            copies[:, a:b] = t

    def close(self) -> None:
        """Give the gradients private memory again and free the window."""
        for bucket in self.buckets:
            bucket.hold_grad_in(np.zeros_like(bucket.grad))
        del self.filled, self.reduced
        self.copies.clear()
        self.memory.free()


def _layout(buckets: Sequence[Bucket]) -> list[int]:
    """Bytes of the counters, and of each bucket with what keeps the next one on a line of its own."""
    return [2 * LINE, *(-(-bucket.data.nbytes // LINE) * LINE for bucket in buckets)]
