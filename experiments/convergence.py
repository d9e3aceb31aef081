#!/usr/bin/env python
"""Do Winograd's rounding errors harm learning? The same training, with the convolutions computed in several ways.

F(4x4, 3x3) needs a quarter of the multiplications and pays with precision: a layer is off by up to 2e-5 of its largest
value, where direct convolution and F(2x2, 3x3) are off by 1e-6. Whether training minds is a question for an experiment.
With each seed all ways begin with the same weights and see the same batches, augmented alike, at the same learning
rates. Rounding alone then leads them apart, as another seed does, and the accuracies are compared with how much those
of im2col vary from seed to seed. A run whose loss is no number is recorded as diverged, and counts against its way.
"""

from __future__ import annotations

import argparse
import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nanocnn as nc  # before NumPy, whose BLAS reads at import what this sets in the environment

import numpy as np  # isort: skip
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from nanocnn.data import Loader
from nanocnn.kernels import threads
from nanocnn.kernels.dispatch import ChoiceError, primitives, variants_that_ran
from nanocnn.machine import machine_facts
from nanocnn.models import alexnet_cifar, resnet18
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.parallel.comm import plural
from nanocnn.progress import Progress, duration, say
from nanocnn.train import NonFiniteLoss, evaluate, train_step

import common  # isort: skip  (beside this file)
import peers  # isort: skip
from peers import _networks  # isort: skip
from peers._report import MODELS  # isort: skip

EXAMPLES = """examples:
  python experiments/convergence.py --quick                          does it work? accuracies that mean nothing
  python experiments/convergence.py --models alexnet --seeds 5       AlexNet with batch norm, CIFAR-10 if it is there
  python experiments/convergence.py --train-size 10000 --width 0.5   both networks, a fifth of the images, half as wide
  python experiments/convergence.py --ways F4 --no-batch-norm        F4 and im2col alone, where nothing rescales errors

reading the verdict: a way is "within" if the mean of its final test accuracies lies between the lowest and the highest
that im2col reached with these seeds, nothing added, and it diverged no more often; "outside" below that range is harm
or bad luck. Two more figures help to tell which: whether the ranges of the two overlap, and how far the means are apart
in standard deviations, the larger of the two. If rounding is worth no more than another seed, a way is within by mere
chance: in 39 of 100 experiments with 2 seeds, in 63 with 3, in 86 with 5, in 99 with 10. To decide something, take more
seeds. PyTorch is the control: it has none of these kernels, and what it differs by is what other roundings do to any
engine.

what is recorded: the loss and the test accuracy of each epoch, the variants that ran, and the loss of the first step,
which must be the same for all ways but for rounding; if it is not, the experiment ends there. The result file is
written after each run, so that an experiment that is interrupted keeps its runs.

what is left out: dropout, whose masks PyTorch draws in a way of its own. NANOCNN_THREADS sets the number of threads.
"""
CONVOLUTIONS = ("conv2d", "conv2d_grad_x", "conv2d_grad_w")
REFERENCE, PYTORCH = "im2col", "PyTorch"
RUNGS = {REFERENCE: "reference", "F2": "upto:winograd2", "F4": "upto:parity"}  # of the three convolutions alike
WAYS = {
    REFERENCE: "columns and one GEMM, what the others are compared with",
    "F2": "Winograd's F(2x2, 3x3) where it can (stride 1), else the fastest rung without Winograd",
    "F4": "Winograd's F(4x4, 3x3) where it can (at stride 2 by parity), else the fastest rung before it",
    PYTORCH: "another engine, from the same weights on the same batches",
}
COLOURS = {REFERENCE: "#3b6fb6", "F2": "#2f9e6e", "F4": "#d1495b", PYTORCH: "#8d99ae"}
CRITERION = (
    "within: the mean of a way's final test accuracies lies between the lowest and the highest of im2col's, nothing "
    "added, and no more of its runs diverged; accuracies are of the runs that finished, deviations divide by n - 1"
)
RECIPE = dict(optimizer="sgd", momentum=0.9, weight_decay=5e-4, schedule="cosine", warmup_epochs=1.0)
AUGMENT = dict(crop_padding=4, no_flip=False, cutout=0)
QUICK = dict(data="shapes", width=0.125, train_size=320, test_size=300, epochs=3, batch=32, seeds=2)
TOLERANCE = 1e-3  # relative, of the first step's loss: more than rounding means another network, or another batch


