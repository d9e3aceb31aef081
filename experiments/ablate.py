#!/usr/bin/env python
"""What each choice is worth: train with everything on, then with one thing left out at a time.

There is no list of choices here. They are read from the switchboard (python -m nanocnn switches): each primitive that
the training calls is set back to its reference, each switch that it asks to each of its other choices. Then, for the
picture, they are switched on one after the other, the one worth most first, from the textbook's version to the fastest.

Every configuration trains in a process of its own, so that peak memory is that of the process (largest resident set).
They take turns of a few steps (A B C A B C), so that a slow moment of the machine meets them all alike; "time" compares
with the same steps of the first one.

--device cuda does the same on a GPU, with the GPU's memory. --device emulated has no times: it counts what a step asks
for, launches and bytes (counted.py).
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import nanocnn as nc  # before NumPy, whose BLAS reads at import what this sets in the environment
from nanocnn.__main__ import load_board
from nanocnn.kernels import dispatch, threads
from nanocnn.kernels.dispatch import UP_TO, ChoiceError
from nanocnn.machine import machine_facts
from nanocnn.parallel.comm import plural
from nanocnn.progress import say, size

import common  # isort: skip  (beside this file)
from counted import Counted, CountingLaboratory  # isort: skip
from laboratory import WARM_UP, Configuration, Laboratory, Row  # isort: skip
from waterfall import waterfall  # isort: skip

EXAMPLES = """examples:
  python experiments/ablate.py --quick                                   a minute, on built-in images
  python experiments/ablate.py --data cifar10 --seeds 3                  AlexNet: everything, with mean and spread
  python experiments/ablate.py --model resnet18 --only conv2d fuse pool  these alone
  python experiments/ablate.py --primitive conv2d                        one ladder, rung by rung, in a whole training
  python experiments/ablate.py --primitive conv2d conv2d_grad_x conv2d_grad_w   the three climb together
  python experiments/ablate.py --quick --device emulated                 CUDA kernels, counted: launches, bytes

