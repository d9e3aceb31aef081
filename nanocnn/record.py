"""What a run leaves behind for people: metrics.csv, result.json, curves.png and TensorBoard events in its folder.

Figures are worth less than the training that makes them: a folder that cannot be written is an error before the first
step and a warning after it.
"""

from __future__ import annotations

import csv
import dataclasses
import errno
import importlib.util
import io
import json
import math
import os
import re
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .kernels.dispatch import choices_in_force
from .progress import Progress, duration, epoch_line, say

__all__ = ["Progress", "RecordError", "Run", "peak_memory"]

PROBE_BYTES = 1 << 16
DRAWING_SHARE = 0.02  # of the run's time may go into drawing the curves while it trains


class RecordError(RuntimeError):
    """A file or the folder of a run cannot be written; the message says which, why, and what to do."""

    def __init__(self, path: Path, error: OSError):
        super().__init__(
            f"cannot write {path}: {error.strerror or error}. Make room there, or choose another folder for the run, "
            "one that you may write to"
        )


def peak_memory() -> int:
    """The most bytes of memory that this process has held at once (peak resident set size)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


class Run:
    """The folder of one run. `config` goes into result.json; `config["epochs"]`, where given, into the time left.

    With `active=False`, on all ranks but one, every method does nothing, so that a script needs no `if`.
    Raises RecordError if the folder cannot be made or written.
    """

    def __init__(self, folder: str | Path, config: Mapping[str, Any], active: bool = True):
        self.folder, self.config, self.active = Path(folder), config, active
        self.history: list[dict[str, Any]] = []
        self.name = self.folder.resolve().name
        self._warned: set[str] = set()
        self._started, self._drawing = time.monotonic(), 1.0  # about what the first picture will cost, with the import
        self._events = self.folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}"
        self._tensorboard = importlib.util.find_spec("tensorboard") is not None
        if active:
            _probe(self.folder)

    def load_history(self, until: int | None = None) -> list[dict[str, Any]]:
        """Take up the rows of metrics.csv (up to epoch `until`), as a resumed run does first; empty if not active.

        A damaged file costs the rows from the damage on and a warning, never the run.
        """
        self.history = []
        path = self.folder / "metrics.csv"
        if self.active and path.exists():
            try:
                for values in csv.DictReader(io.StringIO(path.read_text())):
                    row: dict[str, Any] = {name: _number(value) for name, value in values.items() if value}
                    row |= {"epoch": int(values["epoch"]), "step": int(values["step"])}
                    if until is None or row["epoch"] <= until:
                        self.history.append(row)
            except (OSError, ValueError, KeyError, TypeError, csv.Error) as error:
                self._warn(path, f"some figures of earlier epochs cannot be read ({type(error).__name__}: {error})")
        return self.history

    def epoch(self, epoch: int, step: int, **figures: Any) -> None:
        """Record an epoch that is over, its number counted from 1, after `step` steps in all; print its line.

        Figures by name: `loss`, `train_accuracy`, `val_loss`, `val_accuracy`, `test_loss`, `test_accuracy` (0 to 1),
        `images_per_second`, `communication` (its share of the time, 0 to 1), `lr`, `seconds`, `memory` (bytes; this
        process's peak unless given), `gpu_memory` (bytes that pools on GPUs hold). Others are recorded too, and None is
        left out.
        """
        if not self.active:
            return
        row = {"epoch": epoch, "step": step, "memory": peak_memory(), **figures}
        row = {k: v.item() if hasattr(v, "item") else v for k, v in row.items() if v is not None}
        # An epoch that is trained again after a resume replaces what was written of it and of those after it.
        self.history = [old for old in self.history if old["epoch"] < epoch]
        resumed_at = self.history[-1]["step"] + 1 if self.history else 0
        self.history.append(row)
        say(epoch_line(row, self.config.get("epochs")))
        self._try(self.folder / "metrics.csv", lambda path: _replace(path, _csv(self.history)))
        if self._tensorboard:
            self._try(self._events, lambda path: _add_events(path, row, resumed_at))
        if self._drawing <= DRAWING_SHARE * (time.monotonic() - self._started):
            self._draw()

    def finish(self, result: Mapping[str, Any] | None = None) -> None:
        """Write result.json and the last curves.png, after the training or an interruption (then give "status").

        `result` is merged with name, status, configuration, choices in force and history. NumPy numbers and arrays,
        dataclasses and paths are welcome; NaN and infinity, which JSON has not, become null. Raises RecordError if
        result.json cannot be written: save the checkpoint first.
        """
        if not self.active:
            return
        if self.history:
            self._draw()
        events = self._events.name if self._events.exists() else None
        if not self._tensorboard:
            events = "not installed: pip install tensorboard"
        whole: dict[str, Any] = {"name": self.name, "status": "finished", "config": self.config}
        whole |= {"choices": choices_in_force(), **(result or {}), "tensorboard": events, "history": self.history}
        path = self.folder / "result.json"
        try:
            _replace(path, (json.dumps(_plain(whole), indent=1, allow_nan=False) + "\n").encode())
        except OSError as error:
            raise RecordError(path, error) from error

    def _draw(self) -> None:
        start = time.monotonic()
        self._try(self.folder / "curves.png", lambda path: _replace(path, draw_curves(self.history, self.name)))
        self._drawing += time.monotonic() - start

    def _try(self, path: Path, write: Callable[[Path], None]) -> None:
        """Write a file; whatever a full disk or a plotting library may raise, the training goes on."""
        try:
            write(path)
        except Exception as error:
            self._warn(path, f"it cannot be written ({getattr(error, 'strerror', None) or error!r})")

    def _warn(self, path: Path, what: str) -> None:
        if path.name not in self._warned:
            self._warned.add(path.name)
            print(f"warning: {path}: {what}; the training goes on", file=sys.stderr, flush=True)


# ------------------------------------------------------------------ files


def _probe(folder: Path) -> None:
    """Make the folder and write a file there, before hours are spent on what could not be kept."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        _replace(probe, bytes(PROBE_BYTES))
        probe.unlink()
    except OSError as error:
        raise RecordError(folder, error) from error


def _replace(path: Path, data: bytes) -> None:
    """Write beside the target and rename, so that a reader, and a kill, find the old file or the new one whole."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_bytes(data)
        os.replace(beside, path)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def _csv(rows: list[dict[str, Any]]) -> bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _number(text: str) -> int | float | str:
    for kind in int, float:
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def _plain(value: Any) -> Any:
    """The same in what JSON knows."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):  # a NamedTuple
        value = value._asdict()
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers
        value = value.tolist()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, str | int | None) else str(value)