class ConvergenceError(ChoiceError):
    """What was asked for cannot be compared; the message says why."""


# ------------------------------------------------------------------ one network, trained by us or by PyTorch


def make_network(model: str, args: argparse.Namespace, data: nc.data.DataSet, seed: int) -> nc.nn.Module:
    """The network with its initial weights, the same for the same seed."""
    nc.manual_seed(seed)
    classes, (size, _, channels) = len(data.classes), data.train.images.shape[1:]
    if model == "resnet18":
        return resnet18(classes, width=args.width, in_channels=channels)
    extras = dict(batch_norm=args.batch_norm, dropout=0.0, image_size=size, in_channels=channels)
    return alexnet_cifar(classes, width=args.width, **extras)


class Ours:
    """A network of nanocnn, its three convolutions on the rungs of `way`."""

    def __init__(self, model: str, way: str, args: argparse.Namespace, data: nc.data.DataSet, seed: int):
        self.choices = dict.fromkeys(CONVOLUTIONS, RUNGS[way])
        self.net, self.classes = make_network(model, args, data, seed), len(data.classes)
        self.optimizer = common.make_optimizer(args, self.net)
        self.averager = GradientAverager(self.optimizer.buckets, Alone())
        for name in CONVOLUTIONS:
            primitives[name].ran.clear()

    def step(self, batch: nc.data.Batch, lr: float) -> float:
        """The batch's mean loss before the update. Raises NonFiniteLoss."""
        with nc.using(**self.choices):
            return train_step(self.net, batch, self.optimizer, lr, self.averager).loss / len(batch.y)

    def test(self, loader: Loader) -> tuple[float, float]:
        """Mean loss and accuracy."""
        with nc.using(**self.choices):
            found = evaluate(self.net, loader.epoch(0), self.classes, Alone())
        return found.loss, found.accuracy

    def variants(self) -> dict[str, list[str]]:
        """For each convolution the variants that ran."""
        ran = variants_that_ran()
        return {name: ran.get(name, []) for name in CONVOLUTIONS}


class PyTorch:
    """The same network, weights and update rule in PyTorch, channels last as ours."""

    def __init__(self, model: str, args: argparse.Namespace, data: nc.data.DataSet, seed: int):
        import torch

        self.torch = torch
        weights = make_network(model, args, data, seed).state_dict()
        name = "alexnet_norm" if model == "alexnet" and args.batch_norm else model
        one, none = np.zeros((1, *data.train.images.shape[1:]), np.float32), np.zeros(1, np.int64)
        task = peers.Task(name, args.width, one, none, weights, 0.0, threads.count(), "channels_last")
        self.net, _ = peers.load("pytorch").network(task)
        parameters = list(self.net.parameters())
        groups = [
            dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0),  # as nanocnn.optim.decay_groups
            dict(params=[p for p in parameters if p.ndim > 1], weight_decay=args.weight_decay),
        ]
        self.optimizer = torch.optim.SGD(groups, args.lr, args.momentum, nesterov=args.momentum > 0)

    def step(self, batch: nc.data.Batch, lr: float) -> float:
        """The batch's mean loss before the update. Raises NonFiniteLoss, as train_step() does."""
        loss = self._loss(batch)[0]
        if not math.isfinite(loss.item()):
            raise NonFiniteLoss(f"the loss is {loss.item()} at learning rate {lr:.3g}")
        self.optimizer.zero_grad()
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        return loss.item()

    def test(self, loader: Loader) -> tuple[float, float]:
        """Mean loss and accuracy."""
        total, correct = 0.0, 0
        self.net.eval()
        with self.torch.no_grad():
            for batch in loader.epoch(0):
                loss, logits = self._loss(batch)
                total += loss.item() * len(batch.y)
                correct += int((logits.numpy().argmax(axis=1) == batch.y).sum())
        self.net.train()
        return total / len(loader.split), correct / len(loader.split)

    def _loss(self, batch: nc.data.Batch) -> tuple[Any, Any]:
        logits = self.net(self.torch.from_numpy(batch.x).permute(0, 3, 1, 2))
        return self.torch.nn.functional.cross_entropy(logits, self.torch.from_numpy(batch.y)), logits

    def variants(self) -> dict[str, list[str]]:
        """None of ours."""
        return {}


