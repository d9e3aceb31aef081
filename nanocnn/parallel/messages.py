"""Sums by messages, for ranks on several hosts: one bucket at a time, or all on their way at once."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from ..buckets import Bucket
from .mpi import MPI, chunks


class AllreduceReducer:
    """Sums a bucket when it leaves, and waits for it: no overlap, whatever the switch says."""

    def __init__(self, comm: MPI, buckets: Sequence[Bucket]):
        self.comm, self.buckets = comm, buckets

    def leave(self, index: int) -> None:
        self.comm.all_reduce(self.buckets[index].grad)

    def move(self) -> None:
        pass

    def wait(self) -> None:
        pass

    def close(self) -> None:
        pass


class IallreduceReducer:
    """Starts to sum a bucket when it leaves. MPI works only while it is called, and so `move()` calls it."""

    def __init__(self, comm: MPI, buckets: Sequence[Bucket]):
        self.comm, self.buckets = comm, buckets
        self.under_way: deque[Any] = deque()

    def leave(self, index: int) -> None:
        self.under_way.extend(map(self.comm.start_all_reduce, chunks(self.buckets[index].grad)))

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
        pass