NANOCNN_THREADS sets the number of threads. A configuration that takes too long is cut off by --limit.
"""
MODELS = {"alexnet": "AlexNet", "resnet18": "ResNet-18"}
QUICK = dict(data="shapes", width=0.25, batch_norm=True, batch=32, steps=33, seeds=1, bars=3)
SMALL = dict(width=0.05, batch=2, steps=4)  # and that for the emulator
COUNTED_OFF = {"graph": "off"}  # a graph launches the same kernels, and the emulator counts them as they are launched
TEST_IMAGES = 1000
BASE, TEXTBOOK = "everything on", "textbook"


# ------------------------------------------------------------------ which configurations: what the board says


class AblationError(ChoiceError):
    """What was asked for cannot be measured; the message says why."""


def everything_on(fixed: dict[str, str]) -> dict[str, str]:
    """`fixed`, and "on" for switches that are off unless one asks for them (graph), but for NUMERICS."""
    off = (name for name, s in dispatch.switches.items() if s.default == "off" and "on" in s.choices)
    return {**{name: "on" for name in off if name not in NUMERICS}, **fixed}


def left_out(base: Row, fixed: dict[str, str], only: Sequence[str]) -> tuple[list[Configuration], list[str]]:
    """Everything that `base` used, left out one at a time; and the names on the board that it did not use."""
    found, unused = [], []
    for entry in _entries(only):
        if entry["name"] in fixed:
            continue
        others = _others(entry, base)
        if not others:
            unused.append(entry["name"])
        everything = {**base.configuration.choices, **fixed}
        found += [_one(f"{entry['name']}={choice}", entry, {**everything, entry["name"]: choice}) for choice in others]
    return found, unused


NUMERICS = ("precision", "tf32")  # what changes the numbers themselves is varied only where it is asked for (--only)


def _entries(only: Sequence[str]) -> list[dict[str, Any]]:
    board = dispatch.board()
    names = [entry["name"] for entry in board]
    for name in only:
        if name not in names:
            raise ChoiceError(f"there is no primitive or switch {name!r}; there are: {', '.join(sorted(names))}")
    return [entry for entry in board if (entry["name"] in only if only else entry["name"] not in NUMERICS)]


def _others(entry: dict[str, Any], base: Row) -> list[str]:
    """The choices of a board entry that are another than what `base` used; none if it used none."""
    name, asked = entry["name"], base.look["asked"]
    if entry["kind"] == "switch":
        return [c for c in entry["choices"] if c != asked[name]] if name in asked else []
    return ["reference"] if set(base.calls(name)) - {"reference"} else []


def _one(label: str, entry: dict[str, Any], choices: dict[str, str], policy: str = "fastest") -> Configuration:
    return Configuration(label, policy, choices, entry["place"], entry["about"])


def one_by_one(
    base: Row, out: Sequence[Row], fixed: dict[str, str], only: Sequence[str], bars: int
) -> list[Configuration]:
    """From the textbook to `base`: what was left out comes on again, one after the other, the most worthwhile first.

    The textbook's version is the policy "reference" with the last choice of each switch, which is its plainest; of
    NUMERICS, which are no steps on this way, that of `base`. After `bars` things all the others come on at once: then
    everything is on.
    """
    entries = {entry["name"]: entry for entry in dispatch.board()}
    cost: dict[str, float] = {}
    switches: dict[str, str] = {}
    for row in out:
        name, _, choice = row.configuration.label.partition("=")
        if row.measured and name not in NUMERICS:
            cost[name] = row.figures()["ratio"]  # of several choices that of the last
            if entries[name]["kind"] == "switch":
                switches[name] = choice
    everything = {**base.configuration.choices, **fixed}
    chain = [Configuration(TEXTBOOK, "reference", {**switches, **fixed})]
    order = sorted(cost, key=lambda name: -cost[name])
    for name in order[:bars]:
        entry, choices = entries[name], dict(chain[-1].choices)
        choices[name] = base.look["asked"][name] if entry["kind"] == "switch" else "fastest"
        chain.append(_one(f"+ {name}", entry, choices, "reference"))
    if order and len(order) <= bars and not only:  # with the last one everything is on
        last = chain.pop()
        chain.append(Configuration(last.label, "fastest", everything, last.place, last.about))
    else:
        chain.append(Configuration("+ all the rest", "fastest", everything))
    return chain


def rungs(names: Sequence[str], fixed: dict[str, str], device: str = "cpu") -> list[Configuration]:
    """The ladder of a primitive, or of several that climb together: a rung by the name that they share.

    A rung that cannot do a layer leaves it to the nearest one before it that can.
    """
    _entries(names)
    for name in names:
        if name not in dispatch.primitives:
            raise ChoiceError(f"{name} is a switch, not a primitive: ablate it with --only {name}")
    ladders = {name: dispatch.primitives[name].rungs(device) for name in names}
    found, now = [], dict.fromkeys(names, "reference")
    for rung in dict.fromkeys(rung for ladder in ladders.values() for rung in ladder):
        now |= {name: rung for name, ladder in ladders.items() if rung in ladder}
        first = next(variants[rung] for variants in ladders.values() if rung in variants)
        choices = {**fixed, **{name: UP_TO + last for name, last in now.items()}}
        about = (first.__doc__ or "").strip().partition("\n")[0]
        found.append(Configuration(f"{names[0]}={rung}", "fastest", choices, first.place, about))
    return found


# ------------------------------------------------------------------ the table and the files


def show(rows: Sequence[Row], base: Row, first: str, console: Console, shares: dict[str, str] | None = None) -> None:
    """Print a table of `rows`, compared with `base`; `shares` says by label how many calls a rung does."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column(first, no_wrap=True, style="bold")
    counts = isinstance(base, Counted)
    headings = COUNTS if counts else TIMES
    for heading in (*headings, "calls") if shares else headings:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    for row in (r for r in rows if r.measured):
        f, label, place = row.figures(), row.configuration.label, row.configuration.place
        ratio = "" if row is base else f"{f['ratio']:.2f}x"
        done = [shares.get(label, "")] if shares else []
        table.add_row(label, *(_counts(f, ratio) if counts else _times(f, ratio)), *done, place)
    console.print(table)
    if counts:
        console.print(Text(ABOUT_COUNTS, "dim"))
    for row in rows:
        if row.error:
            console.print(Text(f"{row.configuration.label} failed: {row.error}", "red"))


TIMES = ("ms/step", "min", "time", "memory", "accuracy")
COUNTS = ("MB", "ratio", "kernels", "NumPy", "turns", "barriers", "loss")
ABOUT_COUNTS = (
    "One step, counted in the emulator and not measured. MB: the sectors that our kernels ask for, and the arrays of "
    "NumPy's calls (CuPy's on a GPU), each once. turns: of shared memory's banks."
)


def _times(f: dict[str, Any], ratio: str) -> list[str]:
    spread = f" ±{f['ms_spread']:.1f}" if f["ms_spread"] is not None else ""
    accuracy = "cut off" if f["accuracy"] is None else f"{f['accuracy']:.1%}"
    if f["accuracy"] is not None and f["accuracy_spread"] is not None:
        accuracy += f" ±{f['accuracy_spread'] * 100:.1f}"
    return [f"{f['ms']:.1f}{spread}", f"{f['ms_min']:.1f}", ratio, size(f["memory"]), accuracy]


