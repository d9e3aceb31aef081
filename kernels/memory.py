"""The array pool: a large array is made of memory that an earlier array has used up.

A fresh one is paid for when it is first written: at every page that is touched the system stops the program, finds
memory and fills it with zeros that nobody wants. That is a tenth of PyTorch's AlexNet step (191 ms, and 170 with huge
pages). NumPy asks for huge pages too, but gives the memory back with each array and begins anew at each step.

Here memory comes from the system in regions of a gigabyte of addresses, on huge pages, and stays. A region is cut into
extents. An array takes the smallest extent that is large enough and leaves the rest of it; an extent that comes back
merges with its neighbours. So a step finds in the memory of the last one whatever sizes it needs, in any order. How an
extent comes back: the array's base is a `Loan`, which every view of the array keeps alive, and which returns the
extent when it dies.

Measured on 2 cores, the outputs of ResNet-18 at batch 128 written and freed in a network's order: 157 ms a step with
NumPy's allocation, 69 ms with the pool, in the same memory. A ResNet-18 step: 760 and 598 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import os
import threading
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any

import numpy as np

from . import threads
from .caches import L3
from .dispatch import Switch, aside
from .narrow import HALVES

pool = Switch(
    "pool",
    "where large arrays come from",
    on="memory that is reused, on huge pages",
    off="NumPy's own allocation: fresh pages at every step",
)

streaming = Switch(
    "streaming",
    "how a result larger than half of the L3 cache is written",
    on="past the caches: its lines are not read first",
    off="through the caches, as everything else",
)

SMALL = 128 << 10  # bytes; below it the C library reuses memory itself, and faster than we do
PAGE = mmap.PAGESIZE
HUGE = 2 << 20  # bytes of a huge page
REGION = 1 << 30  # addresses; memory comes to them huge page by huge page, when they are first written
SPARE = 32 << 20  # bytes; see spare()
LINE = 64  # bytes of a cache line, and of the widest vector
NUMBERS = "biufc"  # kinds of dtypes that the array interface describes in full


class _Extents:
    """Ranges of addresses, neighbours merged."""

    def __init__(self) -> None:
        self.total = 0
        self.sizes: list[tuple[int, int]] = []  # (bytes, first address), sorted
        self.size_at: dict[int, int] = {}  # first address -> bytes
        self.start_of: dict[int, int] = {}  # address after the last -> first address

    def give(self, start: int, size: int) -> None:
        """Add the range of `size` bytes at `start`."""
        self.total += size
        end = start + size
        before = self.start_of.get(start)
        if before is not None:
            size += self._remove(before)
            start = before
        if end in self.size_at:
            size += self._remove(end)
        self._add(start, size)

    def take(self, size: int) -> int | None:
        """Cut `size` bytes off the smallest range that has them, and return where they begin; None if none has."""
        place = bisect_left(self.sizes, (size, 0))
        if place == len(self.sizes):
            return None
        start = self.sizes[place][1]
        rest = self._remove(start) - size
        if rest:
            self._add(start + size, rest)
        self.total -= size
        return start

    def take_largest(self) -> tuple[int, int]:
        """Remove the largest range and return (first address, bytes)."""
        size, start = self.sizes[-1]
        self.total -= self._remove(start)
        return start, size

    def _add(self, start: int, size: int) -> None:
        insort(self.sizes, (size, start))
        self.size_at[start], self.start_of[start + size] = size, start

    def _remove(self, start: int) -> int:
        size = self.size_at.pop(start)
        del self.start_of[start + size], self.sizes[bisect_left(self.sizes, (size, start))]
        return size


_lock = threading.Lock()
_regions: list[Any] = []  # kept for ever: an address that was ours once is never anybody else's
_warm = _Extents()  # idle, and in memory
_cold = _Extents()  # addresses without memory: never used, or given back by trim()
_held = _peak = 0  # bytes in memory: in use, or idle

# Extents that came back, by size, not merged yet: the next array of that size takes the last one, which the caches
# still know best. Lists are appended to and popped without the lock: a loan may die at any moment, even while this very
# thread holds the lock, since the garbage collector runs when it likes.
_recent: dict[int, list[int]] = {}


class Loan:
    """The base of a pooled array: NumPy reads what it describes, and every view of the array keeps it alive."""

    __slots__ = ("__array_interface__", "home", "start")

    def __init__(self, start: int, home: list[int], shape: tuple[int, ...], dtype: np.dtype):
        self.start, self.home = start, home
        self.__array_interface__ = {"version": 3, "shape": shape, "typestr": dtype.str, "data": (start, False)}

    def __del__(self) -> None:
        self.home.append(self.start)


def empty(shape: Any, dtype: Any) -> np.ndarray:
    """An uninitialised C-ordered array of `shape`; where the pool gives it, it begins on a page."""
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size = math.prod(shape) * dtype.itemsize
    if size < SMALL or not (dtype.kind in NUMBERS or dtype in HALVES) or pool.value == "off":
        return np.empty(shape, dtype)
    size = -(-size // PAGE) * PAGE
    home = _recent.get(size)
    if home is None:
        home = _recent.setdefault(size, [])
    try:
        start = home.pop()
    except IndexError:
        # Nobody waits for the lock. Its holder may be this very thread, interrupted by the garbage collector, or one in
        # which that closes a generator that waits for this thread: neither would ever let go.
        if not _lock.acquire(blocking=False):
            return np.empty(shape, dtype)
        try:
            start = _find(size)
        finally:
            _lock.release()
    loan = Loan(start, home, shape, dtype)
    if _watch is not None:
        _watch.add(loan)
    made = np.asarray(loan)
    return made if made.dtype == dtype else made.view(dtype)  # for bfloat16 the array interface has no word


def address(x: np.ndarray) -> int:
    """Of the first byte of `x`."""
    return x.__array_interface__["data"][0]


def into(out: np.ndarray | None, shape: Any, dtype: Any) -> np.ndarray:
    """`out`, where the caller has brought memory for a result of that shape and dtype; else new memory.

    Raises ValueError on memory that does not fit, or that is not C-contiguous: a reshaped copy would be filled instead.
    """
    if out is None:
        return empty(shape, dtype)
    if out.shape != tuple(shape) or out.dtype != dtype or not out.flags.c_contiguous:
        order = "" if out.flags.c_contiguous else " that is not C-contiguous"
        raise ValueError(
            f"out is {out.dtype}{list(out.shape)}{order}: expected C-contiguous {np.dtype(dtype)}{list(shape)}"
        )
    return out


def empty_like(x: np.ndarray) -> np.ndarray:
    """An uninitialised C-ordered array of the shape and dtype of `x`."""
    return empty(x.shape, x.dtype)


_own = threading.local()


def scratch(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An uninitialised array of `shape` in this thread's scratch memory; it begins on a cache line.

    The next call overwrites it: use it up before calling anything that may ask for scratch memory too. A kernel whose
    threads each need some asks for (threads, n), with n in whole cache lines, so that no two threads share one.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    buffer = getattr(_own, "buffer", None)
    if buffer is None or buffer.size < size:
        _own.buffer = None  # the old one can be part of the new one
        raw = empty(size + LINE, np.uint8)
        buffer = _own.buffer = raw[-address(raw) % LINE :][:size]
    return np.ndarray(shape, dtype, buffer)


class Lent:
    """What the pool has lent in a while, numbered. It keeps no loan alive."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()  # of others' arrays it takes no note
        self.sizes: list[int] = []  # bytes, by number
        self._number: dict[int, int] = {}  # by the id of a loan: of several that had it one after the other, the last

    def add(self, loan: Loan) -> None:
        if threading.get_ident() != self.thread:
            return
        described: Any = loan.__array_interface__
        self._number[id(loan)] = len(self.sizes)
        self.sizes.append(math.prod(described["shape"]) * np.dtype(described["typestr"]).itemsize)

    def find(self, x: np.ndarray) -> tuple[int, int] | None:
        """The number of the loan that holds the memory of `x`, and how many bytes further in it begins; or None."""
        loan: Any = x
        while isinstance(loan, np.ndarray):
            loan = loan.base
        number = self._number.get(id(loan)) if isinstance(loan, Loan) else None
        return None if number is None else (number, address(x) - loan.start)