def alexnet_norm(ops: Any, x: Any) -> Any:
    """AlexNet with batch norm, in the operations of peers/_networks.py, which has it without."""
    for i, pool in ((0, True), (4, True), (8, False), (11, False), (14, True)):
        x = ops.relu(ops.norm(ops.conv(x, f"features.{i}", 2 if i == 0 else 1), f"features.{i + 1}"))
        x = ops.max_pool(x) if pool else x
    x = ops.flatten(x)
    for i in (1, 4):
        x = ops.relu(ops.linear(x, f"classifier.{i}"))
    return ops.linear(x, "classifier.6")


_networks.NETWORKS["alexnet_norm"] = alexnet_norm


# ------------------------------------------------------------------ one run


def train(model: str, way: str, seed: int, args: argparse.Namespace, data: nc.data.DataSet) -> dict[str, Any]:
    """Train once: what the result file holds of it. Losses and accuracies end before the epoch in which it diverged."""
    augment = common.make_augment(args, data)
    batches = Loader(data.train, args.batch, augment=augment, shuffle=True, seed=seed)
    tests = Loader(data.test, 250, shuffle=False)
    learning_rate = common.make_schedule(args, len(batches))
    shared = args, data, seed
    trainee = PyTorch(model, *shared) if way == PYTORCH else Ours(model, way, *shared)
    run: dict[str, Any] = dict(model=model, way=way, seed=seed, first_loss=None, loss=[], accuracy=[], diverged=None)
    start, step, epoch = time.perf_counter(), 0, 0
    try:
        with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges says so below
            for epoch in range(args.epochs):
                total, first = 0.0, step
                label = f"{MODELS[model]}, {way}, seed {seed}, epoch {epoch + 1}/{args.epochs}"
                with Progress(len(batches), label) as bar:
                    for batch in batches.epoch(epoch):
                        loss = trainee.step(batch, learning_rate(step))
                        if step == 0:
                            run["first_loss"] = loss
                        total, step = total + loss, step + 1
                        bar.update(step - first, loss=total / (step - first))
                test_loss, accuracy = trainee.test(tests)
                if not math.isfinite(test_loss):
                    raise NonFiniteLoss(f"the loss on the test images is {test_loss}")
                run["loss"].append(total / len(batches))
                run["accuracy"].append(accuracy)
    except NonFiniteLoss as error:
        run["diverged"] = dict(epoch=epoch + 1, step=min(step + 1, (epoch + 1) * len(batches)), reason=str(error))
    return run | dict(variants=trainee.variants(), seconds=time.perf_counter() - start)


def final(run: dict[str, Any]) -> float | None:
    """The test accuracy after the last epoch; None if the run diverged."""
    return None if run["diverged"] else run["accuracy"][-1]


