"""The sections of gpu_proof.py: each a function that yields rows, in a process of its own.

A row is a dict. "ok" is True or False where something was checked, and is left out where something was measured or
could not be; "note" says why not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]


@dataclass(frozen=True)
class Context:
    """What a section is told: the device, whether it is to be short, and when (by time.monotonic()) it is ended.

    `sanitized`: it runs under compute-sanitizer, for which each array has memory of its own, so that it sees its ends.
    """

    device: str
    quick: bool
    end: float = math.inf
    sanitized: bool = False

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.monotonic()


@dataclass(frozen=True)
class Section:
    """`seconds`: after so many, and what the sections before it have left of theirs, it is ended; the rows that it
    yielded until then count."""

    name: str
    seconds: float
    rows: Callable[[Context], Iterator[Row]]

    @property
    def about(self) -> str:
        return (self.rows.__doc__ or "").strip().partition("\n")[0]


sections: dict[str, Section] = {}


def section(seconds: float) -> Callable[[Callable[[Context], Iterator[Row]]], Callable[[Context], Iterator[Row]]]:
    """Put a function on the list, in the order in which they run."""

    def register(rows: Callable[[Context], Iterator[Row]]) -> Callable[[Context], Iterator[Row]]:
        sections[rows.__name__] = Section(rows.__name__, seconds, rows)
        return rows

    return register


def not_run(what: str, why: str = "needs a GPU") -> Row:
    """The row of what was not tried: it neither passed nor failed."""
    return dict(what=what, ran=False, note=why)
