"""The ranks of an MPI job.

Every call that waits for other ranks waits here, in `MPI.wait_until`, by polling. It yields the core between two looks,
for with more ranks than cores a rank that spins steals the core of the one it waits for (4 ranks on 2 cores: a barrier
takes 5 ms spinning and 20 us yielding). Python's signal handlers run, and a rank that waits in vain finds out.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ..kernels import threads
from .comm import Comm, check_root, flush, numpy_array, plural, summable

CHUNK_BYTES = 4 << 20  # 1 to 4 MB is where an all-reduce within a host is fastest; counts stay far below 2^31
YIELDS = 1000  # looks, about a millisecond, before a rank naps in between: 4 ranks' steps on 2 cores became 5 % faster
NAP = 5e-5  # seconds; a nap from the start would make an all-reduce of 4 MB half as slow again
GRACE = 2.0  # seconds that a rank may still wait for one that has ended, in case its last message is on the way
LEFT = 1  # tag of the message "I have ended"

_yield = getattr(os, "sched_yield", lambda: time.sleep(0))


class MPI(Comm):
    """The ranks of MPI.COMM_WORLD. `mpi` is the module `mpi4py.MPI`."""

    def __init__(self, mpi: Any):
        self.mpi = mpi
        self.world = mpi.COMM_WORLD.Dup()  # our messages, apart from those of anybody else
        self.host = self.world.Split_type(mpi.COMM_TYPE_SHARED)
        self.rank, self.size = self.world.rank, self.world.size
        self.local_rank, self.local_size = self.host.rank, self.host.size
        self._suspect_since: float | None = None
        self._at_leave: list[Callable[[], None]] = []
        leader = self.leader = self.host.bcast(self.rank)  # the first rank here: hosts may bear one name (containers)
        facts = self.all_gather_object((leader, mpi.Get_processor_name(), threads.mask()))
        self.hosts = list({who: name for who, name, _ in facts}.values())
        self.threads = threads.share([mask for who, _, mask in facts if who == leader])
        threads.limit(self.threads)
        self._all_threads = self.all_gather_object(self.threads)
        _unlink_segment()
        atexit.register(self._leave)

    # ---------------------------------------------------------------- waiting

    def wait_until(self, done: Callable[[], Any], doing: str) -> None:
        """Poll `done()` until it is true, yielding the core. Aborts the job if a rank that we wait for has ended."""
        for looks in itertools.count(1):
            if done():
                self._suspect_since = None
                return
            if looks < YIELDS:
                _yield()
            else:
                time.sleep(NAP)
            if looks % YIELDS == 0:
                self._look_for_leavers(doing)

    def _look_for_leavers(self, doing: str) -> None:
        status = self.mpi.Status()
        if not self.world.Iprobe(self.mpi.ANY_SOURCE, LEFT, status):
            return
        now = time.monotonic()
        if self._suspect_since is None:
            self._suspect_since = now
        elif now - self._suspect_since > GRACE:
            sys.stderr.write(
                f"rank {self.rank}: rank {status.source} has ended (sys.exit? one step fewer?) while this rank waits "
                f"for it in {doing}\n"
            )
            self.abort(1)

    def at_leave(self, close: Callable[[], None]) -> Callable[[], None]:
        """Call `close()`, which may be collective, when all ranks are about to end; the last registered goes first.

        Returns what withdraws it.
        """
        self._at_leave.append(close)
        return lambda: self._at_leave.remove(close) if close in self._at_leave else None

    def _leave(self) -> None:
        """Say that we have ended, and wait for the others to say so: asleep, while MPI_Finalize would spin.

        That is also why no rank can hang in a collective call that another one, which called `sys.exit()`, never makes.
        """
        if self.mpi.Is_finalized():
            return
        flush()
        others = [r for r in range(self.size) if r != self.rank]
        nothing = np.empty(0, np.uint8)
        requests = [self.world.Isend(nothing, r, LEFT) for r in others]
        requests += [self.world.Irecv(nothing, r, LEFT) for r in others]
        while not self.mpi.Request.Testall(requests):
            time.sleep(0.002)
        for close in self._at_leave[::-1]:
            close()

    def abort(self, code: int = 1) -> NoReturn:
        flush()
        time.sleep(0.2)  # for the launcher to pass on what was just said: it drops what is still in its pipes
        self.mpi.COMM_WORLD.Abort(code)
        time.sleep(1)  # MPICH's may return, and the launcher's signal come a little later
        os._exit(code)

    # ---------------------------------------------------------------- arrays

    def barrier(self) -> None:
        self.wait_until(self.world.Ibarrier().Test, "barrier")

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        check_root(root, self.size)
        with _flat(numpy_array(array)) as flat:
            for chunk in chunks(flat.view(np.uint8)):
                self.wait_until(self.world.Ibcast(chunk, root).Test, "broadcast")
        return array

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        with _flat(summable(array)) as flat:
            for chunk in chunks(flat):
                self.wait_until(self.world.Iallreduce(self.mpi.IN_PLACE, chunk).Test, "all_reduce")
        return array

    def any(self, flag: bool) -> bool:
        return bool(self.all_reduce(np.array([bool(flag)], np.int32))[0])

    # ---------------------------------------------------------------- objects

    def all_gather_object(self, value: Any) -> list[Any]:
        mine = np.frombuffer(pickle.dumps(value), np.uint8)
        sizes = np.zeros(self.size, np.int64)
        self.wait_until(self.world.Iallgather(np.array([mine.size]), sizes).Test, "all_gather_object")
        everything = np.empty(sizes.sum(), np.uint8)
        request = self.world.Iallgatherv(mine, [everything, sizes])
        self.wait_until(request.Test, "all_gather_object")
        return [pickle.loads(part.data) for part in np.split(everything, np.cumsum(sizes)[:-1])]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        check_root(root, self.size)
        word = np.frombuffer(pickle.dumps(value), np.uint8).copy() if self.rank == root else np.empty(0, np.uint8)
        size = self.broadcast(np.array([word.size]), root)[0]
        if self.rank != root:
            word = np.empty(size, np.uint8)
        return pickle.loads(self.broadcast(word, root).data)

    def describe(self) -> str:
        least, most = min(self._all_threads), max(self._all_threads)
        each = f"{plural(most, 'thread')} each" if least == most else f"{least} to {most} threads each"
        where = f"on {plural(len(self.hosts), 'host')} ({', '.join(self.hosts)})"
        words = [f"{plural(self.size, 'rank')} {where}, {each}, {library(self.mpi)}", *threads.notes]
        if len(threads.mask()) == 1 and (os.cpu_count() or 1) > self.local_size:
            words.append(f"bound to 1 of {os.cpu_count()} processors by the launcher (mpiexec --bind-to none lifts it)")
        return "; ".join(words)


def library(mpi: Any) -> str:
    """The MPI library's name and version: `MPICH 5.0.2`, `Open MPI v5.0.8`."""
    line = mpi.Get_library_version().partition("\n")[0].partition(",")[0]
    return " ".join(line.replace("Version:", "").split())


def _unlink_segment() -> None:
    """Remove the names of the memory that MPICH shares, as its MPI_Finalize will: all ranks here hold it by now.

    A job that is killed or aborted never comes to MPI_Finalize, and each would leave a megabyte a rank in /dev/shm.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            path = line.split()[-1]
            if path.startswith("/dev/shm/mpich_shm_"):
                Path(path).unlink(missing_ok=True)


def chunks(flat: np.ndarray) -> Iterator[np.ndarray]:
    """A one-dimensional array in pieces of CHUNK_BYTES."""
    step = CHUNK_BYTES // flat.itemsize
    return (flat[i : i + step] for i in range(0, flat.size, step))


@contextlib.contextmanager
def _flat(array: np.ndarray) -> Iterator[np.ndarray]:
    """`array` as a contiguous one-dimensional array; where that is a copy, it is written back."""
    flat = np.ascontiguousarray(array).reshape(-1)
    yield flat
    if not np.may_share_memory(flat, array):
        array[...] = flat.reshape(array.shape)
