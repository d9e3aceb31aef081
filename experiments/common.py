"""What every training script shares: its options, and what is made from them. The loop is the script's own."""

from __future__ import annotations

import argparse
import multiprocessing
import multiprocessing.process
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import nanocnn as nc
from nanocnn.capture import CaptureError
from nanocnn.checkpoint import CheckpointError
from nanocnn.data import Augment, Batch, DataError, DataSet, Loader
from nanocnn.kernels import threads, tuned
from nanocnn.kernels.cuda import device as gpu
from nanocnn.kernels.cuda import device_memory, emulated
from nanocnn.kernels.cuda.cublas import CublasError
from nanocnn.kernels.cuda.graph import HostError
from nanocnn.kernels.dispatch import DEVICES, ChoiceError, DeviceError, choices_in_force, parse_use, primitives
from nanocnn.optim import OPTIMIZERS, Optimizer, decay_groups
from nanocnn.parallel import Alone, Comm, GradientAverager
from nanocnn.parallel.launcher import launched
from nanocnn.precision import LossScaler, NonFiniteGradient, default_scaler, precision
from nanocnn.precision import check as check_precision
from nanocnn.profile import Profile, merge_traces
from nanocnn.progress import say
from nanocnn.record import RecordError
from nanocnn.resume import Position
from nanocnn.schedules import SCHEDULES
from nanocnn.tensor import Op
from nanocnn.train import NonFiniteLoss, evaluate, train_step

# Peak learning rates at batch 128 with which each update rule learns; LARS scales by its trust coefficient of 0.001.
LEARNING_RATES = {"sgd": 0.03, "adam": 1e-3, "adamw": 1e-3, "adagrad": 1e-2, "lars": 5.0}


