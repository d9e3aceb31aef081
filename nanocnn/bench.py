"""The ladder of one primitive, measured, printed and drawn.

    from nanocnn import bench

    results = bench.ladder("conv2d", *bench.arguments("conv2d", bench.shape_of("resnet18.layer2")))
    bench.print_ladder(results, bench.peaks())
    bench.draw(results, bench.peaks(), "conv2d.png")

`python -m nanocnn bench conv2d --layer resnet18.layer2` does the same from the shell, and makes the arrays itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numba
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import sweep, traffic
from .example_calls import LAYERS, BenchError, Shape, arguments, can_make, shape_of
from .kernels import dispatch, threads
from .kernels.half import dtype_of
from .ladder import ROUNDS, TOLERANCES, Result, ladder
from .machine import machine_facts
from .roofline import Peaks, draw, peaks

__all__ = ["BenchError", "Peaks", "Result", "Shape", "arguments", "draw", "ladder", "peaks", "print_ladder", "shape_of"]

# ------------------------------------------------------------------ the table


def print_ladder(results: Sequence[Result], peaks: Peaks, console: Console | None = None) -> None:
    """Print the ladder: times, rates, share of the peak, speed-up over the first rung that was measured, error."""
    console = console or Console()
    if not console.is_terminal:
        console.width = 100
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("rung", style="bold", no_wrap=True)
    for heading in ("median ms", "min ms", "GFLOP/s", "of peak", "GB/s", "speed-up", "error"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("where", overflow="fold")
    first = next((r for r in results if r.seconds), None)
    for r in results:
        if first is None or not r.seconds:
            continue
        rate = (f"{r.gflops:,.1f}", f"{r.gflops / peaks.gflops:.1%}") if r.flops else ("", "")
        moved = f"{r.gb_per_s:,.1f}" if r.bytes else ""
        times = f"{r.median * 1e3:,.3f}", f"{r.minimum * 1e3:,.3f}"
        table.add_row(r.variant, *times, *rate, moved, f"{first.median / r.median:.2f}x", f"{r.error:.1e}", r.place)
    console.print(table)
    for r in (r for r in results if not r.seconds):
        console.print(Text(f"not measured: {r.variant} ({r.place}): {r.note}", "red" if r.wrong else "dim"))
    console.print(
        f"peak {peaks.gflops:,.0f} GFLOP/s, memory {peaks.bandwidth:,.0f} GB/s, measured now: {peaks.threads} "
        f"thread{'s' * (peaks.threads > 1)}, {peaks.dtype}, {peaks.isa}. Rates count the direct algorithm's operations "
        "and the least bytes that must move. error: largest difference from float64 over largest value."
    )


# ------------------------------------------------------------------ the command

EXAMPLES = """\
examples:
  python -m nanocnn bench conv2d                           128 images of 32x32, 64 channels to 64, 3x3
  python -m nanocnn bench conv2d --layer resnet18.layer2   the shape of a layer; other options change it
  python -m nanocnn bench conv2d_grad_w --channels 3 --kernel 7 --stride 2 --padding 3
  python -m nanocnn bench matmul 128 4096 4096             M K N
  python -m nanocnn bench relu --size 64 --threads 1       any primitive: its images have the same options
  python -m nanocnn bench matmul 128 128 128 --device emulated --lines
                                                           the CUDA kernels: loads, sectors, bank conflicts
  python -m nanocnn bench matmul 256 256 256 --device emulated --sweep
                                                           their launches: other tiles, other blocks
  python -m nanocnn bench                                  what can be measured, and the named layers

