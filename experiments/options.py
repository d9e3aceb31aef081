"""The options that every training script takes, in groups, each with its default and what it does."""

from __future__ import annotations

import argparse

from nanocnn.schedules import SCHEDULES


def training_parser(description: str, epilog: str) -> argparse.ArgumentParser:
    """A parser with the options of data, optimisation, run and engine; a script adds those of its model."""
    parser = argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=_TeachingFormatter, allow_abbrev=False
    )
    _add_data(parser.add_argument_group("data"))
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_run(parser.add_argument_group("run"))
    _add_engine(parser.add_argument_group("engine"))
    return parser


class _TeachingFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults after each help text; the examples of the epilog as they were written."""


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
    group.add_argument(
        "--optimizer", choices=("sgd", "adam", "adamw", "adagrad", "lars"), default="sgd", help="update rule"
    )
    group.add_argument("--lr", type=positive, default=0.05, help="peak learning rate")
    group.add_argument("--momentum", type=natural_real, default=0.9, help="of SGD (Nesterov's) and LARS")
    group.add_argument("--weight-decay", type=natural_real, default=5e-4, help="of weights; biases and norms have none")
    group.add_argument("--schedule", choices=tuple(SCHEDULES), default="cosine", help="learning rate over the steps")
    group.add_argument("--warmup-epochs", type=natural_real, default=1.0, metavar="E", help="linear warm-up from 0")
    group.add_argument(
        "--label-smoothing", type=fraction, default=0.0, metavar="S", help="probability spread over the classes"
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
    group.add_argument(
        "--no-checkpoints", action="store_true", help="write none, and so lose the run when it is stopped"
    )


def _add_engine(group) -> None:
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