def demand_same_start(run: dict[str, Any], reference: dict[str, Any]) -> None:
    """Raise ConvergenceError if the first step's losses differ by more than rounding: nothing could be learnt then."""
    own, other = run["first_loss"], reference["first_loss"]
    if own is not None and other is not None and abs(own - other) > TOLERANCE * abs(other):
        raise ConvergenceError(
            f"{run['model']}, seed {run['seed']}: the first loss is {own:.6f} with {run['way']} and {other:.6f} with "
            f"{reference['way']}, allowed {TOLERANCE:.0e} relative: they do not start alike, and cannot be compared"
        )


def line(run: dict[str, Any]) -> str:
    """One run in words."""
    words = f"{MODELS[run['model']]:9}  {run['way']:7}  seed {run['seed']}  "
    if run["diverged"]:
        words += f"diverged in epoch {run['diverged']['epoch']}, step {run['diverged']['step']}"
    else:
        words += f"test {run['accuracy'][-1]:6.2%}  loss {run['loss'][-1]:.4f}"
    return f"{words}  {duration(run['seconds'])}"


# ------------------------------------------------------------------ the verdict


def figures(accuracies: Sequence[float | None]) -> dict[str, Any]:
    """Mean, lowest, highest and standard deviation of the runs that finished; None marks one that diverged."""
    finished = [a for a in accuracies if a is not None]
    return dict(
        runs=len(accuracies),
        diverged=len(accuracies) - len(finished),
        mean=statistics.mean(finished) if finished else None,
        low=min(finished, default=None),
        high=max(finished, default=None),
        deviation=statistics.stdev(finished) if len(finished) > 1 else None,
    )