def _counts(f: dict[str, Any], ratio: str) -> list[str]:
    numbers = (f"{f[name]:,}" for name in ("kernels", "calls", "turns", "barriers"))
    return [f"{f['megabytes']:.2f}", ratio, *numbers, f"{f['loss']:.4f}"]


COLUMNS = (
    *("kind", "label", "seeds", "ms", "ms_min", "ms_spread", "ratio", "memory"),
    *("accuracy", "accuracy_spread", "loss", "loss_spread", "place", "about", "error"),
)


COUNTED_COLUMNS = (
    *("kind", "label", "seed", "megabytes", "ratio", "kernels", "sectors", "calls", "turns", "barriers"),
    *("loss", "place", "about", "error"),
)


def write(folder: Path, groups: dict[str, list[Row]], facts: dict[str, Any]) -> None:
    """Write all figures as ablation.csv, one line a configuration, and with each single step as ablation.json."""
    lines, whole = [], []
    for kind, rows in groups.items():
        for row in rows:
            c, found = row.configuration, row.figures()
            lines.append(dict(kind=kind, label=c.label, place=c.place, about=c.about, error=row.error) | found)
            whole.append(lines[-1] | dict(policy=c.policy, choices=c.choices, look=row.look, samples=row.samples))
    with open(folder / "ablation.csv", "w", newline="") as file:
        counts = any(isinstance(row, Counted) for rows in groups.values() for row in rows)
        columns = COUNTED_COLUMNS if counts else COLUMNS
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)
    facts = facts | dict(command=common.without_folder(sys.argv[1:]), machine=machine_facts(), configurations=whole)
    (folder / "ablation.json").write_text(json.dumps(facts, indent=1, default=str))


# ------------------------------------------------------------------ the whole


