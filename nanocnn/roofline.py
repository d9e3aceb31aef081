"""What this machine can do at most, measured, and a picture of kernels under that roof.

A kernel that does I operations for each byte that it must move can run no faster than min(peak, I x bandwidth)
(Williams, Waterman & Patterson 2009). Left of the ridge, where the two meet, memory is the limit; right of it,
arithmetic.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange

from .kernels import memory, threads
from .kernels.caches import L3
from .kernels.simd import ISA, REGISTERS, fma, load, store, unrolled
from .ladder import Result

ACCUMULATORS = REGISTERS - 4  # each waits for its own last result alone, so that many are under way at once
STEPS = 1 << 16  # multiply-adds of each accumulator in one run: some 0.5 ms
SECONDS = 0.4  # of runs, of which the best counts: a peak is what can be had, not what is usual


@dataclass(frozen=True)
class Peaks:
    """The roof at one thread count: `gflops` (10^9 operations a second), `bandwidth` (10^9 bytes a second, triad)."""

    gflops: float
    bandwidth: float
    threads: int
    dtype: str
    isa: str

    def roof(self, intensity: float) -> float:
        """GFLOP/s that a kernel with `intensity` operations a byte can reach."""
        return min(self.gflops, intensity * self.bandwidth)

    @property
    def ridge(self) -> float:
        """Operations a byte at which memory and arithmetic take equally long."""
        return self.gflops / self.bandwidth


_measured: dict[tuple[int, str], Peaks] = {}


def peaks(dtype: Any = np.float32) -> Peaks:
    """The roof of this machine with the threads that kernels use now; measured once in a process, in about a second.

    Arithmetic: independent fused multiply-adds that never leave the registers. Memory: the triad a = b + s c of STREAM
    (McCalpin 1995) over arrays that no cache holds, three transfers an element.
    """
    dtype = np.dtype(dtype)
    key = threads.count(), dtype.name
    if key not in _measured:
        _measured[key] = Peaks(_peak_gflops(dtype), _bandwidth(dtype), threads.count(), dtype.name, ISA)
    return _measured[key]


def _peak_gflops(dtype: np.dtype) -> float:
    start = np.ones(ACCUMULATORS * 64, dtype)  # 64: more than a vector has lanes
    factors = np.full(128, 0.5, dtype)  # a -> a / 2 + 1/2 stays at 1
    ends = np.empty((threads.count(), ACCUMULATORS * 64), dtype)
    lanes = _multiply_add(start, factors, 1, ends)
    flops = 2.0 * lanes * ACCUMULATORS * STEPS * len(ends)
    return flops / _best(lambda: _multiply_add(start, factors, STEPS, ends)) / 1e9


def _bandwidth(dtype: np.dtype) -> float:
    size = max(2 * L3, 64 << 20) // dtype.itemsize
    a, b, c = (memory.empty((size,), dtype) for _ in range(3))  # on the pages that the kernels' arrays have
    for x in (a, b, c):
        x.fill(1)
    scale, blocks = dtype.type(0.5), 8 * threads.count()
    _triad(a, b, c, scale, blocks)
    return 3.0 * a.nbytes / _best(lambda: _triad(a, b, c, scale, blocks)) / 1e9


def _best(run: Callable[[], Any]) -> float:
    best, end = math.inf, time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        run()
        best = min(best, time.perf_counter() - start)
    return best


@unrolled
def _begin(x):
    return [load(x, 64 * k) for k in range(ACCUMULATORS)]


@unrolled
def _all_once(sums, a, b):
    return [fma(s, a, b) for s in sums]


@unrolled
def _end(ends, i, sums):
    for k, s in enumerate(sums):
        store(ends, i + 64 * k, s)


@unrolled
def _lanes(x):
    return load(x, 0).kind.count


@njit(parallel=True, cache=True)
def _multiply_add(start, factors, steps, ends):
    """`steps` rounds of multiply-adds on each thread, in registers alone. Returns the lanes of a vector."""
    for t in prange(len(ends)):
        sums, a, b = _begin(start), load(factors, 0), load(factors, 64)
        for _ in range(steps):
            sums = _all_once(sums, a, b)
        _end(ends, t * ends.shape[1], sums)
    return _lanes(start)


@njit
def _triad_block(a, b, c, scale):
    for i in range(a.size):
        a[i] = b[i] + scale * c[i]


@njit(parallel=True, cache=True)
def _triad(a, b, c, scale, blocks):
    for k in prange(blocks):
        first, last = a.size * k // blocks, a.size * (k + 1) // blocks
        _triad_block(a[first:last], b[first:last], c[first:last], scale)


# ------------------------------------------------------------------ the picture

RUNG, ROOF, QUIET = "#3b6fb6", "#c0392b", "0.35"


def draw(results: Sequence[Result], peaks: Peaks, where: str | Path | Any) -> None:
    """Draw each result that was measured as a point under the roof; `where` is a file (PNG, SVG, PDF) or axes.

    Primitives that compute nothing (im2col) have no place there: for them bars of GB/s against the bandwidth are drawn.
    Raises ValueError if nothing was measured.
    """
    measured = [r for r in results if r.seconds]
    if not measured:
        raise ValueError("nothing to draw: no rung was measured")
    with_work = [r for r in measured if r.flops and r.bytes]
    if not isinstance(where, str | Path):
        _points(with_work, peaks, where) if with_work else _bars(measured, peaks, where)
        return
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    figure = Figure(figsize=(8.5, 5.4), dpi=120, layout="constrained")
    draw(results, peaks, figure.add_subplot())
    figure.savefig(where)


def _points(results: Sequence[Result], peaks: Peaks, axes: Any) -> None:
    intensities = [r.intensity for r in results]
    left, right = min(*intensities, peaks.ridge) / 6, max(*intensities, peaks.ridge) * 12
    top, bottom = max(peaks.gflops, *(r.gflops for r in results)) * 2, min(r.gflops for r in results) / 2.5
    edge = [left, peaks.ridge, right]
    axes.plot(edge, [peaks.roof(x) for x in edge], color=ROOF, linewidth=2)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.annotate(
        f"peak {peaks.gflops:,.0f} GFLOP/s",
        (right, peaks.gflops),
        (-6, 5),
        textcoords="offset points",
        ha="right",
        color=ROOF,
    )
    low = max(left, bottom / peaks.bandwidth) * 1.3
    axes.annotate(
        f"memory {peaks.bandwidth:,.0f} GB/s",
        (low, peaks.roof(low)),
        (8, -4),
        textcoords="offset points",
        va="top",
        color=ROOF,
    )
    heights = _apart([math.log(r.gflops / bottom) / math.log(top / bottom) for r in results], 0.05)
    several = len({r.primitive for r in results}) > 1
    for result, height in zip(results, heights, strict=True):
        axes.plot(result.intensity, result.gflops, "o", color=RUNG, markersize=7)
        name = f"{result.primitive}={result.variant}" if several else result.variant
        axes.annotate(
            f"{name}  {result.gflops:,.{0 if result.gflops >= 10 else 3}f}",
            (result.intensity, result.gflops),
            (result.intensity * (right / left) ** 0.03, bottom * (top / bottom) ** height),
            va="center",
            arrowprops=dict(arrowstyle="-", color="0.75", shrinkA=0, shrinkB=4),
            fontsize=9,
        )
    for axis in axes.xaxis, axes.yaxis:
        axis.set_major_formatter("{x:,g}")
    axes.set_xlabel("operations a byte, at the least that must be moved", color=QUIET)
    axes.set_ylabel("GFLOP/s (effective: of the direct algorithm's operations)", color=QUIET)
    _dress(axes, results, peaks)


def _bars(results: Sequence[Result], peaks: Peaks, axes: Any) -> None:
    names = [r.variant for r in results]
    axes.barh(names, [r.gb_per_s for r in results], color=RUNG)
    axes.axvline(peaks.bandwidth, color=ROOF, linewidth=2, label=f"memory {peaks.bandwidth:,.0f} GB/s")
    axes.invert_yaxis()
    axes.set_xlabel("GB/s, of the least that must be moved", color=QUIET)
    axes.legend(frameon=False)
    _dress(axes, results, peaks)


def _dress(axes: Any, results: Sequence[Result], peaks: Peaks) -> None:
    title = ", ".join(dict.fromkeys(r.primitive for r in results))
    threads = "1 thread" if peaks.threads == 1 else f"{peaks.threads} threads"
    axes.set_title(f"{title}, {peaks.dtype}, {threads}, {peaks.isa}", loc="left", fontsize=11)
    axes.grid(color="0.93", which="major")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _apart(heights: Sequence[float], gap: float) -> list[float]:
    """The heights (0 to 1) moved as little as need be for labels to be `gap` apart: up, then down from the top edge."""
    order = sorted(range(len(heights)), key=heights.__getitem__)
    moved = list(heights)
    for below, above in itertools.pairwise(order):
        moved[above] = max(moved[above], moved[below] + gap)
    ceiling = 0.98
    for i in reversed(order):
        moved[i] = min(moved[i], ceiling)
        ceiling = moved[i] - gap
    return moved
