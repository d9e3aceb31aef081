"""A rank that fails ends the job. MPI's own behaviour is that the others wait for it for ever."""

from __future__ import annotations

import sys
import threading
import traceback
from typing import Any

from .comm import Comm, flush


def install_hooks(comm: Comm) -> None:
    """Let an uncaught exception, in whatever thread, print its rank and traceback and then abort all ranks.

    Ctrl-C that nobody caught prints one line and aborts with status 130. `sys.exit()` is no failure: a rank that leaves
    while others wait for it is found by those that wait (`MPI.wait_until`).
    """

    def report(kind: type[BaseException], error: BaseException | None, trace: Any) -> None:
        if issubclass(kind, KeyboardInterrupt):
            _say(f"rank {comm.rank}: interrupted\n")
            comm.abort(130)
        _say(f"rank {comm.rank}: " + "".join(traceback.format_exception(kind, error, trace)))
        comm.abort(1)

    def report_thread(args: threading.ExceptHookArgs) -> None:
        if not issubclass(args.exc_type, SystemExit):  # which ends a thread silently, here as ever
            report(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = report
    threading.excepthook = report_thread


def _say(text: str) -> None:
    """One write, so that the lines of several failing ranks do not interleave."""
    sys.stderr.write(text)
    flush()
