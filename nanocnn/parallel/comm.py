"""Who the ranks are and how they talk: the interface `Comm`, and `Alone`, which needs no MPI. NumPy arrays only.

(Gradients on a device are summed by reducers of their own: staged.py, nccl.py.)
"""

from __future__ import annotations

import contextlib
import os
import sys
from abc import ABC, abstractmethod
from typing import Any, NoReturn

import numpy as np

from ..kernels import threads


class Comm(ABC):
    """What `Alone` and `MPI` have in common. Every method but `abort` is to be called by all ranks, in one order."""

    rank: int
    size: int
    local_rank: int  # among the ranks of this host
    local_size: int
    hosts: list[str]  # names, in the order of their first ranks
    threads: int  # of this rank, for BLAS and Numba each

    @abstractmethod
    def barrier(self) -> None:
        """Wait until all ranks are here."""

    @abstractmethod
    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        """Copy rank `root`'s values into `array`, in place, on all ranks; returns it. Any dtype but object."""

    @abstractmethod
    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        """Replace `array`, in place, by its sum over the ranks; returns it. Integers, float32 and wider."""

    @abstractmethod
    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on some rank: the same answer on all."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. Any object that pickles; meant for small ones."""

    @abstractmethod
    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        """Rank `root`'s value. Any object that pickles; meant for small ones."""

    @abstractmethod
    def abort(self, code: int = 1) -> NoReturn:
        """End all ranks at once with status `code`: no `finally` runs, nothing is saved."""

    @abstractmethod
    def describe(self) -> str:
        """One line: ranks, hosts, threads, MPI library, and what was done about the environment."""


class Alone(Comm):
    """One process. mpi4py is not imported."""

    rank = local_rank = 0
    size = local_size = 1

    def __init__(self) -> None:
        self.hosts = [os.uname().nodename]
        self.threads = threads.share()

    def barrier(self) -> None:
        pass

    def broadcast(self, array: np.ndarray, root: int = 0) -> np.ndarray:
        check_root(root, 1)
        return numpy_array(array)

    def all_reduce(self, array: np.ndarray) -> np.ndarray:
        return summable(array)

    def any(self, flag: bool) -> bool:
        return bool(flag)

    def all_gather_object(self, value: Any) -> list[Any]:
        return [value]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        check_root(root, 1)
        return value

    def abort(self, code: int = 1) -> NoReturn:
        flush()
        os._exit(code)

    def describe(self) -> str:
        return "; ".join([f"1 process, {plural(self.threads, 'thread')}", *threads.notes])


# ------------------------------------------------------------------ what can be sent


def numpy_array(array: Any) -> np.ndarray:
    if not isinstance(array, np.ndarray):
        kind = f"{type(array).__module__.partition('.')[0]}.{type(array).__name__}"
        raise TypeError(f"communication takes NumPy arrays, got {kind}: copy it to the CPU (to_device)")
    if array.dtype.hasobject:
        raise TypeError("an array of Python objects cannot be sent: use broadcast_object() or all_gather_object()")
    return array


def summable(array: Any) -> np.ndarray:
    kind, size = numpy_array(array).dtype.kind, array.dtype.itemsize
    if kind not in "iufc" or (kind == "f" and not 4 <= size <= 8):
        raise TypeError(
            f"cannot sum {array.dtype} over ranks: use integers (for bool too), float32 (for halves, too) or float64"
        )
    return array


def check_root(root: int, size: int) -> None:
    if not 0 <= root < size:
        raise ValueError(f"there is no rank {root}: the ranks are 0 to {size - 1}")


def plural(n: int, word: str) -> str:
    return f"{n} {word}{'s' * (n != 1)}"


def flush() -> None:
    with contextlib.suppress(Exception):  # a closed pipe must not keep a rank from ending
        sys.stdout.flush()
    with contextlib.suppress(Exception):
        sys.stderr.flush()