def ablate(args: argparse.Namespace) -> None:
    """Measure, print, write, draw."""
    load_board()
    policy, fixed = dispatch.parse_use(args.use)
    if policy:
        raise ChoiceError(f"--use {policy[0]}: the policy is what is measured here; give name=choice")
    with nc.using(**fixed):  # an unknown name is an error now, and not in another process
        _entries(args.only)
        if args.device == "emulated":
            fixed = {**COUNTED_OFF, **fixed}
        ladder = rungs(args.primitive, everything_on(fixed), args.device) if args.primitive else []
    try:
        nc.Tensor([0.0]).to(args.device)
    except dispatch.DeviceError as error:
        raise AblationError(f"--device {args.device}: {error}") from error
    data = nc.data.load(args.data, args.data_dir, val=0, train_size=args.steps * args.batch, test_size=TEST_IMAGES)
    device = [args.device] if args.device != "cpu" else []
    name = "-".join(["ablate", args.model, data.name, *args.primitive[:1], *device])
    folder = args.out or Path("runs", name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise AblationError(f"cannot make {folder}: {error.strerror}; choose another --out") from error
    title = f"{MODELS[args.model]}, width {args.width:g}, batch {args.batch}, {data.name}"
    title += f", {plural(threads.count(), 'thread')}" if args.device == "cpu" else f", {args.device}"
    say(f"{data.notice}\n{title}; {args.steps} steps, {plural(args.seeds, 'seed')}")

    kind = CountingLaboratory if args.device == "emulated" else Laboratory
    laboratory, console = kind(args.model, data, vars(args)), Console()
    if not console.is_terminal:
        console.width = 100 if args.device == "cpu" else 116
    (base,) = laboratory.look([Configuration(BASE, "fastest", everything_on(fixed))])
    if base.error:
        raise AblationError(f"with everything on, training fails: {base.error}")
    if ladder:
        groups, end = _climb(laboratory, base, ladder, args, console), "the whole ladder"
    else:
        groups, end = _leave_out(laboratory, base, fixed, args, console), BASE
    *_, last = groups.values()
    steps = [(row.configuration.label, row.configuration.place, row.cost) for row in last if row.measured]
    unit = "MB" if args.device == "emulated" else "ms"
    fall = [{"label": label, "place": place, unit: cost} for label, place, cost in steps]
    write(folder, groups, dict(title=title, options=vars(args), waterfall=fall))
    if steps:
        waterfall(steps, title, end, folder / "waterfall.png", unit)
    say(f"files: {folder}/ablation.json, ablation.csv, waterfall.png")


def _leave_out(
    laboratory: Laboratory, base: Row, fixed: dict[str, str], args: argparse.Namespace, console: Console
) -> dict[str, list[Row]]:
    """Everything left out one at a time, then switched on one after the other; the rows by kind."""
    without, unused = left_out(base, fixed, args.only)
    out: list[Row] = [laboratory.row(c) for c in without]
    laboratory.run(base, out, "left out")
    out.sort(key=lambda row: -row.figures()["ratio"] if row.measured else 0)
    show([base, *out], base, "left out", console)
    if unused:
        console.print(Text(f"not used here: {', '.join(unused)}", "dim"))
    chain: list[Row] = [laboratory.row(c, base.look) for c in one_by_one(base, out, fixed, args.only, args.bars)]
    laboratory.run(chain[-1], chain[:-1], "one by one")
    show(chain, chain[-1], "one after the other", console)
    return {"base": [base], "left out": out, "one by one": chain}


def _climb(
    laboratory: Laboratory, base: Row, ladder: list[Configuration], args: argparse.Namespace, console: Console
) -> dict[str, list[Row]]:
    """A ladder, rung by rung, less the rungs that no layer can use; the rows by kind."""
    climbing, idle, shares = [], [], {}
    for row in laboratory.look(ladder):
        rung = row.configuration.label.partition("=")[2]
        of_primitives = [row.calls(name) for name in args.primitive if row.look]
        done, calls = sum(c.get(rung, 0) for c in of_primitives), sum(sum(c.values()) for c in of_primitives)
        if done or row.error:
            climbing.append(row)
            shares[row.configuration.label] = f"{done}/{calls}"
        else:
            idle.append(row.configuration.label)
    if not climbing:
        raise AblationError(f"{args.model} calls no {' or '.join(args.primitive)}: there is nothing to climb")
    laboratory.run(base, climbing, "rungs")
    show([base, *climbing], base, "rung", console, shares)
    if idle:
        console.print(Text(f"not used here, no layer is theirs: {', '.join(idle)}", "dim"))
    return {"base": [base], "rungs": climbing}


def arguments() -> argparse.Namespace:
    """The options; `--quick` sets new defaults, so what is said beside it still holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=common.TeachingFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what").add_argument
    add("--only", nargs="+", default=[], metavar="NAME", help="the primitives and switches to leave out")
    add("--primitive", nargs="+", default=[], metavar="NAME", help="measure its ladder instead, rung by rung")
    add("--use", nargs="+", default=[], metavar="CHOICE", help="name=choice that holds throughout")
    add("--bars", type=common.count, default=8, metavar="N", help="how many are switched on singly for the picture")
    add = parser.add_argument_group("training").add_argument
    about = "emulated counts what CUDA kernels do; cuda times them, and was not yet tried on a GPU"
    add("--device", choices=tuple(dispatch.DEVICES), default="cpu", help=about)
    add("--model", choices=tuple(MODELS), default="alexnet", help="the network")
    add("--width", type=common.positive, default=1.0, help="scales its channels and features")
    add("--batch-norm", action="store_true", help="in AlexNet, after each convolution")
    add("--dropout", type=common.fraction, default=0.2, help="in AlexNet's classifier")
    add("--batch", type=common.count, default=128, help="images a step")
    add(
        "--lr",
        type=common.positive,
        default=0.02,
        help="peak of a cosine over the steps, after a warm-up; SGD, momentum 0.9",
    )
    add("--data", default="shapes", help="shapes (built in), cifar10, mnist, or auto")
    add("--data-dir", help="where the files are; else $NANOCNN_DATA, else data/")
    add("--no-augment", action="store_true", help="no random crops and flips")
    add = parser.add_argument_group("measurement").add_argument
    add("--steps", type=common.count, default=30, help=f"of each configuration, {WARM_UP} of them to warm up")
    add("--seeds", type=common.count, default=1, help="rounds; in each, all configurations train once")
    add("--seed", type=common.natural, default=0, help="the first one")
    add("--limit", type=common.positive, default=120.0, metavar="S", help="cut a training off after S seconds")
    quick, small = (", ".join(f"{n.replace('_', '-')} {value}" for n, value in d.items()) for d in (QUICK, SMALL))
    add("--quick", action="store_true", help=f"a minute: {quick}; emulated: {small}")
    add("--out", type=Path, metavar="DIR", help="for the files; else runs/ablate-MODEL-DATA")
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
        if parser.parse_known_args()[0].device == "emulated":
            parser.set_defaults(**SMALL)
    args = parser.parse_args()
    if args.steps <= WARM_UP:
        parser.error(f"--steps {args.steps}: expected more than the {WARM_UP} that warm up")
    if args.primitive and args.only:
        parser.error("--primitive climbs a ladder and --only leaves things out: one at a time")
    return args


if __name__ == "__main__":
    args = arguments()
    comm = common.connect()
    with common.plain_errors(comm):
        if comm.size > 1:
            raise AblationError("it measures one process at a time: run it without mpiexec")
        ablate(args)