def _add_events(path: Path, row: Mapping[str, Any], first_step: int) -> None:
    """Append a row to a TensorBoard event file; a new file tells TensorBoard to forget older points from `first_step`.

    No thread and no TensorFlow: an event file is a sequence of framed protocol buffers.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.record_writer import RecordWriter

    now = time.time()
    values = [
        # train_accuracy -> accuracy/train: TensorBoard puts what has a common head side by side
        Summary.Value(tag=re.sub(r"^(train|val|test)_(.+)", r"\2/\1", name), simple_value=value)
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
    ]
    events = [Event(wall_time=now, step=row["step"], summary=Summary(value=values))]
    with open(path, "ab", buffering=0) as file:
        size = file.tell()
        if size == 0:
            start = Event(wall_time=now, step=first_step, session_log=SessionLog(status=SessionLog.START))
            events = [Event(wall_time=now, file_version="brain.Event:2"), start, *events]
        framed = io.BytesIO()
        for event in events:
            RecordWriter(framed).write(event.SerializeToString())
        try:
            if file.write(framed.getbuffer()) < len(framed.getbuffer()):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            file.truncate(size)  # half a record would hide all that follow
            raise


# ------------------------------------------------------------------ the picture

COLOURS = {"train": "#3b6fb6", "val": "#e08a1e", "test": "#2f9e6e"}


def draw_curves(history: list[dict[str, Any]], name: str) -> bytes:
    """A PNG of loss, accuracy, learning rate and images/s by epoch, titled with the run's name and last figures."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state
    from matplotlib.layout_engine import ConstrainedLayoutEngine
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def column(key: str) -> np.ndarray:
        return np.array([row.get(key, math.nan) for row in history], float)

    figure = Figure(figsize=(11, 6.6), dpi=110, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1))
    panels = figure.subplots(2, 2, height_ratios=(5, 2))
    epochs = column("epoch")
    style = dict(linewidth=2, marker="o", markersize=3.5 if len(history) <= 40 else 0, solid_capstyle="round")

    def plot(panel: Any, title: str, text: str, curves: dict[str, str], colours: Iterable[str]) -> None:
        """`curves`: column -> label; `text` formats the last value, which goes into the legend or the title."""
        for (key, label), colour in zip(curves.items(), colours, strict=True):
            y = column(key)
            if np.isfinite(y).any():
                panel.plot(epochs, y, color=colour, label=f"{label} {text.format(y[-1])}", **style)
                if not label:
                    title += f": {text.format(y[-1])}"
        panel.set_title(title, loc="left", fontsize=11, color="0.25")
        panel.grid(color="0.92")
        panel.set_axisbelow(True)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color("0.7")
        panel.tick_params(colors="0.35", labelsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True, steps=(1, 2, 5, 10), min_n_ticks=1))
        panel.set_xlim(epochs[0] - 0.5, epochs[-1] + 0.5)
        if panel.lines and all(curves.values()):
            panel.legend(frameon=False, fontsize=10, loc="best")

    loss, accuracy, rate, speed = panels.flat
    colours = COLOURS.values()
    plot(loss, "loss", "{:.3f}", {"loss": "train", "val_loss": "val", "test_loss": "test"}, colours)
    plot(accuracy, "accuracy", "{:.1%}", {f"{part}_accuracy": part for part in COLOURS}, colours)
    plot(rate, "learning rate", "{:.3g}", {"lr": ""}, ["#7a5aa6"])
    plot(speed, "images/s", "{:,.0f}", {"images_per_second": ""}, ["#5b6770"])
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    speed.set_ylim(0, speed.get_ylim()[1] * 1.1)
    for panel in rate, speed:
        panel.set_xlabel("epoch", color="0.35", fontsize=9)

    last, seconds = history[-1], np.nansum(column("seconds"))
    figures = [f"{part} {last[key]:.1%}" for part in COLOURS if (key := f"{part}_accuracy") in last]
    title = [f"epoch {last['epoch']}", *figures, *([duration(seconds)] if seconds else [])]
    figure.suptitle(f"{name}:  {',  '.join(title)}", fontsize=14, x=0.02, ha="left", parse_math=False)
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