def verdict(own: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """Compare the figures of a way with those of the reference, by CRITERION.

    `within` is None where there is no range to lie in; `deviations` is the difference of the means over the larger
    standard deviation, None where there is none.
    """
    found: dict[str, Any] = dict(within=None, overlap=None, difference=None, deviations=None)
    more = own["diverged"] > reference["diverged"]
    if more:
        found["within"] = False
        words = f"outside: {own['diverged']} of {plural(own['runs'], 'run')} diverged, of {REFERENCE}'s "
        words += str(reference["diverged"])
    if own["mean"] is None or reference["mean"] is None:
        return found | dict(words=words if more else "no verdict: nothing to compare, all runs diverged")
    found["overlap"] = own["low"] <= reference["high"] and reference["low"] <= own["high"]
    found["difference"] = own["mean"] - reference["mean"]
    larger = max(own["deviation"] or 0, reference["deviation"] or 0)
    found["deviations"] = found["difference"] / larger if larger else None
    if not more:
        if reference["deviation"] is None:
            words = f"no verdict: one run of {REFERENCE} has no range"
        elif own["mean"] < reference["low"]:
            found["within"] = False
            words = f"outside: {100 * (reference['low'] - own['mean']):.2f} points below {REFERENCE}'s lowest"
        elif own["mean"] > reference["high"]:
            found["within"] = False
            words = f"outside: {100 * (own['mean'] - reference['high']):.2f} points above {REFERENCE}'s highest"
        else:
            found["within"] = True
            words = f"within {REFERENCE}'s range"
    words += f"; ranges {'overlap' if found['overlap'] else 'do not overlap'}"
    words += f"; means differ by {100 * found['difference']:+.2f} points"
    if found["deviations"] is not None:
        words += f", {abs(found['deviations']):.1f} standard deviations"
    return found | dict(words=words)


def judge(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each model and way its figures and its verdict; the reference's is None."""
    rows = []
    for model in dict.fromkeys(run["model"] for run in runs):
        ways: dict[str, list[float | None]] = {}
        for run in runs:
            if run["model"] == model:
                ways.setdefault(run["way"], []).append(final(run))
        reference = figures(ways[REFERENCE])
        for way, accuracies in ways.items():
            own = figures(accuracies)
            rows.append(
                dict(model=model, way=way, **own, verdict=None if way == REFERENCE else verdict(own, reference))
            )
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """The table, then a line for each verdict."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title="final test accuracy, in percent", title_justify="left")
    for heading in ("network", "way"):
        table.add_column(heading, no_wrap=True, style="bold")
    for heading in ("mean", "lowest .. highest", "deviation", "runs", "diverged"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        mean, spread, deviation = "-", "-", "-"
        if row["mean"] is not None:
            mean, spread = f"{100 * row['mean']:.2f}", f"{100 * row['low']:.2f} .. {100 * row['high']:.2f}"
        if row["deviation"] is not None:
            deviation = f"{100 * row['deviation']:.2f}"
        name = MODELS[row["model"]] if row["way"] == REFERENCE else ""
        table.add_row(name, row["way"], mean, spread, deviation, str(row["runs"]), str(row["diverged"] or ""))
    console = Console()
    if not console.is_terminal:
        console.width = 100
    console.print(table)
    for row in rows:
        if row["verdict"]:
            say(f"{MODELS[row['model']]}, {row['way']}: {row['verdict']['words']}")


def picture(result: dict[str, Any], where: Path) -> None:
    """Test accuracy and training loss over the epochs: a colour a way, a line a seed, a cross where it diverged."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state
    from matplotlib.ticker import MaxNLocator

    models = list(dict.fromkeys(run["model"] for run in result["runs"]))
    drawn = Figure(figsize=(11, 0.6 + 3.4 * len(models)), dpi=120, layout="constrained")
    for (accuracy, loss), model in zip(drawn.subplots(len(models), 2, squeeze=False), models, strict=True):
        for panel, name, factor in ((accuracy, "accuracy", 100), (loss, "loss", 1)):
            for way in result["ways"]:
                runs = [run for run in result["runs"] if (run["model"], run["way"]) == (model, way)]
                for number, run in enumerate(runs):
                    ys = [factor * y for y in run[name]]
                    label = way if number == 0 else None
                    panel.plot(range(1, len(ys) + 1), ys, ".-", ms=3, lw=0.8, color=COLOURS[way], label=label)
                    if run["diverged"] and ys:
                        panel.plot(len(ys), ys[-1], "x", color=COLOURS[way])
            panel.set_xlabel("epoch", color="0.35")
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
            panel.grid(color="0.93")
            panel.spines[["top", "right"]].set_visible(False)
        accuracy.set_title(f"{MODELS[model]}: test accuracy, percent", loc="left", fontsize=11)
        loss.set_title(f"{MODELS[model]}: training loss", loc="left", fontsize=11)
        loss.legend(fontsize=8, frameon=False)
    drawn.savefig(where)


# ------------------------------------------------------------------ the whole


def compare(args: argparse.Namespace) -> None:
    """Train each network with each seed in each way, write after each run, then judge, print and draw."""
    data = nc.data.load(args.data, args.data_dir, val=0, train_size=args.train_size, test_size=args.test_size)
    say(f"{data.notice}\nwidth {args.width:g}, batch {args.batch}, {plural(args.epochs, 'epoch')}, peak lr {args.lr:g}")
    machine = machine_facts()
    result: dict[str, Any] = dict(
        kind="convergence",
        status="unfinished",
        command=shlex.join(["python", "experiments/convergence.py", *common.without_folder(sys.argv[1:])]),
        date=time.strftime("%Y-%m-%d"),
        threads=threads.count(),
        machine=dict(
            processor=machine["processor"],
            memory=machine["memory"]["total"],
            platform=machine["system"]["platform"],
            python=machine["python"]["version"],
        ),
        options={name: value for name, value in vars(args).items() if name != "out"},
        data=data.notice,
        ways={way: WAYS[way] for way in args.ways},
        versions={name: peers.versions(name) for name in ("ours", *(["pytorch"] if PYTORCH in args.ways else []))},
        criterion=CRITERION,
        runs=[],
        verdicts=[],
    )
    for way in args.ways:
        say(f"  {way}: {WAYS[way]}")
    if PYTORCH not in args.ways and peers.missing("pytorch"):
        say(f"  {PYTORCH} takes no part: it is not installed (pip install torch)")
    for model in args.models:
        for seed in range(args.seed, args.seed + args.seeds):
            runs = []
            for way in args.ways:
                run = train(model, way, seed, args, data)
                say(line(run))
                runs.append(run)
                result["runs"].append(run)
                write(result, args.out)
                demand_same_start(run, runs[0])
    result |= dict(status="finished", verdicts=judge(result["runs"]))
    write(result, args.out)
    picture(result, args.out / "convergence.png")
    show(result["verdicts"])
    say(f"\n{CRITERION}\nall figures: {args.out / 'convergence.json'}, picture: {args.out / 'convergence.png'}")


def write(result: dict[str, Any], folder: Path) -> None:
    """convergence.json, with what is known so far: a long experiment that is interrupted keeps its runs."""
    (folder / "convergence.json").write_text(json.dumps(result, indent=1) + "\n")


def arguments() -> argparse.Namespace:
    """The options; `--quick` sets new defaults, so what is said beside it still holds."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=common.TeachingFormatter, allow_abbrev=False
    )
    add = parser.add_argument_group("what is compared").add_argument
    add("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="the networks")
    add("--ways", nargs="+", choices=tuple(WAYS), help=f"to compute convolutions; {REFERENCE} always; else all")
    add("--width", type=common.positive, default=1.0, help="scales channels and features")
    norm = argparse.BooleanOptionalAction
    add("--batch-norm", action=norm, default=True, help="in AlexNet, after each convolution; ResNet-18 always has it")
    add("--seeds", type=common.count, default=3, help="runs of each way, each with weights and batches of its own")
    add("--seed", type=common.natural, default=0, help="the first one")
    add = parser.add_argument_group("training").add_argument
    add(
        "--data",
        default="auto",
        help="cifar10, mnist, shapes (built in), or auto: CIFAR-10 if it is found, else shapes",
    )
    add("--data-dir", help="where the files are; else $NANOCNN_DATA, else data/")
    add("--train-size", type=common.count, metavar="N", help="train on the first N images only")
    add("--test-size", type=common.count, metavar="N", help="test on the first N images only")
    add("--no-augment", action="store_true", help="no random crops and flips")
    add("--epochs", type=common.count, default=10, help="passes over the training images")
    add("--batch", type=common.count, default=128, help="images a step")
    peak = "peak of a cosine over the steps, after an epoch of warm-up; SGD, Nesterov's momentum 0.9"
    add("--lr", type=common.positive, default=common.LEARNING_RATES["sgd"], help=peak)
    add = parser.add_argument_group("run").add_argument
    quick = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in QUICK.items())
    add("--quick", action="store_true", help=f"under a minute, once kernels are compiled: {quick}")
    add("--out", type=Path, default=Path("runs/convergence"), metavar="DIR", help="for convergence.json and .png")
    parser.set_defaults(**RECIPE, **AUGMENT)
    if "--quick" in sys.argv:
        parser.set_defaults(**QUICK)
    args = parser.parse_args()
    if args.train_size and args.train_size < args.batch:
        parser.error(f"--train-size {args.train_size}: expected one batch of {args.batch} images at least (--batch)")
    lacking = peers.missing("pytorch")
    if lacking and PYTORCH in (args.ways or []):
        parser.error(f"--ways: {PYTORCH} is not installed: pip install {' '.join(lacking)}")
    asked = {REFERENCE, *(args.ways or WAYS)}
    args.ways = [way for way in WAYS if way in asked and not (way == PYTORCH and lacking)]  # the reference first
    args.models = list(dict.fromkeys(args.models))
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: {error}")
    return args


if __name__ == "__main__":
    args = arguments()
    comm = common.connect()
    with common.plain_errors(comm):
        if comm.size > 1:
            raise ConvergenceError("it trains in one process: run it without mpiexec")
        compare(args)