_watch: Lent | None = None


@contextlib.contextmanager
def watched() -> Iterator[Lent]:
    """What the pool lends inside. For nanocnn.capture.

    This thread's scratch memory begins anew, and again afterwards: what was called inside keeps its own.
    """
    global _watch
    _own.buffer, _watch = None, Lent()
    try:
        yield _watch
    finally:
        _own.buffer = _watch = None


def spare(peak: int) -> int:
    """Bytes that the pool may hold beyond the `peak` of what its arrays took at once."""
    return max(SPARE, peak // 8)


def held() -> dict[str, int]:
    """Bytes: `in_use` by arrays, `idle`, and `peak`, the most that was in use at once."""
    with _lock:
        _merge()
        return dict(in_use=_held - _warm.total, idle=_warm.total, peak=_peak)


def trim(keep: int = 0) -> None:
    """Give idle memory beyond `keep` bytes back to the system."""
    with _lock:
        _merge()
        _cool(keep)


# ------------------------------------------------------------------ with the lock held


def _find(size: int) -> int:
    """The first address of `size` bytes that are nobody's: of idle memory where it can be, else of fresh memory.

    Idle memory that lies in pieces too small is given back for it, so that the pool holds little more than its arrays
    once took at the same time. After a step or two the pieces fit, and nothing is fresh any more; `spare` is for that.
    (Without it, AlexNet gave back and took the same 27 MB at every step: 3 of 106 ms, and more by the hour.)
    """
    global _held, _peak
    _merge()
    start = _warm.take(size)
    if start is None:
        used = _held - _warm.total + size
        _peak = max(_peak, used)
        _cool(min(_peak + spare(_peak) - used, _most_idle()))
        start = _cold.take(size)
        if start is None:
            start, room = _new_region(size)
            if room > size:
                _cold.give(start + size, room - size)
        _held += size
    return start


def _merge() -> None:
    """Join what came back with its neighbours."""
    for size, home in list(_recent.items()):
        if not home:  # most of them are
            continue
        with contextlib.suppress(IndexError):  # until there is nothing left; another thread may take the last one
            while True:
                _warm.give(home.pop(), size)


def _cool(keep: int) -> None:
    """Give idle memory back, the largest extents first, until no more than `keep` bytes are left."""
    global _held
    while _warm.total > keep:
        start, size = _warm.take_largest()
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
        _cold.give(start, size)
        _held -= size


def _new_region(size: int) -> tuple[int, int]:
    """Addresses for at least `size` bytes, from a whole huge page on, and how many bytes they have room for."""
    for room in (max(REGION, size), size):  # a limit on addresses (ulimit -v) may forbid the first
        with contextlib.suppress(OSError):
            # Private, for MAP_SHARED, the default of mmap, gets no huge pages.
            region = mmap.mmap(-1, room + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            break
    else:
        raise MemoryError(f"the system gives no room for an array of {size:,} bytes")
    with contextlib.suppress(AttributeError, OSError):  # a system without huge pages does without
        region.madvise(mmap.MADV_HUGEPAGE)
    _regions.append(region)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    return -(-start // HUGE) * HUGE, room


@functools.cache
def _most_idle() -> int:
    """How much may lie idle: half the machine's memory (or the container's), shared with the other ranks here."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup v2, v1
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            most = min(most, int((threads.CGROUP / name).read_text()))
    return most // 2 // threads.local_ranks()


if hasattr(os, "register_at_fork"):  # a child must find the books in order, and a lock that somebody will release
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def past_caches(y: np.ndarray) -> bool:
    """Whether `y` is better written past the caches (simd.stream): too large to be found there, and aligned for it."""
    return y.nbytes >= L3 // 2 and address(y) % LINE == 0 and streaming.value == "on"


class _Alias:
    """The memory of an array that may not be written to, as one that may."""

    __slots__ = ("__array_interface__", "x")

    def __init__(self, x: np.ndarray):
        self.x = x if x.base is None else x.base  # what owns the memory: a view of it may die (see constant.py)
        self.__array_interface__ = {**x.__array_interface__, "data": (address(x), False)}


def clear(x):
    """Zeros into all of `x`."""
    aside(np.copyto, x, x.dtype.type(0))


def _copy(x):
    return np.array(x, order="C")


def contiguous(x):
    """`x` itself if it is C-contiguous and aligned to its dtype, else a copy that is: what vector code needs.

    Of an array that may not be written to, an alias: Numba would compile each kernel once more for it, and none of them
    writes to its inputs.
    """
    if not (x.flags.c_contiguous and x.flags.aligned):
        return aside(_copy, x)
    return x if x.flags.writeable else np.asarray(_Alias(x))
