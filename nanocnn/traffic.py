"""What the rungs of a ladder ask of a GPU's memory, counted: `python -m nanocnn bench --device emulated`.

A time on the emulator says nothing about a GPU. But loads and stores, sectors, bank conflicts and barriers are the same
there and here, and most of what separates two rungs is in them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .example_calls import BenchError
from .kernels import dispatch
from .kernels.cuda.emulated import KernelError, Report, Traffic, counting
from .kernels.dispatch import Primitive, to_device
from .kernels.narrow import HALVES
from .ladder import REFUSED, error_of, in_float64, outputs, primitive_of


@dataclass
class Count:
    """One variant on one call. `note` says why it was not counted; `error`: as in ladder.Result."""

    variant: str
    place: str
    report: Report = field(default_factory=Report)
    error: float = 0.0
    note: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        lines = [vars(line) for line in self.report.lines.values()]
        return dict(variant=self.variant, place=self.place, error=self.error, note=self.note, lines=lines)


def on_emulator(value: Any, device: str = "emulated") -> Any:
    """Arrays as arrays of the device `emulated`, or of another one; in tuples, lists and dicts too."""
    if isinstance(value, np.ndarray):
        return to_device(value, device)
    if isinstance(value, dict):
        return {name: on_emulator(v, device) for name, v in value.items()}
    return type(value)(on_emulator(v, device) for v in value) if isinstance(value, list | tuple) else value


def count(primitive: str | Primitive, *args: Any) -> list[Count]:
    """Each CUDA variant of a primitive on the call with these arguments, checked against the reference and counted.

    Raises BenchError on an unknown primitive, and on one for which there is no CUDA kernel.
    """
    p, variants = cuda_variants(primitive)
    want = outputs(p, p.variants["reference"], *in_float64(args, {}))
    given = on_emulator(args)
    return [_count(p, v, given, want) for v in variants]


def cuda_variants(primitive: str | Primitive) -> tuple[Primitive, list[dispatch.Variant]]:
    """A primitive, and its variants for GPUs. Raises BenchError if there is no such primitive, or no such variant."""
    p = primitive_of(primitive)
    variants = [v for v in p.rungs("emulated").values() if v.device == "cuda"]
    if not variants:
        having = [q.name for q in dispatch.primitives.values() if any(v.device == "cuda" for v in q.variants.values())]
        raise BenchError(f"{p.name} has no CUDA kernel; there are kernels of: {', '.join(sorted(having))}")
    return p, variants


def _count(p: Primitive, variant: dispatch.Variant, args: tuple, want: Sequence[np.ndarray]) -> Count:
    found = Count(variant.name, variant.place)
    if not variant.supports(*args):
        found.note = refusal(variant, args)
        return found
    try:
        with counting() as found.report:
            got = outputs(p, variant, args, {})
    except KernelError as error:
        found.note = str(error)
        return found
    found.error = error_of(got, want)
    if not found.report.blocks:
        found.note = f"no kernel in CUDA C++, so nothing counts what it does; error {found.error:.1e}"
    return found


def refusal(variant: dispatch.Variant, args: tuple) -> str:
    """That a variant cannot do a call in float32, and in which dtypes of 16 bits it could."""

    def of(half: np.dtype) -> tuple:
        return tuple(a.astype(half) if getattr(a, "dtype", None) == np.float32 else a for a in args)

    able = [str(half) for half in HALVES if variant.supports(*of(half))]
    return f"{REFUSED}; it can with --dtype {' or '.join(able)}" if able else REFUSED


# ------------------------------------------------------------------ the tables


def print_counts(counts: Sequence[Count], console: Console) -> None:
    """A line for each variant: what it asks of global and of shared memory, and how much more than it would need."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("rung", style="bold", no_wrap=True)
    for heading in ("blocks", "loads, KB", "in sectors", "stores, KB", "shared, turns", "barriers", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    for c in counts:
        if c.note:
            continue
        loads, stores = c.report.total("global", "load"), c.report.total("global", "store")
        figures = (
            f"{loads.bytes / 1e3:,.0f}",
            _units(loads),
            f"{stores.bytes / 1e3:,.0f}",
            _units(c.report.total("shared")),
        )
        table.add_row(c.variant, f"{c.report.blocks:,}", *figures, f"{c.report.barriers:,}", f"{c.error:.0e}")
    console.print(table)
    for c in counts:
        if c.note:
            console.print(Text(f"not counted: {c.variant} ({c.place}): {c.note}", "dim"))
    console.print(
        "Counted in the emulator, not measured. A sector is 32 bytes of global memory; in a turn each of the 32 banks "
        "of shared memory gives one word. Behind each, how many times the least for as many bytes; less than 1 where "
        "lanes share what they load."
    )


def print_lines(count: Count, console: Console) -> None:
    """Each line of a variant's kernels, the one that needs most first."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=count.variant, title_justify="left")
    table.add_column("line")
    table.add_column("")
    for heading in ("requests", "KB", "sectors, turns"):
        table.add_column(heading, justify="right")
    for line in sorted(count.report.lines.values(), key=lambda line: (line.memory, -line.units)):
        figures = f"{line.requests:,}", f"{line.bytes / 1e3:,.1f}", _units(line)
        table.add_row(line.place, f"{line.memory} {line.kind}", *figures)
    console.print(table)


def _units(t: Traffic) -> str:
    return f"{t.units:,} {t.units / t.ideal:4.2f}x" if t.ideal else ""
