#!/usr/bin/env python
"""CPU against GPU: LeNet-5 learns MNIST and predicts, on each device and each rung that this machine has.

Every rung starts from the same weights, sees the same batches in the same order, and runs in a process of its own.
Before any time is believed, results are compared with those of the NumPy reference: the losses of the first steps, and
the accuracy at the end. A rung that computes something else is an error, not a line in the table.

Training time is that of the whole loop, loading included, compilation not. Prediction is from images in the host's
memory to classes in the host's memory, so on a GPU both copies count. The emulator runs a few steps: its time says what
it costs to run CUDA kernels on a CPU, and nothing about a GPU.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from peers._process import ENVIRONMENT  # isort: skip  (beside this file; a copy, before nanocnn changes it)
import nanocnn as nc  # isort: skip  (before NumPy, for whose BLAS it sets variables)

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nanocnn.__main__ import load_board
from nanocnn.data import DataError, Loader
from nanocnn.kernels import dispatch, threads
from nanocnn.kernels.cuda import device_memory
from nanocnn.kernels.cuda.emulated import compiler
from nanocnn.machine import machine_facts
from nanocnn.models import lenet5
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.parallel.comm import plural
from nanocnn.precision import LossScaler, at_entrance
from nanocnn.progress import duration, say, size
from nanocnn.record import peak_memory
from nanocnn.schedules import SCHEDULES
from nanocnn.train import evaluate, train_step

import common  # isort: skip
from energy import Meter  # isort: skip

EXAMPLES = """examples:
  python data/prepare.py mnist                        once: downloads MNIST
  python experiments/mnist_cpu_gpu.py                 all that this machine has
  python experiments/mnist_cpu_gpu.py --quick         does it work? a minute, figures that mean little
  python experiments/mnist_cpu_gpu.py --device cuda   the GPU's rungs alone, and the NumPy reference to compare with
  python experiments/mnist_cpu_gpu.py --device emulated --quick   CUDA kernels on a machine without a GPU

