"""Configurations of the engine, trained side by side and compared: time, memory, accuracy, and what ran.

Each trains in a process of its own, so that peak memory is that of its process (the largest resident set). Several
processes live at once, but only one trains at a time, a few steps, then the next (A B C A B C): a slow moment of the
machine meets them all alike. One of each group is the base, and times are compared with the base's in the same group.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import progress
from rich.console import Console

import nanocnn as nc  # before NumPy, whose BLAS reads at import what this sets in the environment
from nanocnn.data import Batch, DataSet, Loader
from nanocnn.kernels import dispatch
from nanocnn.kernels.cuda import device_memory
from nanocnn.machine import machine_facts
from nanocnn.models import alexnet_cifar, resnet18
from nanocnn.optim import SGD, decay_groups
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.precision import default_scaler
from nanocnn.profile import Profile
from nanocnn.progress import say
from nanocnn.record import peak_memory
from nanocnn.schedules import SCHEDULES
from nanocnn.train import evaluate, train_step

import common  # isort: skip  (beside this file)

WARM_UP = 3  # steps whose time does not count: the first compiles, the second is looked at by the profile
TURN = 5  # steps that a process takes before the next one's turn
MOST = 12  # processes at once, if memory allows


@dataclass(frozen=True)
class Configuration:
    """A policy and choices, with a label, and the place and description of what they differ in."""

    label: str
    policy: str
    choices: dict[str, str] = field(hash=False)
    place: str = ""
    about: str = ""


@dataclass
class Row:
    """A configuration and what its processes reported: a look at one step, and a sample for each training."""

    configuration: Configuration
    look: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""

    @property
    def measured(self) -> bool:
        return bool(self.samples) and not self.error

    @property
    def cost(self) -> float:
        """Milliseconds of a step: the median of all that were timed."""
        return 1e3 * statistics.median(t for s in self.samples for t in s["seconds"])

    def calls(self, primitive: str) -> dict[str, int]:
        """In one step: variant -> calls."""
        return self.look["calls"].get(primitive, {})

    def figures(self) -> dict[str, Any]:
        """Milliseconds a step, its ratio to the base's, bytes, accuracy, loss: means over the seeds.

        A spread is the standard deviation over the seeds, None for a single one; for time, of the seeds' medians.
        """
        if not self.measured:
            return {}
        seeds = {s["seed"] for s in self.samples}
        medians = [
            1e3 * statistics.median(t for s in self.samples if s["seed"] == seed for t in s["seconds"])
            for seed in seeds
        ]
        found = dict(ms=self.cost, ms_min=1e3 * min(t for s in self.samples for t in s["seconds"]))
        found |= dict(ms_spread=_spread(medians), ratio=statistics.median(s["ratio"] for s in self.samples))
        found |= dict(memory=max(s["memory"] for s in self.samples), seeds=len(seeds))
        for name in ("accuracy", "loss"):
            values = list({s["seed"]: s[name] for s in self.samples}.values())
            found[name] = statistics.mean(values) if None not in values else None
            found[f"{name}_spread"] = _spread(values) if None not in values else None
        return found


def _turns(sample: dict[str, Any]) -> list[float]:
    """Seconds a step of each turn. The same turn of two processes follows closely, and is compared."""
    seconds = sample["seconds"]
    return [statistics.median(seconds[i : i + TURN]) for i in range(0, len(seconds), TURN)]


def _spread(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


# ------------------------------------------------------------------ in a process of its own


def train(task: dict[str, Any], pipe: Any) -> None:
    """Train as `task` says: send a look at a step, then take as many steps as are asked for, then send a sample.

    An error is sent as a string.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to hear; it ends us
    try:
        with nc.using(task["policy"], **task["choices"]):
            training = Training(**task["training"])
            pipe.send(training.look)
            while steps := pipe.recv():
                pipe.send(training.take(steps))
            pipe.send(training.sample())
    except (EOFError, BrokenPipeError):
        return  # the parent is gone: there is nobody to tell
    except Exception as error:
        pipe.send(f"{type(error).__name__}: {error}")


