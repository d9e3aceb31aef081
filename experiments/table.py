#!/usr/bin/env python
"""Write the measured tables into README.md from the result files in docs/measurements/, so that nobody types a figure.

A table stands between two comments, and everything between them is written anew:

    <!-- table: networks -->   training and inference, in nanocnn and in other frameworks
    <!-- table: layers -->     the networks' convolutions one by one
    <!-- table: pytorch -->    nanocnn's time over PyTorch's, a column for each number of threads and each folder
    <!-- /table -->

A result file is the vs_peers.json of `python experiments/vs_peers.py`, copied to docs/measurements/ under any name.
Files of several runs (another batch, another number of threads) make one table together. What was measured in another
way, on fewer instructions for example, goes to a folder of its own in there, which the table `pytorch` alone reads.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from peers import _report  # isort: skip  (beside this file)

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- /table -->)", re.S)


class TableError(ValueError):
    """The README or a result file is not what a table can be made from."""


def results(folder):
    """The vs_peers results in a folder and in its folders, each with their name as "folder", or "" in the first.

    Other JSON files are left out. Raises TableError on a broken file.
    """
    found = []
    for path in [*sorted(Path(folder).glob("*.json")), *sorted(Path(folder).glob("*/*.json"))]:
        try:
            result = json.loads(path.read_text())
        except ValueError as error:
            raise TableError(f"{path}: no JSON: {error}") from None
        if isinstance(result, dict) and result.get("kind") == "vs_peers":
            if result["width"] != 1:
                raise TableError(f"{path} measured networks of width {result['width']:g}: a table is of the whole ones")
            found.append({**result, "folder": path.parent.name if path.parent != Path(folder) else ""})
    return found


def networks(runs):
    """Rows: network, mode, batch, threads. Columns: each framework in its best setting, and ours over the best."""
    cells, titles, settings, runs = {}, {}, {}, _here(runs)
    for run in runs:
        for entry in run["networks"]:
            key = entry["model"], entry["mode"], run["batch"], run["threads"]
            if key in cells:
                raise TableError(f"two result files measured {', '.join(map(str, key))}: keep one of them")
            cells[key] = {row["peer"]: row for row in sorted(entry["rows"], key=lambda row: -row["median"])}
            titles.update({name: peer["title"] for name, peer in run["peers"].items()})
            for row in entry["rows"]:
                settings.setdefault(row["peer"], {})[row["setting"]] = None
    names = [name for name in titles if any(name in row for row in cells.values())]
    several = len({key[3] for key in cells}) > 1
    header = ["ms: median (minimum)", *(titles[name] for name in names), "ours / PyTorch", "ours / best"]
    lines = []
    for (model, mode, batch, threads), row in cells.items():
        what = f"{_report.MODELS[model]}, {_report.MODES[mode]}, batch {batch}"
        what += f", {_threads(threads)}" if several else ""
        times = [f"{_ms(row[name]['median'])} ({_ms(row[name]['minimum'])})" if name in row else "" for name in names]
        best = _report.best(list(row.values()))
        ratios = [_ratio(row["ours"], other) for other in (row.get("pytorch"), best)]
        lines.append([what, f"**{times[0]}**", *times[1:], *ratios])
    tried = "; ".join(f"{titles[name]}: {', '.join(s)}" for name, s in settings.items() if len(s) > 1)
    note = f" Each framework's best setting by median, of these ({tried})." if tried else ""
    return _markdown(header, lines) + _footer([run for run in runs if run["networks"]], note)


def layers(runs):
    """Rows: layers. Columns: for each direction our median in ms, and its ratios to PyTorch and to the best of all."""
    cells, share, runs = {}, {}, _here(runs)
    for run in runs:
        for entry in run["layers"]:
            key = entry["layer"], run["batch"], run["threads"]
            row = cells.setdefault(key, {})
            if entry["direction"] in row:
                raise TableError(f"two result files measured {', '.join(map(str, key))}: keep one of them")
            rows = entry["rows"]
            ratios = [_ratio(rows[0], other) for other in (_report.best(rows, "pytorch"), _report.best(rows)) if other]
            row[entry["direction"]] = f"{_ms(rows[0]['median'])} ({', '.join(ratios)})"
            share[key] = f", batch {run['batch']}, {run['threads']} threads"
    several = len(set(share.values())) > 1
    header = ["our median in ms (ours / PyTorch, ours / best of all)", "forward", "gradient of x", "gradient of w"]
    lines = [
        [key[0] + (share[key] if several else ""), *(row.get(direction, "") for direction in _report.DIRECTIONS)]
        for key, row in cells.items()
    ]
    return _markdown(header, lines) + _footer([run for run in runs if run["layers"]], "")


def pytorch(runs):
    """Rows: network, mode, batch. Columns: ours over PyTorch, each in its best setting, by threads and folder."""
    cells, columns = {}, {}
    for run in runs:
        column = _threads(run["threads"]) + (f", {run['folder']}" if run["folder"] else "")
        for entry in run["networks"]:
            other = _report.best(entry["rows"], "pytorch")
            if not other:
                continue
            what = f"{_report.MODELS[entry['model']]}, {_report.MODES[entry['mode']]}, batch {run['batch']}"
            row = cells.setdefault(what, {})
            if column in row:
                raise TableError(f"two result files measured {what}, {column}: keep one of them")
            row[column] = _ratio(_report.best(entry["rows"], "ours"), other)
            columns[column] = None
    header = ["nanocnn / PyTorch, median", *columns]
    lines = [[what, *(row.get(column, "") for column in columns)] for what, row in cells.items()]
    return _markdown(header, lines)


TABLES = {"networks": networks, "layers": layers, "pytorch": pytorch}


def _here(runs):
    """The results that lie in no folder of their own."""
    return [run for run in runs if not run["folder"]]


def _threads(count):
    return f"{count} thread{'s' * (count > 1)}"


def _ms(seconds):
    """Milliseconds with three digits."""
    ms = seconds * 1e3
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def _ratio(ours, other):
    return f"{ours['median'] / other['median']:.2f}" if other else ""


def _markdown(header, lines):
    if not lines:
        raise TableError("no result for this table in docs/measurements/: run experiments/vs_peers.py, copy its JSON")
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, rule, *lines])


def _footer(runs, note):
    """Where, when, with what versions and by which commands this was measured."""
    places = {f"{run['machine']['processor']['name']}, {run['threads']} threads, {run['date']}": None for run in runs}
    versions = {
        f"{package} {version}": None for run in runs for peer in run["peers"].values() for package, version in
        peer["versions"].items()
    }  # fmt: skip
    commands = {f"`{run['command']}`": None for run in runs}
    return (
        f"\nMeasured in float32 on {'; '.join(places)}.{note} Below 1.00 nanocnn is faster.\n"
        f"Versions: {', '.join(versions)}. Command: {', '.join(commands)}.\n"
    )


def updated(text, runs):
    """The README's text with every marked table written anew. Raises TableError if there is none, or an unknown one."""

    def table(match):
        if match[2] not in TABLES:
            raise TableError(f"<!-- table: {match[2]} -->: expected one of {', '.join(TABLES)}")
        return match[1] + TABLES[match[2]](runs) + match[3]

    if text.count("<!-- table:") != text.count("<!-- /table -->") or text.count("<!-- table:") == 0:
        raise TableError("expected <!-- table: NAME --> and, for each of them, <!-- /table -->")
    return MARKED.sub(table, text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", default=ROOT / "README.md", type=Path, metavar="FILE", help="the page to write")
    folder = ROOT / "docs" / "measurements"
    parser.add_argument("--results", default=folder, type=Path, metavar="DIR", help="where the JSON files are")
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if the page is not up to date")
    args = parser.parse_args()
    try:
        old = args.readme.read_text()
        new = updated(old, results(args.results))
    except (OSError, TableError) as error:
        sys.exit(f"{args.readme}: {error}")
    if args.check:
        if new != old:
            command = f"python experiments/table.py --readme {args.readme}"
            sys.exit(f"{args.readme} is not what the result files say: run {command}")
    else:
        args.readme.write_text(new)


if __name__ == "__main__":
    main()