Speed-up is over the first rung, the reference. More GFLOP/s than the peak means fewer operations: Winograd.
"""
SIZES = (
    ("batch", "N", "images"),
    ("size", "PX", "height and width of an image"),
    ("channels", "C", "of the images"),
    ("out_channels", "O", "of the convolution's output"),
    ("kernel", "K", "height and width of the window"),
    ("stride", "S", "pixels between two windows"),
    ("padding", "P", "zeros on each side"),
    ("dilation", "D", "pixels between two of a window"),
    ("groups", "G", "of channels that see only each other"),
)
HALVES = {"float16": "fp16", "bfloat16": "bf16"}  # for CUDA kernels
DTYPES = (*TOLERANCES, *HALVES)
PICTURES = (".png", ".svg", ".pdf")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.formatter_class, parser.epilog = argparse.RawDescriptionHelpFormatter, EXAMPLES
    parser.add_argument("primitive", nargs="?", help="its name on the board; without it, what there is")
    parser.add_argument("product", nargs="*", type=int, metavar="M K N", help="sizes of a matmul (1024 1024 1024)")
    shape = parser.add_argument_group("shape")
    shape.add_argument("--layer", metavar="NAME", help="of a network: resnet18.layer2, alexnet.conv1 ...")
    for name, metavar, about in SIZES:
        option = "--" + name.replace("_", "-")
        shape.add_argument(option, type=int, metavar=metavar, help=f"{about} ({getattr(Shape, name)})")
    how = parser.add_argument_group("measurement")
    how.add_argument("--dtype", choices=DTYPES, default="float32", help="of all arrays (float32)")
    how.add_argument(
        "--device",
        choices=tuple(dispatch.DEVICES),
        default="cpu",
        help="emulated: count what CUDA kernels do; cuda: only with --sweep",
    )
    how.add_argument("--lines", action="store_true", help="of CUDA kernels, count each line")
    how.add_argument("--sweep", action="store_true", help="of CUDA kernels, try each launch configuration")
    how.add_argument("--threads", type=int, metavar="T", help="for BLAS and Numba; else as everywhere in nanocnn")
    how.add_argument("--rounds", type=int, default=ROUNDS, metavar="R", help=f"visits to each rung, in turn ({ROUNDS})")
    how.add_argument("--limit", type=float, default=10.0, metavar="S", help="skip rungs that take longer a call (10)")
    how.add_argument("--use", nargs="+", default=[], metavar="CHOICE", help="for what the rungs call: matmul=reference")
    how.add_argument(
        "--out", type=Path, metavar="FILE", help="the picture; else runs/bench/NAME.png. JSON goes beside it"
    )


def run(args: argparse.Namespace) -> int:
    """Measure, print, draw; the exit status: 1 if a rung computes something wrong, 2 if nothing could be measured."""
    console = Console()
    if not console.is_terminal:
        console.width = 100
    if args.primitive is None:
        console.print("[bold]primitives[/]  " + ", ".join(can_make()), highlight=False)
        console.print("[bold]layers[/]      " + ", ".join(LAYERS), highlight=False)
        return 0
    try:
        if args.sweep or args.device == "cuda":
            return _sweep(args, console)
        if args.device == "emulated":
            return _count(args, console)
        out = _out(args)
        results, roof = _measure(args, console)
    except (BenchError, dispatch.ChoiceError, dispatch.DeviceError) as error:
        print(f"python -m nanocnn bench: {error}", file=sys.stderr)
        return 2
    print_ladder(results, roof, console)
    try:
        if any(r.seconds for r in results):
            draw(results, roof, out)
        facts = dict(results=[r.as_dict() for r in results], peaks=dataclasses.asdict(roof), command=sys.argv[1:])
        facts |= dict(choices=dispatch.choices_in_force(), machine=machine_facts())
        out.with_suffix(".json").write_text(json.dumps(facts, indent=1, default=str))
    except OSError as error:
        print(f"python -m nanocnn bench: cannot write {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    console.print(f"picture: {out}, figures: {out.with_suffix('.json')}", highlight=False, soft_wrap=True)
    return 1 if any(r.wrong for r in results) else 0


def _out(args: argparse.Namespace) -> Path:
    """Where the picture goes. Raises BenchError if nothing can be written there, before minutes are spent."""
    name = "-".join(filter(None, (args.primitive, args.layer)))
    out = args.out or Path("runs", "bench", f"{name}.png")
    if out.suffix not in PICTURES:
        raise BenchError(f"--out {out}: expected a name that ends in {' or '.join(PICTURES)}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchError(f"--out {out}: cannot make {out.parent}: {error.strerror}") from error
    return out


def _call(args: argparse.Namespace, console: Console) -> tuple:
    """The arguments of the call that the options describe, which is printed."""
    sizes = {name: getattr(args, name) for name, *_ in SIZES}
    if args.product:
        if args.primitive != "matmul" or len(args.product) != 3:
            raise BenchError(f"sizes {args.product}: only matmul takes them, three: M K N")
        sizes |= dict(zip("mkn", args.product, strict=True))
    dtype = dtype_of(HALVES[args.dtype]) if args.dtype in HALVES else args.dtype
    call = arguments(args.primitive, shape_of(args.layer, **sizes), dtype)
    console.print(Text(f"{args.primitive}({dispatch.describe(call, {})})", "bold"), soft_wrap=True)
    return call


def _count(args: argparse.Namespace, console: Console) -> int:
    """The ladder of CUDA kernels, counted in the emulator; the exit status."""
    counts = traffic.count(args.primitive, *_call(args, console))
    traffic.print_counts(counts, console)
    for c in counts:
        if args.lines and not c.note:
            traffic.print_lines(c, console)
    wrong = [c for c in counts if c.error > TOLERANCES.get(args.dtype, 1e-2)]
    for c in wrong:
        console.print(Text(f"WRONG: {c.variant} by {c.error:.1e} of the largest value", "red"))
    return 1 if wrong else 0


def _sweep(args: argparse.Namespace, console: Console) -> int:
    """Each CUDA kernel in each of its launch configurations; the exit status."""
    if args.device == "cpu":
        raise BenchError("--sweep is for launches of CUDA kernels: choose --device emulated, or cuda with a GPU")
    if not args.sweep:
        raise BenchError("--device cuda measures launches only, with --sweep; --device emulated counts each rung")
    call = _call(args, console)
    with console.status("") as status:
        trials = sweep.sweep(args.primitive, *call, device=args.device, say=status.update)
    sweep.print_trials(trials, console)
    wrong = [t for t in trials if t.error > TOLERANCES.get(args.dtype, 1e-2)]
    for t in wrong:
        console.print(Text(f"WRONG: {t.variant} ({t.label}) by {t.error:.1e} of the largest value", "red"))
    return 1 if wrong else 0


def _measure(args: argparse.Namespace, console: Console) -> tuple[list[Result], Peaks]:
    if args.rounds < 1 or not args.limit > 0:
        raise BenchError("--rounds and --limit: expected positive numbers")
    if args.threads is not None:
        most = numba.config.NUMBA_NUM_THREADS  # type: ignore[attr-defined]
        if not 1 <= args.threads <= most:
            raise BenchError(
                f"--threads {args.threads}: expected 1 to {most}, the processors that this process may use; "
                "NANOCNN_THREADS in the environment allows more"
            )
        threads.limit(args.threads)
    policy, choices = dispatch.parse_use(args.use)
    dispatch.use(*policy, **choices)
    if args.dtype not in TOLERANCES:
        raise BenchError(f"--dtype {args.dtype}: the CPU's kernels are of {' and '.join(TOLERANCES)}")
    call = _call(args, console)
    with console.status("") as status:
        results = ladder(args.primitive, *call, rounds=args.rounds, limit=args.limit, say=status.update)
        status.update("the roof: peak and bandwidth")
        return results, peaks(args.dtype)
