"""What a run prints while it trains: a bar on a terminal, a line now and then elsewhere, one line for each epoch.

Under mpiexec the output is a pipe and not a terminal, so there are plain lines, without escape codes.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

# How each figure is shown, in the order of the line; a figure that is not given is left out.
EPOCH_FORMATS = {
    "loss": "loss {:.4f}",
    "train_accuracy": "train {:5.1%}",
    "val_accuracy": "val {:5.1%}",
    "test_accuracy": "test {:5.1%}",
    "images_per_second": "{:,.0f} images/s",
    "communication": "comm {:.1%}",
    "lr": "lr {:<8.3g}",
    "loss_scale": "scale {:g}",
    "skipped_steps": "skipped {}",
}
STEP_FORMATS = {"loss": "loss {:.4f}", "accuracy": "train {:5.1%}", "rate": "{:,.0f} images/s"}


def say(line: str) -> None:
    """Print and flush; a log on a full disk, or a reader that has gone, costs the line and not the training."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


def duration(seconds: float) -> str:
    """`3.2 s`, `47 s`, `3 min 05 s`, `2 h 07 min`."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(n: float) -> str:
    """`312 MB`, `1.42 GB`: powers of ten."""
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.0f} MB"


def _figures(figures: Mapping[str, Any], formats: Mapping[str, str]) -> list[str]:
    return [text.format(figures[name]) for name, text in formats.items() if figures.get(name) is not None]


def epoch_line(row: Mapping[str, Any], epochs: int | None = None) -> str:
    """One epoch in words, from a row of `metrics.csv`; with `epochs`, the length of the run, also the time left."""
    label = f"epoch {row['epoch']:>{len(str(epochs))}}/{epochs}" if epochs else f"epoch {row['epoch']}"
    words = [label, *_figures(row, EPOCH_FORMATS)]
    if row.get("memory"):
        words.append(size(row["memory"]))
    if row.get("seconds") is not None:
        words.append(duration(row["seconds"]))
        if epochs and epochs > row["epoch"]:
            words.append(f"ETA {duration(row['seconds'] * (epochs - row['epoch']))}")
    return "  ".join(words)


class Progress:
    """How far an epoch is: a bar on a terminal; elsewhere a line every `interval` seconds; nothing if not `active`.

    with Progress(total=steps, label="epoch 3/20", active=comm.rank == 0) as bar:
        bar.update(step, loss=..., accuracy=..., rate=...)      # `step` steps of `total` are done; any figure may miss

    `done` steps were made before (an epoch that goes on after a resume): they do not count in the time left.
    """

    def __init__(self, total: int, label: str = "", active: bool = True, done: int = 0, interval: float = 10.0):
        self.total, self.label, self.active, self.done, self.interval = total, label, active, done, interval
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self.active and _on_terminal():
            self._open_bar()
        return self

    def _open_bar(self) -> None:
        from rich import progress

        columns = (
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TextColumn("ETA"),
            progress.TimeRemainingColumn(compact=True),
        )
        # It clears itself at the end, and the epoch's line takes its place.
        self._bar = progress.Progress(*columns, transient=True, refresh_per_second=4)
        self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, figures="")
        self._bar.start()

    def update(self, step: int, **figures: float | None) -> None:
        """Say that `step` steps of the total are done, with `loss`, `accuracy` (0 to 1) and `rate` (images/s)."""
        if not self.active:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step, figures="  ".join(_figures(figures, STEP_FORMATS)))
            return
        now = time.monotonic()
        if now - self._last < self.interval:
            return
        self._last = now
        left = (now - self._start) / max(1, step - self.done) * (self.total - step)
        words = [self.label, f"step {step}/{self.total}", *_figures(figures, STEP_FORMATS), f"ETA {duration(left)}"]
        say("  ".join(filter(None, words)))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _on_terminal() -> bool:
    """Not rich's own test, which FORCE_COLOR and the like overrule: a log file must stay free of escape codes."""
    return sys.stdout.isatty() and os.environ.get("TERM", "").lower() not in ("dumb", "unknown")
