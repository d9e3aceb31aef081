#!/usr/bin/env python
"""How long until a training has made its first step? Numba compiles the kernels then, unless they are kept on disk.

The training script itself runs, on the built-in images, for one step, in a process of its own with a cache of its own.
The clock runs from the start of the process until the step is said to be over; evaluation comes after, and is left out.
Cold is an empty cache of kernels; the files of Python and its libraries may still be in memory.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

import common  # isort: skip  (beside this file)

EXAMPLES = """examples:
  python experiments/startup.py                             AlexNet: cold, warm, and two ranks at once
  python experiments/startup.py --model resnet18 --repeat 3
  python experiments/startup.py --width 0.1 --batch 16      small layers, which choose fewer kernels
"""
HERE = Path(__file__).resolve().parent
SCRIPTS = {"alexnet": HERE / "alexnet_cifar.py", "resnet18": HERE / "resnet_cifar.py"}
# The script as it is. Only the place where it counts its steps says so too; a rehearsal that compiles counts none.
WATCHED = """
import os, runpy, sys
from nanocnn.resume import Position
advance = Position.advance
def advance_and_say(self, loss, *rest):
    advance(self, loss, *rest)
    os.write(1, f"first step: loss {loss!r}\\n".encode())  # in one piece, whatever other ranks write
Position.advance = advance_and_say
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


class StartError(RuntimeError):
    """A training that did not end well; the message is all that it printed."""


class Start(NamedTuple):
    """One start of the script: what was measured and seen."""

    seconds: float  # until the last rank's first step was over
    losses: list[float]  # of the first step, one for each rank
    said: str  # the progress line about the kernels, if there was one
    compiled: int  # kernels that the cache got


def kept(cache: Path) -> dict[Path, tuple[int, int]]:
    """What lies in a cache: each file with its time and size, so that one that is written anew shows."""
    return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in cache.rglob("*.kernel")}


def start(args: argparse.Namespace, cache: Path, ranks: int = 1) -> Start:
    """Train for one step with this cache. Raises StartError unless every rank makes it and ends well."""
    launcher = [mpiexec() or "mpiexec", "-n", str(ranks)] if ranks > 1 else []
    options = ["--data", "shapes", "--val", "0", "--epochs", "1", "--width", str(args.width)]
    options += ["--use", *args.use] if args.use else []
    options += ["--batch-size", str(args.batch), "--train-images", str(args.batch)]
    command = [*launcher, sys.executable, "-c", WATCHED, str(SCRIPTS[args.model]), *options]
    before, lines, seconds, losses = kept(cache), [], 0.0, []
    with tempfile.TemporaryDirectory() as runs:
        begin = time.perf_counter()
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(cache)}
        process = subprocess.Popen([*command, "--runs", runs], env=environment, **pipes)
        for line in process.stdout:
            if step := re.search(r"first step: loss (\S+)", line):
                seconds = time.perf_counter() - begin
                losses.append(float(step[1]))
            lines.append(line)
        if process.wait() or len(losses) != ranks:
            raise StartError(f"{' '.join(command)} ended with status {process.returncode}:\n{''.join(lines)}")
    said = next((line.strip() for line in lines if line.startswith("compiling")), "")
    return Start(seconds, losses, said, len(kept(cache).items() - before.items()))


def mpiexec() -> str | None:
    """The launcher beside this Python, or else on PATH."""
    return shutil.which("mpiexec", path=Path(sys.executable).parent) or shutil.which("mpiexec")


def measure(args: argparse.Namespace) -> dict[str, list[Start]]:
    """Every way to start, `--repeat` times, each time with a new cache."""
    ways: dict[str, list[Start]] = {}
    for _ in range(args.repeat):
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            ways.setdefault("cold", []).append(start(args, Path(first)))
            ways.setdefault("warm", []).append(start(args, Path(first)))
            if mpiexec():
                ways.setdefault("two ranks, cold", []).append(start(args, Path(second), ranks=2))
    return ways


def show(args: argparse.Namespace, ways: dict[str, list[Start]]) -> None:
    title = f"{args.model}, width {args.width:g}, batch {args.batch}: from the start to the end of the first step"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    for name, justify in (("", "left"), ("seconds", "right"), ("kernels compiled", "right"), ("said", "left")):
        table.add_column(name, justify=justify)
    for way, starts in ways.items():
        seconds = statistics.median(one.seconds for one in starts)
        table.add_row(way, f"{seconds:.1f}", str(max(one.compiled for one in starts)), starts[0].said)
    Console(width=110, highlight=False).print(table)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=common.TeachingFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", choices=tuple(SCRIPTS), default="alexnet", help="whose training script starts")
    add("--width", type=common.positive, default=1.0, help="scales its channels and features")
    add("--batch", type=common.count, default=128, help="images a step, over all ranks together")
    add("--repeat", type=common.count, default=1, metavar="N", help="starts of each kind: the median")
    add("--use", nargs="+", default=[], metavar="CHOICE", help="given to the script: name=choice")
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    try:
        show(args, measure(args))
    except StartError as error:
        sys.exit(str(error))
