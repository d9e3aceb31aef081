"""What a profile asks of a GPU: how long kernels took there, and ranges for NVIDIA's Nsight Systems.

A call of a kernel only launches it; the host's clock would time the launch. So an event is put into the stream before
and after each primitive, and the GPU writes the time into it when it comes there. Nobody waits for that: what has been
reached is read on the way, the rest when the profile ends.

Tested on a stand-in for CuPy's events; not yet run on a GPU.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

KEPT = 4096  # pairs of events before those that the GPU has passed are read and used again


class _Timed(NamedTuple):
    """A primitive between two events."""

    start: Any
    stop: Any
    depth: int  # of primitives around it
    tell: Callable[[float, float], None]


class EventClock:
    """Times what is between `start()` and `stop()` on the current stream; such stretches may nest."""

    def __init__(self) -> None:
        self._open: list[Any] = []  # events before primitives that still run
        self._timed: deque[_Timed] = deque()  # in the order in which they ended: inner ones first
        self._spare: list[Any] = []
        self._inside = [0.0]  # seconds, by depth, of the primitives within those that are still to be told

    def start(self) -> None:
        """Put an event into the stream."""
        self._open.append(self._event())

    def stop(self, tell: Callable[[float, float], None]) -> None:
        """Put the other event there. `tell` gets the seconds without those of stretches inside, and with them."""
        start = self._open.pop()
        self._timed.append(_Timed(start, self._event(), len(self._open), tell))
        if len(self._timed) > KEPT:
            self._read(lambda event: event.done)

    def finish(self) -> None:
        """Wait for the last event, and tell all that is not told yet."""
        if self._timed:
            self._timed[-1].stop.synchronize()
            self._read(lambda event: True)

    def _event(self) -> Any:
        import cupy

        return cupy.cuda.get_current_stream().record(self._spare.pop() if self._spare else cupy.cuda.Event())

    def _read(self, passed: Callable[[Any], bool]) -> None:
        import cupy

        while self._timed and passed(self._timed[0].stop):
            start, stop, depth, tell = self._timed.popleft()
            seconds = cupy.cuda.get_elapsed_time(start, stop) / 1e3
            self._inside += [0.0] * (depth + 2 - len(self._inside))
            tell(seconds - self._inside[depth + 1], seconds)
            self._inside[depth + 1] = 0.0
            self._inside[depth] += seconds
            self._spare += [start, stop]


def ranges() -> Any:
    """CuPy's module `nvtx`, where this process uses CuPy and NVTX is there; else None."""
    if "cupy" not in sys.modules:
        return None
    try:
        from cupy.cuda import nvtx
    except ImportError:
        return None
    return nvtx if nvtx.available else None
