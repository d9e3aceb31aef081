#!/usr/bin/env python
"""Everything that is claimed of GPUs, tried on one: are the results right, and how long does it take?

Sections run one after the other, each in a process of its own with a limit of seconds: one that fails or hangs costs
its own rows and no others. All of them together take less than nine minutes. Nothing is downloaded and nothing
installed: it needs NumPy, CuPy and Numba, and compares with PyTorch where that is there.

A JSON file has every row, a text file the same to read. The exit status is 1 if a check failed or a section did.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nanocnn as nc  # before NumPy, whose BLAS reads at import what this sets in the environment
from nanocnn.kernels import dispatch
from nanocnn.machine import machine_facts
from nanocnn.parallel.comm import plural
from nanocnn.progress import duration, say

import common  # isort: skip  (beside this file)
from proof import Context, sections  # isort: skip
from proof import correct, speed, training  # noqa: F401  # isort: skip  (which put their sections on the list)

EXAMPLES = """examples:
  python experiments/gpu_proof.py                             on a machine with a GPU: under nine minutes
  python experiments/gpu_proof.py --only kernels              some sections alone
  python experiments/gpu_proof.py --device emulated --quick   without a GPU: does the script itself work?
"""
BUDGET = 530.0  # seconds for all sections together
BEGINS = 5.0  # seconds that a section's process may take to begin: it is told of so many less
SLOWER = 4  # limits are for a GPU; the emulator, which may have kernels to compile first, gets as many times more


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=common.TeachingFormatter, allow_abbrev=False
    )
    names = ", ".join(sections)
    parser.add_argument("--device", choices=("cuda", "emulated"), default="cuda", help="where the kernels run")
    parser.add_argument("--quick", action="store_true", help="few shapes, small networks")
    parser.add_argument("--only", nargs="+", choices=tuple(sections), metavar="SECTION", help=f"of {names}")
    about = f"seconds for all of it (on the emulator {SLOWER} times as many)"
    parser.add_argument("--budget", type=common.positive, default=BUDGET, metavar="S", help=about)
    parser.add_argument("--out", type=Path, default=Path("runs", "gpu_proof"), metavar="DIR", help="for the reports")
    parser.add_argument("--seconds", type=common.positive, default=BUDGET, help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=tuple(sections), help=argparse.SUPPRESS)
    parser.add_argument("--sanitized", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------ a section in a process of its own


def work(args):
    """Write each row of a section as soon as it is there: what comes before a crash is kept."""
    context = Context(args.device, args.quick, time.monotonic() + args.seconds, args.sanitized)
    with open(args.out / f"{args.worker}.jsonl", "w") as file:
        for row in sections[args.worker].rows(context):
            file.write(json.dumps(row, default=str) + "\n")
            file.flush()


def run(args, name, seconds):
    """The section's rows and how it ended: "" or what went wrong."""
    command = [sys.executable, __file__, "--worker", name, "--device", args.device, "--out", str(args.out)]
    command += ["--seconds", f"{max(1.0, seconds - BEGINS):.0f}", *["--quick"] * args.quick]
    path = args.out / f"{name}.jsonl"
    path.unlink(missing_ok=True)
    start, wrong, words = time.perf_counter(), "", ""
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True
    )
    try:
        words, _ = process.communicate(timeout=seconds)
        if process.returncode:
            last = (words.strip() or "no word").splitlines()[-1]
            wrong = f"ended with status {process.returncode}: {last}"
    except subprocess.TimeoutExpired:
        wrong = f"ended after {seconds:.0f} s, its limit"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it has started
        process.wait()
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    path.unlink(missing_ok=True)
    found = dict(rows=rows, wrong=wrong, seconds=time.perf_counter() - start, about=sections[name].about)
    return found | (dict(output=words) if wrong else {})


# ------------------------------------------------------------------ the reports


def verdict(found):
    """A section in a few words."""
    checks = [row["ok"] for row in found["rows"] if "ok" in row]
    idle = sum(not row.get("ran", True) for row in found["rows"])
    rest = len(found["rows"]) - len(checks) - idle
    words = [f"{sum(checks)} of {len(checks)} checks passed"] if checks else []
    words += [plural(rest, "row")] if rest else []
    words += [f"{idle} not run"] if idle else []
    return ", ".join([*words, *filter(None, [found["wrong"]])]) or "nothing"


def passed(found):
    return bool(found["rows"]) and not found["wrong"] and all(row.get("ok", True) for row in found["rows"])


def outcome(found):
    if passed(found) and not any(row.get("ran", True) for row in found["rows"]):
        return "not run"
    return "passed" if passed(found) else "FAILED"


def text_of(results, facts):
    """The report to read: a summary, then each section's rows as columns."""
    lines = [f"gpu_proof, {facts['date']}, device {facts['device']}{', quick' * facts['quick']}", ""]
    for name, found in results.items():
        lines.append(f"{outcome(found):7}  {name}: {verdict(found)} ({found['seconds']:.0f} s)")
    for name, found in results.items():
        lines += ["", f"== {name}: {found['about']}", *columns(found["rows"])]
    return "\n".join(lines) + "\n"


def columns(rows):
    """Rows as lines with aligned columns; notes at the end of theirs."""
    heads = list(dict.fromkeys(key for row in rows for key in row if key != "note"))
    table = [heads, *([word(row.get(head)) for head in heads] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for row, cells in zip([{}, *rows], table, strict=True):
        line = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        yield f"  {line}  {row.get('note', '')}".rstrip()


def word(value):
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def main(args):
    try:
        nc.Tensor([0.0]).to(args.device)
    except dispatch.DeviceError as error:
        raise SystemExit(f"gpu_proof: {error}") from error
    args.out.mkdir(parents=True, exist_ok=True)
    facts = dict(kind="gpu_proof", date=time.strftime("%Y-%m-%d"), device=args.device, quick=args.quick)
    facts |= dict(command=common.without_folder(sys.argv[1:]), machine=machine_facts(probe=True))
    results, start, slower = {}, time.perf_counter(), SLOWER if args.device == "emulated" else 1
    names = list(args.only or sections)
    for number, name in enumerate(names, 1):
        left = args.budget * slower - (time.perf_counter() - start)
        later = sum(sections[other].seconds for other in names[number:]) * slower
        say(f"{name}: {sections[name].about}")
        if left < 1:
            results[name] = dict(rows=[], wrong="the budget was spent", seconds=0.0, about=sections[name].about)
        else:
            # Its own seconds, and what the sections before it did not need.
            results[name] = run(args, name, min(left, max(sections[name].seconds * slower, left - later)))
        say(f"  {verdict(results[name])} ({duration(results[name]['seconds'])})")
        # After each section: who is killed in the middle leaves what there was.
        (args.out / "gpu_proof.json").write_text(json.dumps(facts | dict(sections=results), indent=1, default=str))
        (args.out / "gpu_proof.txt").write_text(text_of(results, facts))
    say(f"{duration(time.perf_counter() - start)}; reports: {args.out}/gpu_proof.json, gpu_proof.txt")
    return 0 if all(map(passed, results.values())) else 1


if __name__ == "__main__":
    args = arguments()
    if args.worker:
        work(args)
    else:
        sys.exit(main(args))