reading the result: small images and a small network are where a GPU has it hard. A step of LeNet is some dozens of
kernels of microseconds each, so what Python needs to launch them decides: look at what fusing them and replaying them
as a graph is worth, and at which batch size the GPU's prediction overtakes the CPU's. One image at a time, two copies
and a dozen launches may cost more than the CPU needs for all of it.
"""
QUICK = dict(epochs=1, batch=32, train_images=2048, test_images=512, predict=[1, 16, 128], seconds=0.02)
FIRST = 5  # steps whose losses are compared; the emulator takes no more
LOSSES = {"fp32": 2e-3, "fp16": 2e-2}  # relative difference that is allowed of each of them


@dataclass(frozen=True)
class Rung:
    """A way to run: a device, a policy with choices, threads (None: all cores). `small`: the first steps only."""

    name: str
    device: str
    about: str
    policy: str = "fastest"
    choices: dict[str, str] = field(default_factory=dict)
    threads: int | None = None
    small: bool = False

    @property
    def precision(self) -> str:
        return self.choices.get("precision", "fp32")


REFERENCE = Rung("NumPy", "cpu", "the textbook's version, BLAS on all threads", "reference")
RUNGS = (
    REFERENCE,
    Rung("Numba, 1 thread", "cpu", "compiled kernels on one core", threads=1),
    Rung("Numba", "cpu", "compiled kernels on all cores"),
    Rung("Numba, captured", "cpu", "a step's kernel calls recorded once", choices=dict(graph="on")),
    Rung("GPU, eager", "cuda", "one launch after the other", choices=dict(fuse="off")),
    Rung("GPU, fused", "cuda", "layers that do their neighbours' work"),
    Rung("GPU, graph", "cuda", "the step as one CUDA graph", choices=dict(graph="on")),
    Rung("GPU, fp16", "cuda", "the same on tensor cores", choices=dict(graph="on", precision="fp16")),
    Rung("emulated", "emulated", f"{FIRST} steps of the CUDA kernels on the CPU", small=True),
    Rung("emulated, fp16", "emulated", f"{FIRST} steps in fp16", choices=dict(precision="fp16"), small=True),
)


SCALE = 256.0  # of the loss in fp16: LeNet's gradients fit, so that no step is skipped and the losses can be compared


class Disagreement(RuntimeError):
    """A rung whose results are not those of the reference."""


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=common.TeachingFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what").add_argument
    add("--device", nargs="+", choices=tuple(dispatch.DEVICES), default=list(dispatch.DEVICES), help="whose rungs")
    add("--data", choices=("auto", "mnist", "shapes"), default="auto", help="auto: MNIST if it is found, else shapes")
    add("--data-dir", help="where the files are; else $NANOCNN_DATA, else data/")
    add("--train-images", type=common.count, metavar="N", help="the first N only")
    add("--test-images", type=common.count, metavar="N", help="the first N only")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=common.count, default=3, help="passes over the training set")
    add("--batch", type=common.count, default=128, help="images a step")
    add("--lr", type=common.positive, default=0.05, help="peak of a cosine over the steps; SGD, momentum 0.9")
    add("--seed", type=common.natural, default=0, help="of weights and order")
    add = parser.add_argument_group("measurement").add_argument
    sizes = [1, 4, 16, 64, 256, 1024]
    add("--predict", nargs="+", type=common.count, default=sizes, metavar="N", help="batch sizes to predict with")
    add("--seconds", type=common.positive, default=0.5, help="that each of them is repeated for, at least three times")
    add("--tolerance", type=common.positive, default=0.01, help="of the accuracy, against the NumPy reference's")
    add("--limit", type=common.positive, default=1800.0, metavar="S", help="end a rung that takes longer")
    quick = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--quick", action="store_true", help=f"a minute: {quick}")
    add("--out", type=Path, default=Path("runs", "mnist_cpu_gpu"), metavar="DIR", help="for result.json, result.png")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    return parser.parse_args()


# ------------------------------------------------------------------ one rung, in a process of its own


def load(args):
    """MNIST, or with --data auto the built-in shapes where it is not found."""
    nc.data.datasets.folders(args.data_dir)  # one that was named and is not there is an error
    options = dict(val=0, train_size=args.train_images, test_size=args.test_images)
    try:
        return nc.data.load("mnist" if args.data == "auto" else args.data, args.data_dir, **options)
    except DataError as error:
        if args.data != "auto":
            raise
        say(f"no MNIST, so the built-in images: {error}")
        return nc.data.load("shapes", **options)


def work(args, rung, data):
    """Train and predict as `rung` says; all its figures."""
    from numba.core import event

    steps = FIRST if rung.small else None
    channels, side = data.train.images.shape[3], data.train.images.shape[1]

    def fresh():
        nc.manual_seed(args.seed)
        return lenet5(len(data.classes), image_size=side, in_channels=channels).to(rung.device)

    with event.install_recorder("numba:compile") as compiled:
        train(args, rung, data, fresh(), steps=2)  # which compiles: the next one's time is that of the kernels
    model, meter = fresh(), Meter(gpu=rung.device == "cuda")
    start = time.perf_counter()
    losses, taken = train(args, rung, data, model, steps)
    synchronize(rung.device)
    seconds = time.perf_counter() - start
    found = dict(seconds=seconds, steps=taken, losses=losses, joules=meter.joules(), no_energy=meter.why)
    found["images_per_second"] = taken * args.batch / seconds
    if not rung.small:
        test = evaluate(model, Loader(data.test, 256, shuffle=False).epoch(0), len(data.classes), Alone())
        found |= dict(accuracy=test.accuracy, test_loss=test.loss)
    sizes = args.predict[:1] if rung.small else args.predict
    found["predict"] = {n: predict(args, rung, data, model, n) for n in sizes}
    found |= dict(memory=memory(rung.device), compiled=bool(compiled.buffer))
    return found | dict(threads=threads.count(), ran=dispatch.variants_that_ran())


def train(args, rung, data, model, steps=None):
    """All epochs, or so many steps; the mean losses of the first steps, and how many were taken."""
    loader = Loader(data.train, args.batch, shuffle=True, seed=args.seed)
    optimizer = nc.optim.SGD(model.named_parameters(), args.lr, momentum=0.9)
    averager = GradientAverager(optimizer.buckets, Alone())
    scaler = LossScaler(SCALE, enabled=rung.precision == "fp16")
    total, losses, taken = args.epochs * len(loader), [], 0
    for epoch in range(args.epochs):
        for batch in loader.epoch(epoch):
            if taken == steps:
                return losses, taken
            lr = SCHEDULES["cosine"](taken, total, args.lr, 0)
            result = train_step(model, batch, optimizer, lr, averager, scaler=scaler)
            taken += 1
            if len(losses) < FIRST:
                losses.append(result.loss / result.samples)
    return losses, taken


def predict(args, rung, data, model, count):
    """Seconds from `count` images in the host's memory to their classes there: the median of many times."""
    images = next(Loader(data.test, min(count, len(data.test)), shuffle=False).epoch(0)).x
    images = np.resize(images, (count, *images.shape[1:]))  # a small test set is taken again and again
    model.eval()

    def forward(x):
        return model(at_entrance(x))

    if rung.choices.get("graph") == "on":
        forward = nc.capture(forward, nc.Tensor(images).to(rung.device))
    times = []
    with nc.no_grad():
        while len(times) < 4 or sum(times) < args.seconds:
            start = time.perf_counter()
            forward(nc.Tensor(images).to(rung.device)).numpy().argmax(axis=1)
            times.append(time.perf_counter() - start)
    model.train()
    return statistics.median(times[1:])  # the first may have compiled


