"""Sums by messages, for ranks on several hosts: one bucket at a time, or all on their way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..buckets import Bucket
from .mpi import MPI, chunks


class IallreduceReducer:
    """Starts to sum a bucket when it leaves. MPI works only while it is called, and so `move()` calls it."""

    def __init__(self, comm: MPI, buckets: Sequence[Bucket]):
        self.comm, self.buckets = comm, buckets
        # A communicator of its own: a rank may still have buckets to send when another is in the script's next call.
        self.world = comm.world.Dup()
        self.under_way: deque[Any] = deque()

    def leave(self, index: int) -> None:
        for chunk in chunks(self.buckets[index].grad):
            self.under_way.append(self.world.Iallreduce(self.comm.mpi.IN_PLACE, chunk))

    def move(self) -> None:
        """One look at the oldest message moves them all; those that have arrived are forgotten."""
        while self.under_way and self.under_way[0].Test():
            self.under_way.popleft()

    def wait(self) -> None:
        def over() -> bool:
            self.move()
            return not self.under_way

        self.comm.wait_until(over, "averager.finish()")

    def close(self) -> None:
        self.world.Free()


class AllreduceReducer(IallreduceReducer):
    """Sums a bucket when it leaves, and waits for it: one message at a time, and nothing overlaps."""

    def leave(self, index: int) -> None:
        for chunk in chunks(self.buckets[index].grad):
            self.under_way.append(self.world.Iallreduce(self.comm.mpi.IN_PLACE, chunk))
            self.wait()
