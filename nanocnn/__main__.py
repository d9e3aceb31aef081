"""`python -m nanocnn`: the commands.

A command is one function, named as the command and listed in COMMANDS: it adds its arguments to a parser and returns
what to run, which returns the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

import nanocnn

from . import bench as ladders
from . import doctor as medic
from .kernels import dispatch

Run = Callable[[argparse.Namespace], int]

EXAMPLES = """\
examples:
  python -m nanocnn doctor                        what this machine has, what to install for more
  python -m nanocnn doctor --json > machine.json  the same for a program
  python -m nanocnn switches                      every choice: its names, what they do, file and line
  python -m nanocnn switches --use reference im2col=numba
                                                  the same with these choices made: a spelling check for --use
  python -m nanocnn bench conv2d                  the whole ladder of a primitive, measured and drawn under the roof

Every script takes the same --use: a policy (fastest, tuned, reference), then name=choice as often as you like.
"""


def doctor(parser: argparse.ArgumentParser) -> Run:
    """say what this machine has and what to install for more"""
    parser.add_argument("--json", action="store_true", help="print JSON: ok, findings, facts")
    return lambda args: medic.report(as_json=args.json)


def switches(parser: argparse.ArgumentParser) -> Run:
    """print the board: every primitive and switch, its choices, where each is"""
    parser.add_argument(
        "--use", nargs="+", default=[], metavar="CHOICE", help="a policy and name=choice pairs to try out"
    )
    parser.add_argument("--json", action="store_true", help="print JSON: policy, board")

    def run(args: argparse.Namespace) -> int:
        load_board()
        try:
            policy, choices = dispatch.parse_use(args.use)
            with dispatch.using(*policy, **choices):
                show_board(args.json)
        except dispatch.ChoiceError as error:
            print(f"python -m nanocnn switches: {error}", file=sys.stderr)
            return 2
        return 0

    return run


def bench(parser: argparse.ArgumentParser) -> Run:
    """measure the ladder of one primitive for a shape, against the reference and against what the machine can do"""
    ladders.add_arguments(parser)
    return ladders.run


COMMANDS = (doctor, switches, bench)


def load_board() -> None:
    """Import all of nanocnn: a switch is known once its file is read."""
    for module in pkgutil.walk_packages(nanocnn.__path__, "nanocnn."):
        if module.name != "nanocnn.__main__" and not module.name.startswith(
            "nanocnn.kernels."
        ):  # those load themselves
            importlib.import_module(module.name)


def show_board(as_json: bool) -> None:
    """Print the board as it is now: a table of primitives, each with its ladder of variants, and one of switches."""
    policy, rows = dispatch.choices_in_force()["policy"], dispatch.board()
    if as_json:
        print(json.dumps(dict(policy=policy, board=rows), indent=2))
        return
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(Text(f"policy: {policy} ({dispatch.POLICIES[policy]})"))
    for kind, title in (
        ("primitive", "Primitives: the reference first, then the ladder"),
        ("switch", "Switches: the default first"),
    ):
        table = Table("name", "choice", "what it does", "where", title=title, title_justify="left", title_style="bold")
        table.box = SIMPLE_HEAD
        for column in table.columns:
            column.overflow = "fold"
        table.columns[0].no_wrap = True  # a name is looked for, and typed
        for row in (r for r in rows if r["kind"] == kind):
            current = row["current"]
            own_policy = current if current not in (policy, *row["choices"]) else ""
            table.add_row(Text(row["name"], "bold"), Text(own_policy, "green"), Text(row["about"]), row["place"])
            for choice, text in row["choices"].items():
                about, _, place = text.rpartition(" (") if kind == "primitive" else (text, "", "")
                place = place.rstrip(")")
                if place == row["place"]:  # the reference, whose description is the primitive's
                    about, place = "plain NumPy or CuPy code", ""
                mark = Text(f"* {choice}", "green") if choice == current else Text(f"  {choice}")
                table.add_row("", mark, Text(about), place)
            table.add_section()
        console.print(table)
    console.print("* chosen. Choose with --use name=choice in a script, with nc.using(name=choice) in code.")
    console.print("name=upto:rung is the rung where it can do the call, else the nearest one before it that can.")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; its exit status. argparse itself exits with 2 on words that it does not know."""
    parser = argparse.ArgumentParser(
        prog="python -m nanocnn",
        description="nanocnn: train convolutional networks, and see what makes it fast.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        about = command.__doc__
        sub = commands.add_parser(command.__name__, help=about, description=about)
        sub.set_defaults(run=command(sub))
    args = parser.parse_args(argv)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