def synchronize(device):
    """Wait until the device has done all that it was asked."""
    if device == "cuda":
        import cupy

        cupy.cuda.Device().synchronize()


def memory(device):
    """The most bytes that were held: of the host's memory, or what CuPy's pool has of the GPU's."""
    if device != "cuda":
        return peak_memory()
    return (device_memory.held() or {})["pool"]


# ------------------------------------------------------------------ all of them


def missing(rung):
    """Why this machine cannot run a rung; "" if it can."""
    if unknown := set(rung.choices) - set(dispatch.switches):
        return f"this version has no switch {', '.join(unknown)}"
    try:
        if rung.device == "emulated":
            compiler()
        nc.Tensor([0.0]).to(rung.device)
    except dispatch.DeviceError as error:
        return str(error)
    return ""


def run(args, rung):
    """The figures of a rung. One that had to compile begins anew: the compiler's memory is not the training's."""
    found = run_once(args, rung)
    return run_once(args, rung) if found.get("compiled") else found


def run_once(args, rung):
    """The same from one process of its own. An error there is {"error": its last line}."""
    own = {"NANOCNN_THREADS": str(rung.threads or threads.cores())}
    with tempfile.TemporaryDirectory() as folder:
        task, answer = Path(folder, "task.json"), Path(folder, "answer.json")
        options = vars(args) | dict(out=str(args.out), worker=None)
        task.write_text(json.dumps(dict(options=options, rung=asdict(rung), answer=str(answer))))
        command = [sys.executable, __file__, "--worker", str(task)]
        try:
            done = subprocess.run(
                command, env=ENVIRONMENT | own, capture_output=True, text=True, timeout=args.limit, check=False
            )
        except subprocess.TimeoutExpired:
            return dict(error=f"it takes longer than --limit {args.limit:g} s")
        if done.returncode:
            words = done.stderr.strip().splitlines() or ["no word"]
            return dict(error=f"its process ended with status {done.returncode}: {words[-1]}", stderr=done.stderr)
        return json.loads(answer.read_text())


def worker(path):
    """The other end: do what a task says and write the answer."""
    task = json.loads(path.read_text())
    args, rung = argparse.Namespace(**task["options"]), Rung(**task["rung"])
    with nc.using(rung.policy, **rung.choices):
        Path(task["answer"]).write_text(json.dumps(work(args, rung, load(args))))