def training_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the options of data, optimisation, run and engine; a script adds those of its model."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=TeachingFormatter, allow_abbrev=False
    )
    _add_data(parser.add_argument_group("data"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_run(parser.add_argument_group("run"))
    _add_engine(parser.add_argument_group("engine"))
    return parser


class TeachingFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each help text, where there is one; the examples of the epilog as they were written."""

    def _get_help_string(self, action):
        none = action.default in (None, []) or action.default is False
        return action.help if none else super()._get_help_string(action)


def _add_data(group) -> None:
    group.add_argument(
        "--data",
        default="auto",
        help="cifar10, mnist, shapes (built in), or auto: CIFAR-10 if it is found, else shapes",
    )
    group.add_argument("--data-dir", help="where the files are; else $NANOCNN_DATA, else data/")
    group.add_argument(
        "--val", type=fraction, default=0.1, metavar="SHARE", help="share of the training set to select by"
    )
    group.add_argument("--train-images", type=count, metavar="N", help="train on the first N images only")
    group.add_argument("--no-augment", action="store_true", help="no random crops, flips and cutout")
    group.add_argument(
        "--crop-padding", type=natural, default=4, metavar="PX", help="random crop out of an image padded so"
    )
    group.add_argument("--no-flip", action="store_true", help="no horizontal flips (digits are never flipped)")
    group.add_argument(
        "--cutout", type=natural, default=0, metavar="PX", help="side of the square that is blanked; 0 is none"
    )


def _add_optimisation(group) -> None:
    group.add_argument("--epochs", type=count, default=20, help="passes over the training set")
    group.add_argument("--batch-size", type=count, default=128, help="images a step, over all ranks together")
    group.add_argument("--optimizer", choices=tuple(OPTIMIZERS), default="sgd", help="update rule")
    peaks = ", ".join(f"{name} {rate:g}" for name, rate in LEARNING_RATES.items())
    group.add_argument("--lr", type=positive, help=f"peak learning rate; else by the update rule: {peaks}")
    group.add_argument("--momentum", type=natural_real, default=0.9, help="of SGD (Nesterov's) and LARS")
    group.add_argument("--weight-decay", type=natural_real, default=5e-4, help="of weights; biases and norms have none")
    group.add_argument("--schedule", choices=tuple(SCHEDULES), default="cosine", help="learning rate over the steps")
    group.add_argument("--warmup-epochs", type=natural_real, default=1.0, metavar="E", help="linear warm-up")
    group.add_argument(
        "--label-smoothing", type=fraction, default=0.0, metavar="S", help="probability spread over the classes"
    )
    group.add_argument(
        "--loss-scale",
        type=loss_scale,
        metavar="SCALE",
        help="in half precision: dynamic, which is the default with precision=fp16 (with bf16 there is none), or the "
        "number that it is to stay",
    )
    group.add_argument("--clip", type=positive, metavar="NORM", help="largest norm of the whole gradient")
    group.add_argument("--ema", type=fraction, metavar="DECAY", help="evaluate an average of the weights, 0.999 say")
    group.add_argument("--patience", type=count, metavar="E", help="stop after E epochs without a better validation")


def _add_run(group) -> None:
    group.add_argument("--name", help="the run's folder under --runs; default: the script's name and the data's")
    group.add_argument("--runs", default="runs", metavar="DIR", help="where runs are kept")
    group.add_argument("--seed", type=natural, default=0, help="of weights, split, order, augmentation and dropout")
    group.add_argument("--resume", action="store_true", help="go on from the run's newest good checkpoint")
    group.add_argument("--keep", type=count, default=2, metavar="K", help="checkpoints kept, besides the best")


def _add_engine(group) -> None:
    about = "; ".join(f"{name}: {what}" for name, what in DEVICES.items())
    group.add_argument("--device", choices=tuple(DEVICES), default="cpu", help=about)
    group.add_argument(
        "--use",
        nargs="+",
        default=[],
        metavar="CHOICE",
        help="a policy (fastest, tuned, reference) and choices such as conv2d=reference overlap=off; "
        "python -m nanocnn switches lists them",
    )
    group.add_argument(
        "--profile",
        type=count,
        nargs="?",
        const=20,
        metavar="STEPS",
        help="profile so many steps (20): a table, and a trace for Perfetto in the run's folder",
    )


# ------------------------------------------------------------------ types: argparse prints their errors


def count(word: str) -> int:
    """A positive integer."""
    return _number(word, int, lambda n: n >= 1, "a positive integer")


def natural(word: str) -> int:
    """An integer of at least 0."""
    return _number(word, int, lambda n: n >= 0, "an integer of at least 0")


def positive(word: str) -> float:
    """A positive number."""
    return _number(word, float, lambda x: 0 < x < float("inf"), "a positive number")


def loss_scale(word: str) -> float | str:
    """A positive number, or "dynamic"."""
    if word == "dynamic":
        return word
    return _number(word, float, lambda x: 0 < x < float("inf"), "dynamic or a positive number")


def natural_real(word: str) -> float:
    """A number of at least 0."""
    return _number(word, float, lambda x: 0 <= x < float("inf"), "a number of at least 0")


def fraction(word: str) -> float:
    """A number from 0 up to, but without, 1."""
    return _number(word, float, lambda x: 0 <= x < 1, "a number from 0 up to 1")


def _number(word, kind, allowed, expected):
    try:
        value = kind(word)
    except ValueError:
        value = None
    if value is None or not allowed(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {word!r}")
    return value


def without_folder(words: list[str]) -> list[str]:
    """The words of a command line without `--out DIR`, which changes no figure."""
    kept = [word for word in words if not word.startswith("--out=")]
    return [word for before, word in zip(["", *kept], kept, strict=False) if "--out" not in (before, word)]


# ------------------------------------------------------------------ what is made from the options


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; `--use` goes onto the switchboard. Help and errors are printed by rank 0 alone."""
    launch = launched()
    if launch is not None and launch.rank:
        parser.exit = lambda status=0, message=None: (time.sleep(1), sys.exit(status))  # type: ignore
        parser.print_help = parser.print_usage = lambda file=None: None  # type: ignore
    args = parser.parse_args()
    if args.patience and not args.val:
        parser.error("--patience selects by the validation set, and --val 0 leaves none")
    args.lr = args.lr or LEARNING_RATES[args.optimizer]
    policy, choices = parse_use(args.use)
    try:
        nc.use(*policy, **choices)
    except ChoiceError as error:
        parser.error(f"--use: {error}")
    if args.loss_scale and precision.value == "fp32":
        parser.error(f"--loss-scale {args.loss_scale}: gradients of float32 need none; add --use precision=fp16")
    try:
        {"cpu": lambda: None, "cuda": gpu.check, "emulated": emulated.compiler}[args.device]()
        check_precision(args.device)
    except DeviceError as error:
        parser.error(f"--device {args.device}: {error}")
    except ChoiceError as error:
        parser.error(f"--use: {error}")
    return args


def make_optimizer(args: argparse.Namespace, model: nc.nn.Module) -> Optimizer:
    """The update rule of `--optimizer`, with weight decay on weights only."""
    groups = decay_groups(model.named_parameters(), args.weight_decay)
    if args.optimizer == "sgd":
        return OPTIMIZERS["sgd"](groups, args.lr, momentum=args.momentum, nesterov=args.momentum > 0)
    if args.optimizer == "lars":
        return OPTIMIZERS["lars"](groups, args.lr, momentum=args.momentum)
    return OPTIMIZERS[args.optimizer](groups, args.lr)


def make_scaler(args: argparse.Namespace) -> LossScaler:
    """What `--loss-scale` says; without it what the precision needs."""
    if args.loss_scale is None:
        return default_scaler()
    return LossScaler() if args.loss_scale == "dynamic" else LossScaler(args.loss_scale, dynamic=False)


def make_schedule(args: argparse.Namespace, steps_per_epoch: int) -> Callable[[int], float]:
    """The learning rate as a function of the step. A warm-up longer than half the run is cut to half of it."""
    total = args.epochs * steps_per_epoch
    warmup = min(args.warmup_epochs * steps_per_epoch, total // 2)
    return lambda step: SCHEDULES[args.schedule](step, total, args.lr, warmup)


def make_augment(args: argparse.Namespace, data: DataSet) -> Augment | None:
    """Random crop, flip and cutout, as the options say; digits are not flipped."""
    if args.no_augment:
        return None
    flip = not args.no_flip and data.name != "mnist"
    return Augment(pad=args.crop_padding, flip=flip, cutout=args.cutout)


def run_folder(args: argparse.Namespace, default: str, comm: Comm) -> Path:
    """Where this run's files go. A run that is there already is taken up by `--resume` and never mixed with another.

    Without `--name` a new run gets the first free number, and `--resume` takes the highest.
    """
    root, name = Path(args.runs), args.name or default
    if not args.name:
        taken = 1
        while (root / _numbered(name, taken + 1)).exists():
            taken += 1
        name = _numbered(name, taken if args.resume or not (root / name).exists() else taken + 1)
    held = not args.resume and (root / name / "checkpoints").exists()
    folder, held = comm.broadcast_object((root / name, held))  # rank 0's look: by now it may be making the folder
    if held:
        raise RunExists(f"{folder} holds a run: --resume goes on with it, another --name starts a new one")
    return folder


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"


class RunExists(RuntimeError):
    """A new run was to be written where there is one already."""


# ------------------------------------------------------------------ compilation


ENOUGH_IMAGES = 32  # of a rehearsal: with more, hardly a layer chooses another variant


def compile_kernels(
    args: argparse.Namespace, make_model: Callable[..., nc.nn.Module], data: DataSet, comm: Comm
) -> None:
    """Let one rank of each host take a step: what Numba compiles, the others find on disk.

    Four ranks that compile the same kernels on two cores at once take four times as long, and say nothing meanwhile.
    The layers have their real sizes, since it is by them that the fastest variants are chosen. With `--use tuned` the
    batch has too, and all ranks get rank 0's choices.
    """
    if comm.local_rank == 0 and args.device == "cpu":
        model = make_model(width=args.width)
        tuning = "tuned" in choices_in_force().values()
        images = min(len(data.train), max(2, args.batch_size // comm.size), sys.maxsize if tuning else ENOUGH_IMAGES)
        batch = next(Loader(data.train, images, augment=make_augment(args, data), prefetch=0).epoch(0))
        with _Impatience(args, model, batch):
            _rehearse(args, model, batch)
            evaluate(model, [batch], len(data.classes), Alone())
    tuned.choices.update(comm.broadcast_object(tuned.choices))
    tuned.measuring = comm.size == 1


def _rehearse(args: argparse.Namespace, model: nc.nn.Module, batch: Batch) -> None:
    """A step that nobody keeps."""
    optimizer = make_optimizer(args, model)
    averager = GradientAverager(optimizer.buckets, Alone())
    how = dict(label_smoothing=args.label_smoothing, clip=args.clip, scaler=make_scaler(args))
    train_step(model, batch, optimizer, 0.0, averager, **how)


class _Impatience:
    """If a rehearsal takes longer than kernels that are compiled need: says so, and lets a second process help.

    Numba compiles in one thread, and this one begins with the kernels of the forward pass. The helper takes the
    textbook's there, and compiles those of backward, which are then on disk; first layer first, so that both do not
    come to the same one at the same time.
    """

    def __init__(self, args: argparse.Namespace, model: nc.nn.Module, batch: Batch):
        self.work = args, model, batch
        self.timer = threading.Timer(2, self._act)
        self.timer.daemon = True  # after an error it has nothing to say any more
        self.helper: multiprocessing.process.BaseProcess | None = None

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
        self.timer.join()
        if self.helper:
            self.helper.kill()  # what is left is not needed; a file is written whole or not at all

    def _act(self) -> None:
        say("compiling kernels, once (about a minute, more on busy cores)")
        if threads.cores() > 1 and "tuned" not in choices_in_force().values():
            spawn = multiprocessing.get_context("spawn")  # a forked child cannot run OpenMP
            self.helper = spawn.Process(target=_help, args=(*self.work, choices_in_force()), daemon=True)
            self.helper.start()


def _help(args: argparse.Namespace, model: nc.nn.Module, batch: Batch, choices: dict[str, str]) -> None:
    forward = [name for name in primitives if "grad" not in name and "update" not in name]
    apply = Op.apply.__func__  # type: ignore[attr-defined]

    def apply_and_go_back(cls: type[Op], *inputs: Any, **parameters: Any) -> nc.Tensor:
        y = apply(cls, *inputs, **parameters)
        if y.node is not None:
            y.node.backward(y.data)  # any numbers will do for a gradient
        return y

    Op.apply = classmethod(apply_and_go_back)  # type: ignore[assignment]
    policy = choices.pop("policy")
    with nc.using(policy, **{**choices, **dict.fromkeys(forward, "reference")}):
        _rehearse(args, model, batch)


# ------------------------------------------------------------------ errors

# Errors whose message says all that there is to say: a traceback would only hide it.
PLAIN_ERRORS: tuple[type[Exception], ...]
PLAIN_ERRORS = (CheckpointError, ChoiceError, DataError, DeviceError, NonFiniteGradient, NonFiniteLoss)
PLAIN_ERRORS += (RecordError, RunExists)
PLAIN_ERRORS += (CaptureError, CublasError, HostError)  # of a step that cannot be recorded, and of NVIDIA's library
PLAIN_ERRORS += (MemoryError,)  # to which shortage() adds who asked, and what takes less


def connect(device: str = "cpu") -> Comm:
    """`nanocnn.parallel.connect()`, whose error is one line of rank 0 too."""
    try:
        return nc.parallel.connect(device=device)
    except nc.parallel.ConnectError as error:
        launch = launched()
        if launch is None or not launch.rank:
            print(f"ConnectError: {error}", file=sys.stderr, flush=True)
        time.sleep(0.5)  # the launcher ends the job with the first rank that fails: let it be said before
        sys.exit(1)


@contextmanager
def plain_errors(comm: Comm) -> Iterator[None]:
    """End the job with one line for an error that needs no traceback.

    Most such errors meet all ranks alike (a file that is missing is missing for all), so the others give rank 0 a
    second to say it for them; an error of one rank alone is said by that rank, and ends the job too.
    """
    try:
        yield
    except KeyboardInterrupt:  # outside the steps, where StopRequest waits for it, or the second one
        if comm.rank == 0:
            print("interrupted; what was saved before is kept", file=sys.stderr, flush=True)
        comm.abort(130)
    except PLAIN_ERRORS as error:
        if comm.rank:
            time.sleep(1)
        who = f"rank {comm.rank}: " if comm.size > 1 else ""
        words = device_memory.shortage(error) if isinstance(error, MemoryError) else error
        print(f"{who}{type(error).__name__}: {words}", file=sys.stderr, flush=True)
        comm.abort(1)


def say_how_to_resume(position: Position, comm: Comm) -> None:
    """After an interruption: the command that goes on."""
    if comm.rank == 0:
        command = shlex.join(["python", *sys.argv, *(["--resume"] if "--resume" not in sys.argv else [])])
        if comm.size > 1:
            command = f"mpiexec -n {comm.size} {command}"
        say(f"stopped in epoch {position.epoch + 1} after {position.step} steps, with a checkpoint. To go on:")
        say(f"  {command}")


# ------------------------------------------------------------------ memory of GPUs


def gpu_memory(comm: Comm) -> int | None:
    """Bytes that all ranks' pools hold: they keep what they ever needed at once. None where no GPU is used."""
    pools = [held["pool"] for held in comm.all_gather_object(device_memory.held()) if held]
    return sum(pools) if pools else None


# ------------------------------------------------------------------ profile


class StepProfile:
    """`--profile STEPS`: records steps after a few that warm up, then prints a table and writes the ranks' timeline."""

    WARMUP = 3  # steps: the first compiles, and the loader's thread has to get ahead

    def __init__(self, model: nc.nn.Module, steps: int | None, folder: Path, comm: Comm):
        self.profile, self.steps, self.folder, self.comm = Profile(model), steps, folder, comm
        self.seen = 0

    def tick(self) -> None:
        """Call it at the end of each step."""
        if self.steps is None:
            return
        self.seen += 1
        if self.seen == self.WARMUP:
            self.profile.__enter__()
        elif self.seen == self.WARMUP + self.steps:
            self.close()

    def close(self) -> None:
        """Print and write what was recorded; also for a run that is shorter than the profile. Called by all ranks."""
        if self.steps is None:
            return
        if self.seen < self.WARMUP:
            if self.comm.rank == 0:
                say(f"--profile: nothing recorded, the run ended within the {self.WARMUP} steps that warm up")
            return
        self.profile.__exit__(None, None, None)
        self.steps = None
        own = self.folder / f"trace-rank{self.comm.rank}.json"
        self.profile.chrome_trace(own, rank=self.comm.rank)
        self.comm.barrier()
        if self.comm.rank == 0:
            self.profile.print()
            parts = [self.folder / f"trace-rank{r}.json" for r in range(self.comm.size)]
            whole = merge_traces(parts, self.folder / "trace.json")
            for part in parts:
                part.unlink()
            say(f"timeline: {whole} (open it at https://ui.perfetto.dev)")