class Training:
    """A network and its data, warmed up. `look` says what a step calls and asks, and whether it had to be compiled."""

    def __init__(self, data: DataSet, model: str, options: dict[str, Any], seed: int):
        from numba.core import event  # not above: it imports NumPy, and nanocnn must come before

        nc.manual_seed(seed)
        self.data, self.options, self.seed = data, options, seed
        channels, size = data.train.images.shape[3], data.train.images.shape[1]
        if model == "alexnet":
            extras = {name: options[name] for name in ("width", "batch_norm", "dropout")}
            self.net: nc.nn.Module = alexnet_cifar(len(data.classes), image_size=size, in_channels=channels, **extras)
        else:
            self.net = resnet18(len(data.classes), stem="cifar", width=options["width"], in_channels=channels)
        self.net.to(options["device"])
        groups = decay_groups(self.net.named_parameters(), 5e-4)
        self.optimizer = SGD(groups, options["lr"], momentum=0.9, nesterov=True)
        self.averager = GradientAverager(self.optimizer.buckets, Alone())
        self.scaler = default_scaler(2.0**8)  # steps are few: none is to be skipped
        augment = common.make_augment(argparse.Namespace(**options, no_flip=False, crop_padding=4, cutout=0), data)
        loader = Loader(data.train, options["batch"], augment=augment, shuffle=True, seed=seed)
        self.batches, self.seconds, self.taken = _endless(loader), [], 0
        profile = Profile()
        with event.install_recorder("numba:compile") as compiled:
            for step in range(WARM_UP):
                with profile if step == 1 else contextlib.nullcontext():
                    self.step()
        calls: dict[str, dict[str, int]] = {}
        for row in profile.rows()["kernels"]:
            calls.setdefault(row["name"], {})[row["variant"]] = row["calls"]
        self.look = dict(calls=calls, asked=dispatch.switches_asked(), compiled=bool(compiled.buffer))
        self.look["memory"] = _peak(options["device"])

    def step(self) -> float:
        """Take one; its mean loss."""
        steps = self.options["steps"]
        lr = SCHEDULES["cosine"](self.taken, steps, self.options["lr"], steps // 4)
        result = train_step(self.net, next(self.batches), self.optimizer, lr, self.averager, scaler=self.scaler)
        self.taken += 1
        return result.loss / result.samples

    def take(self, steps: int) -> int:
        """Take up to `steps` steps; how many are left, none if the time limit has passed."""
        for _ in range(min(steps, self.options["steps"] - self.taken)):
            start = time.perf_counter()
            self.step()
            self.seconds.append(time.perf_counter() - start)
        return self.options["steps"] - self.taken if sum(self.seconds) < self.options["limit"] else 0

    def sample(self) -> dict[str, Any]:
        """What the steps took; the accuracy too, if all of them were taken."""
        self.batches.close()
        found: dict[str, Any] = dict(seed=self.seed, seconds=self.seconds, memory=_peak(self.options["device"]))
        found |= dict(accuracy=None, loss=None)
        if self.taken == self.options["steps"]:
            batches = Loader(self.data.test, 250, shuffle=False).epoch(0)
            result = evaluate(self.net, batches, len(self.data.classes), Alone())
            found |= dict(accuracy=result.accuracy, loss=result.loss)
        return found


def _peak(device: str) -> int:
    """The most bytes that this process has held: of its memory, or what CuPy's pool holds of the GPU's."""
    if device != "cuda":
        return peak_memory()
    return (device_memory.held() or {})["pool"]


def _room(device: str) -> int:
    """Bytes that are free."""
    if device != "cuda":
        return machine_facts()["memory"]["available"] or 0
    import cupy

    return cupy.cuda.runtime.memGetInfo()[0]


def _endless(loader: Loader) -> Iterator[Batch]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


# ------------------------------------------------------------------ side by side


class _Worker:
    """The process of one configuration, as its parent sees it. Whatever goes wrong there is its row's error."""

    def __init__(self, row: Row, training: dict[str, Any]):
        self.row, self.training, self.left = row, training, training["options"]["steps"] - WARM_UP
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # not fork: Numba's threads do not survive it
        self.pipe, theirs = context.Pipe()
        task = dict(policy=self.row.configuration.policy, choices=self.row.configuration.choices)
        self.process = context.Process(target=train, args=(task | dict(training=self.training), theirs), daemon=True)
        self.process.start()
        theirs.close()

    def look(self) -> None:
        """Wait until it is warm. One that had to compile begins anew: the compiler's memory is not the training's."""
        self._look()
        if not self.row.error and self.row.look["compiled"]:
            self.end()
            self._start()
            self._look()

    def _look(self) -> None:
        answer = self.hear()
        if answer is not None:
            self.row.look = answer

    def ask(self, steps: int) -> None:
        """Let it take so many steps; 0 asks for the sample, which is heard later."""
        with contextlib.suppress(OSError):  # a process that has died says so by its silence
            self.pipe.send(steps)

    def hear(self) -> Any:
        """What it answers; None if that was an error."""
        try:
            answer = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            answer = f"its process ended with status {self.process.exitcode}" + " (-9: out of memory?)"
        if isinstance(answer, str):
            self.row.error = answer
            return None
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


class Laboratory:
    """Trains configurations and keeps a row for each."""

    row: type[Row] = Row

    def __init__(self, model: str, data: DataSet, options: dict[str, Any]):
        self.model, self.data, self.options = model, data, options

    def look(self, configurations: Sequence[Configuration]) -> list[Row]:
        """A first step of each, for what it calls and asks: rows without samples."""
        rows = [Row(c) for c in configurations]
        with progress_of(len(rows)) as tell:
            for row in rows:
                tell(f"first steps: {row.configuration.label}")
                with self._workers([row], self.options["seed"]):
                    pass
        return rows

    def run(self, base: Row, rows: Sequence[Row], title: str) -> None:
        """Train all rows with each seed, in groups that `base` belongs to as well."""
        most = max(1, min(MOST, int(0.5 * _room(self.options["device"]) / base.look["memory"])) - 1)
        groups = [rows[i : i + most] for i in range(0, len(rows), most)]
        seeds = range(self.options["seed"], self.options["seed"] + self.options["seeds"])
        turns = -(-(self.options["steps"] - WARM_UP) // TURN)
        with progress_of(len(seeds) * (len(rows) + len(groups)) * turns) as tell:
            for seed in seeds:
                for number, group in enumerate(groups, 1):
                    self._side_by_side(
                        [base, *group],
                        seed,
                        lambda row, n=number, s=seed: tell(
                            f"{title}, seed {s}, group {n} of {len(groups)}: {row.configuration.label}"
                        ),
                    )

    def _side_by_side(self, rows: Sequence[Row], seed: int, tell: Callable[[Row], None]) -> None:
        with self._workers(rows, seed) as workers:
            while training := [w for w in workers if w.left and not w.row.error]:
                for worker in training:
                    tell(worker.row)
                    worker.ask(TURN)
                    worker.left = worker.hear()
            for worker in workers:
                worker.ask(0)
            samples = [(w.row, w.hear()) for w in workers if not w.row.error]
        samples = [(row, sample) for row, sample in samples if sample is not None]
        if not samples or samples[0][0] is not rows[0]:
            return  # the base failed, and there is nothing to compare with
        usual = _turns(samples[0][1])
        for row, sample in samples:
            ratios = [own / base for own, base in zip(_turns(sample), usual, strict=False)]  # one may be cut off
            row.samples.append(sample | dict(ratio=statistics.median(ratios)))

    @contextlib.contextmanager
    def _workers(self, rows: Sequence[Row], seed: int) -> Iterator[list[_Worker]]:
        training = dict(data=self.data, model=self.model, options=self.options, seed=seed)
        workers: list[_Worker] = []
        try:
            workers += [_Worker(row, training) for row in rows if not row.error]
            for worker in workers:
                worker.look()
            yield workers
        finally:
            for worker in workers:
                worker.end()


@contextlib.contextmanager
def progress_of(total: int) -> Iterator[Callable[[str], None]]:
    """`tell(text)` before each piece of work: a bar on a terminal, elsewhere a line every 10 seconds."""
    console = Console(stderr=True)
    if console.is_terminal:
        columns = (progress.TextColumn("{task.description}"), progress.BarColumn(), progress.TaskProgressColumn())
        with progress.Progress(*columns, progress.TimeRemainingColumn(), console=console, transient=True) as bar:
            task = bar.add_task("starting", total=total)
            yield lambda text: bar.update(task, advance=1, description=text)
        return
    done, last = 0, time.monotonic()

    def tell(text: str) -> None:
        nonlocal done, last
        done += 1
        if time.monotonic() - last > 10:
            last = time.monotonic()
            say(f"{done / total:4.0%}  {text}")

    yield tell