def disagreements(args, rows, images):
    """What is wrong with rows that have not the reference's losses and accuracy, within what is allowed."""
    reference, found = rows[REFERENCE.name], []
    for name, row in rows.items():
        if "error" in row:
            continue
        allowed = LOSSES[row["rung"]["choices"].get("precision", "fp32")]
        pairs = zip(row["losses"], reference["losses"], strict=True)
        row["worst_loss"] = float(np.max([abs(ours / theirs - 1) for ours, theirs in pairs]))  # NaN stays NaN
        if not row["worst_loss"] <= allowed:
            found.append(
                f"{name}: losses of the first steps {row['losses']}, the reference's are {reference['losses']}: off by "
                f"{row['worst_loss']:.1e}, where {allowed:g} is allowed"
            )
        if "accuracy" in row:
            usual = reference["accuracy"]
            chance = 4 * math.sqrt(max(usual * (1 - usual), 1 / images) / images)  # of two trainings on few images
            if not abs(row["accuracy"] - usual) <= args.tolerance + chance:
                found.append(
                    f"{name}: accuracy {row['accuracy']:.2%}, the reference's is {usual:.2%}: more apart than "
                    f"{args.tolerance:.1%} and the {chance:.1%} that chance makes of {images} images"
                )
    return found


def main(args):
    load_board()
    args.out.mkdir(parents=True, exist_ok=True)
    data = load(args)
    wanted = [r for r in RUNGS if r.device in args.device or r is REFERENCE]
    skipped = {r.name: why for r in wanted if (why := missing(r))}
    chosen = [r for r in wanted if r.name not in skipped]
    if all(r.small for r in chosen if r is not REFERENCE) and "cpu" not in args.device:
        chosen = [Rung(**{**asdict(r), "small": True}) for r in chosen]
    say(f"{data.notice}\n{threads.processor()}, {threads.cores()} cores; {args.epochs} epochs, batch {args.batch}")
    rows = {}
    for number, rung in enumerate(chosen, 1):
        say(f"{number} of {len(chosen)}: {rung.name} ({rung.about})")
        rows[rung.name] = run(args, rung) | dict(rung=asdict(rung))
        if "error" in rows[rung.name]:
            say(f"  failed: {rows[rung.name]['error']}")
            if rung.name == REFERENCE.name:
                raise Disagreement(f"the reference itself fails:\n{rows[rung.name].get('stderr', '')}")
    facts = dict(kind="mnist_cpu_gpu", data=data.notice, date=time.strftime("%Y-%m-%d"), options=vars(args))
    facts |= dict(command=common.without_folder(sys.argv[1:]), machine=machine_facts(probe=True))
    wrong = disagreements(args, rows, len(data.test))
    facts |= dict(disagreements=wrong)
    (args.out / "result.json").write_text(json.dumps(facts | dict(rows=rows, skipped=skipped), indent=1, default=str))
    report(args, rows, skipped, data)
    drawn = draw(rows, data, args.out / "result.png")
    say(f"files: {args.out}/result.json" + (", result.png" if drawn else "; no picture without a whole training"))
    if wrong:
        raise Disagreement("; ".join(wrong))
    return 1 if any("error" in row for row in rows.values()) else 0


# ------------------------------------------------------------------ the table and the picture


