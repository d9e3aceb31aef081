"""Launch configurations, tried one after the other: `python -m nanocnn bench matmul --device emulated --sweep`.

Larger tiles load less and take more registers and shared memory, which leaves room for fewer warps. Both sides can be
seen without a GPU: what a kernel takes is the compiler's answer, what it loads is counted. Which of the two counts for
more is seen on a GPU alone, where each is timed, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from .kernels.cuda.emulated import KernelError, Report, counting
from .kernels.cuda.launch import Launch, launches
from .kernels.cuda.occupancy import Occupancy, occupancy
from .kernels.cuda.resources import CompileError, Resources, resources
from .kernels.cuda.source import target
from .kernels.cuda.tunable import Tunable, asked
from .kernels.dispatch import DeviceError, Primitive, Variant
from .ladder import error_of, in_float64, outputs
from .traffic import cuda_variants, on_emulator, refusal

ARCHITECTURE = "sm_90"
REPEATS = 50  # calls between two events


@dataclass
class Trial:
    """One variant in one configuration. `note` says why it did not run; `error`: as in ladder.Result.

    `tunable` and `numbers`: what was varied; None and nothing for the default.
    """

    variant: str
    place: str
    rules: list[str]  # of all that could be varied: what is the default, and why
    tunable: Tunable | None = None
    numbers: dict[str, int] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    report: Report = field(default_factory=Report)  # on `emulated`
    error: float = 0.0
    seconds: float | None = None  # of a call, on `cuda`
    note: str = ""

    @property
    def label(self) -> str:
        """What is not as by default."""
        return " ".join(f"{name}={number}" for name, number in self.numbers.items()) or "default"

    def kernels(self) -> dict[str, Launch]:
        """Each kernel that ran, with its last launch."""
        return {launch.kernel.name: launch for launch in self.launches}


def sweep(
    primitive: str | Primitive, *args: Any, device: str = "emulated", say: Callable[[str], None] = lambda line: None
) -> list[Trial]:
    """Each CUDA variant of a primitive on the call with these arguments, in each configuration, against the reference.

    First as it is by default; then with each of the others that its tunables name, one tunable at a time. Raises
    BenchError on an unknown primitive and on one without a CUDA kernel, DeviceError where the device is not there.
    """
    p, variants = cuda_variants(primitive)
    want = outputs(p, p.variants["reference"], *in_float64(args, {}))
    given, trials = on_emulator(args, device), []
    for variant in variants:
        say(f"{p.name}={variant.name}")
        found = Trial(variant.name, variant.place, [])
        trials.append(found)
        with asked() as tunables:
            _try(found, p, variant, given, want, device)
        found.rules += [f"{_words(t.default)}: {t.rule}" for t in tunables]
        for tunable in tunables:
            for numbers in tunable.others:
                with tunable.using(**numbers):
                    found = Trial(variant.name, variant.place, found.rules, tunable, tunable.different())
                    say(f"{p.name}={variant.name}, {found.label}")
                    _try(found, p, variant, given, want, device)
                trials.append(found)
    return trials


def _try(trial: Trial, p: Primitive, variant: Variant, args: tuple, want: Sequence[np.ndarray], device: str) -> None:
    if not variant.supports(*args):
        trial.note = refusal(variant, args)
        return
    try:
        with ExitStack() as stack:
            trial.launches = stack.enter_context(launches())
            trial.report = stack.enter_context(counting() if device == "emulated" else nullcontext(Report()))
            got = outputs(p, variant, args, {})
    except (KernelError, ValueError) as error:
        trial.note = str(error)
        return
    trial.error = error_of(got, want)
    if not trial.launches:
        trial.note = f"launches no kernel of a .cu file; error {trial.error:.0e}"
    if device == "cuda":
        trial.seconds = seconds_by_events(lambda: variant.body(*args))


def seconds_by_events(call: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Of one call on the GPU, between two events with many calls between them. Not yet measured on a GPU."""
    import cupy

    call()
    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    for _ in range(repeats):
        call()
    stop.record()
    stop.synchronize()
    return cupy.cuda.get_elapsed_time(start, stop) / 1e3 / repeats


@cache
def _compiled(file: str, defines: tuple[tuple[str, Any], ...]) -> dict[str, Resources]:
    return resources(file, target(file) or ARCHITECTURE, **dict(defines))


def takes(launch: Launch) -> tuple[Resources, Occupancy] | None:
    """What a launch takes of a multiprocessor. None without a compiler, or where that cannot compile it."""
    try:
        of_kernel = _compiled(launch.kernel.file, tuple(sorted(launch.defines.items())))[launch.kernel.name]
    except (DeviceError, CompileError):
        return None
    shared = of_kernel.shared + launch.shared
    used = of_kernel._replace(shared=shared)
    return used, occupancy(used.registers, launch.threads, shared, ARCHITECTURE)


# ------------------------------------------------------------------ the tables


def print_trials(trials: Sequence[Trial], console: Console) -> None:
    """A table for each variant: a line for each configuration and kernel."""
    for variant in dict.fromkeys(t.variant for t in trials):
        of_variant = [t for t in trials if t.variant == variant]
        first = of_variant[0]
        console.print(Text(f"{variant} ({first.place})", "bold"))
        for rule in first.rules:
            console.print(Text(f"  {rule}"), soft_wrap=True)
        if any(not t.note for t in of_variant):
            console.print(_table([t for t in of_variant if not t.note]))
        for t in of_variant:
            if t.note:
                console.print(Text(f"  not run: {t.label}: {t.note}", "dim"), soft_wrap=True)
    console.print(
        f"registers, bytes of shared memory (of a block, all in all) and of spills: the compiler's, {ARCHITECTURE}. "
        "warps: of the 64 that a multiprocessor holds, how many there is room for, and what keeps more from coming "
        "(kernels/cuda/occupancy.py). Sectors, turns of banks and barriers are counted in the emulator."
    )


def _table(trials: Sequence[Trial]) -> Table:
    counted, timed = any(t.report.lines for t in trials), any(t.seconds is not None for t in trials)
    several = any(len(t.kernels()) > 1 for t in trials)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", style="bold", overflow="fold")
    if several:
        table.add_column("kernel", overflow="fold")
    for heading in ("threads", "regs", "shared", "spills", "warps"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("limit", no_wrap=True)
    for heading in [*["sectors", "turns", "barriers"] * counted, *["ms"] * timed, "error"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for t in trials:
        for number, (name, launch) in enumerate(t.kernels().items()):
            cells = [t.label if number == 0 else "", *[name] * several, *_taken(launch)]
            if counted:
                lines = [line for line in t.report.lines.values() if line.kernel == name]
                units = (sum(line.units for line in lines if line.memory == m) for m in ("global", "shared"))
                cells += [f"{n:,}" if n else "" for n in (*units, t.report.barriers_of[name])]
            cells += [f"{t.seconds * 1e3:.4f}" if t.seconds is not None and number == 0 else ""] * timed
            table.add_row(*cells, f"{t.error:.0e}" if number == 0 else "")
    return table


def _taken(launch: Launch) -> list[str]:
    found = takes(launch)
    if found is None:
        return [f"{launch.threads}", "?", "?", "?", "?", "no compiler"]
    used, room = found
    spilled = f"{used.spilled:,}" if used.spilled else ""
    limit = room.limit if room.share < 1 else ""
    return [f"{launch.threads}", f"{used.registers}", f"{used.shared:,}", spilled, f"{room.warps}", limit]


def _words(numbers: dict[str, int]) -> str:
    return " ".join(f"{name}={number}" for name, number in numbers.items())
