"""Ctrl-C and SIGTERM end a run between two steps, on all ranks alike, so that a checkpoint can be written first."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from .comm import Comm

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
TWICE = 0.5  # seconds within which a second signal is the same one: a shell and a launcher may both deliver it


class StopRequest:
    """Inside `with StopRequest() as stop:` a signal only raises a flag: `requested` here, `agreed()` on all ranks.

    Heeds SIGINT (Ctrl-C), SIGTERM and SIGUSR1 (what batch systems are told to send before the time is up). Sent to a
    rank, a signal reaches that rank alone, and `agreed()` makes it the same step on all. Sent to MPICH's mpiexec,
    SIGINT and SIGTERM reach all ranks, without a time limit; Open MPI's kills the ranks 0.2 s after either, but
    forwards SIGUSR1. A second Ctrl-C raises KeyboardInterrupt at once. To be entered in the main thread.
    """

    def __init__(self, announce: bool = True):
        self.signal: int | None = None
        self._announce = announce
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    @property
    def requested(self) -> bool:
        """Whether this process was signalled."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """A shell's status of a process that a signal ended: 130 after Ctrl-C, 143 where only another rank got one."""
        return 128 + (self.signal or signal.SIGTERM)

    def agreed(self, comm: Comm) -> bool:
        """Whether some rank was signalled: the same answer on all ranks, which must all ask, once a step."""
        return comm.any(self.requested)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self._first = number, time.monotonic()
            if self._announce:  # by os.write: print() may be what was interrupted
                os.write(2, b"\nstopping after this step (Ctrl-C again: at once)\n")
        elif number == signal.SIGINT and time.monotonic() - self._first > TWICE:
            raise KeyboardInterrupt