def report(args, rows, skipped, data):
    console = Console()
    if not console.is_terminal:
        console.width = 116
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("rung", style="bold", no_wrap=True)
    sizes = [args.predict[0], args.predict[len(args.predict) // 2], args.predict[-1]]
    sizes = list(dict.fromkeys(sizes))
    for heading in ("training", "images/s", "accuracy", *(f"predict {n}" for n in sizes), "memory", "energy", "losses"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, row in rows.items():
        if "error" in row:
            continue
        small = row["rung"]["small"]
        spent = [f"{j:,.0f} J" for j in row["joules"].values() if j is not None]
        table.add_row(
            name,
            f"({duration(row['seconds'])})" if small else duration(row["seconds"]),
            "" if small else f"{row['images_per_second']:,.0f}",
            f"{row['accuracy']:.2%}" if "accuracy" in row else "",
            *("" if small else f"{row['predict'][str(n)] * 1e3:,.3f} ms" for n in sizes),
            size(row["memory"]),
            " + ".join(spent),
            f"{row['worst_loss']:.0e}",
        )
    console.print(table)
    for why in dict.fromkeys(skipped.values()):
        names = "; ".join(name for name, reason in skipped.items() if reason == why)
        console.print(Text(f"not here: {names}: {why}", "dim"), soft_wrap=True)
    for name, row in rows.items():
        if "error" in row:
            console.print(Text(f"failed: {name}: {row['error']}", "red"), soft_wrap=True)
    reasons = {f"{part}: {why}" for row in rows.values() for part, why in row.get("no_energy", {}).items()}
    for reason in sorted(reasons):
        console.print(Text(f"no energy of the {reason}", "dim"), soft_wrap=True)
    about = (
        f"{plural(args.epochs, 'epoch')} of {len(data.train):,} images of {data.name}; predict N: N images from the "
        f"host's memory to classes in it. losses: largest relative difference of the first {FIRST} steps from the "
        f"reference's. In brackets: the time of {FIRST} steps; the emulator's says nothing about a GPU."
    )
    console.print(Text(about, "dim"))


COLOURS = {
    "cpu": ("#a9c9ee", "#6ea3dc", "#3b6fb6", "#1d3f73"),
    "cuda": ("#a8dcc3", "#63bf95", "#2f9e6e", "#14603f"),
}


def draw(rows, data, path):
    """Training time with accuracy, prediction by batch size, memory with energy. The emulator has no place among times.

    False if there is nothing to draw.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no state

    rows = {name: row for name, row in rows.items() if "error" not in row and not row["rung"]["small"]}
    if not rows:
        return False
    figure = Figure(figsize=(13, 1.8 + 0.45 * max(5, len(rows))), dpi=110, layout="constrained")
    times, speeds, held = figure.subplots(1, 3, width_ratios=(4, 5, 4))
    left = {device: list(shades) for device, shades in COLOURS.items()}
    colours = {name: left[row["rung"]["device"]].pop(0) for name, row in rows.items()}
    for place, (name, row) in enumerate(rows.items()):
        spent = [f"{joules:,.0f} J" for joules in row["joules"].values() if joules is not None]
        words = ", ".join([size(row["memory"]), *spent])
        for panel, value, text in (
            (times, row["seconds"], f"{duration(row['seconds'])}, {row['accuracy']:.1%}"),
            (held, row["memory"] / 1e6, words),
        ):
            panel.barh(place, value, color=colours[name])
            panel.text(value, place, f" {text}", va="center", fontsize=8)
        counts, seconds = list(map(int, row["predict"])), row["predict"].values()
        rates = [count / each for count, each in zip(counts, seconds, strict=True)]
        speeds.plot(counts, rates, marker="o", markersize=4, linewidth=2, color=colours[name], label=name)
    times.set_title("training, s, and accuracy", loc="left", fontsize=11)
    held.set_title("peak memory, MB; energy, J", loc="left", fontsize=11)
    speeds.set_title("prediction, images/s, by images at a time", loc="left", fontsize=11)
    speeds.set_xscale("log", base=2)
    speeds.set_yscale("log")
    speeds.set_xticks(counts, list(map(str, counts)))
    speeds.legend(frameon=False, fontsize=8)
    times.set_yticks(range(len(rows)), list(rows))
    held.set_yticks([])
    for panel in (times, held):
        panel.invert_yaxis()
        panel.margins(x=0.3)
    for panel in (times, speeds, held):
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="0.93")
        panel.set_axisbelow(True)
    figure.suptitle(f"LeNet-5 on {data.name}, {threads.processor()}", x=0.01, ha="left", parse_math=False)
    figure.savefig(path)
    return True


if __name__ == "__main__":
    args = arguments()
    if args.worker:
        worker(args.worker)
        sys.exit(0)
    try:
        sys.exit(main(args))
    except (*common.PLAIN_ERRORS, Disagreement, OSError) as error:
        sys.exit(f"{type(error).__name__}: {error}")
