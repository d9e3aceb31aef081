"""Data sets: `load("cifar10")` gives three splits of uint8 images with their labels.

A reader is a function of the folders to look in. It returns all it found as `Raw`, or None if its files are not there;
`@dataset("name")` puts it on the list. What is common to all sets is here: where to look, what `auto` means, the
split into training and validation, mean and standard deviation, and the checks that each split passes before use.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

ENVIRONMENT = "NANOCNN_DATA"
HERE = (Path("data"), Path(__file__).resolve().parents[2] / "data")  # of the current folder, of the source tree
SPLIT_STREAM = 0x5B117  # keeps the split's random numbers apart from those of the epochs


class DataError(ValueError):
    """Data that are missing, damaged, malicious or of the wrong kind: what, where, what was expected, what to do."""


class Part(NamedTuple):
    """`images` uint8 (N, H, W, C) and `labels` int64 (N,)."""

    images: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Raw:
    """What a reader read, as it was published: no validation set, nothing normalised."""

    train: Part
    test: Part
    classes: tuple[str, ...]
    source: str  # the file or folder it came from


@dataclass(frozen=True)
class Split:
    """Images uint8 (N, H, W, C), labels int64 (N,), class names, and the training set's `mean` and `std` (C,).

    Mean and standard deviation are those of pixels in 0..1, float64. Raises DataError unless everything fits.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    source: str = "images given as arrays"

    def __post_init__(self) -> None:
        check(Part(self.images, self.labels), len(self.classes), self.source)
        object.__setattr__(self, "images", np.ascontiguousarray(self.images))  # batches are gathered from flat pixels
        channels = self.images.shape[3]
        if np.shape(self.mean) != (channels,) or np.shape(self.std) != (channels,):
            raise DataError(
                f"{self.source}: mean {np.shape(self.mean)} and std {np.shape(self.std)} for {channels} channels; "
                f"expected one number a channel"
            )

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class DataSet:
    """The splits `train`, `val` (perhaps empty) and `test`; `notice` says in one line what was read from where."""

    name: str
    train: Split
    val: Split
    test: Split
    notice: str

    @property
    def classes(self) -> tuple[str, ...]:
        return self.train.classes


# ------------------------------------------------------------------ the list of data sets

Reader = Callable[[Sequence[Path], int | None, int | None], Raw | None]
readers: dict[str, Reader] = {}


def dataset(name: str) -> Callable[[Reader], Reader]:
    """Put a reader on the list: `reader(folders, train_size, test_size) -> Raw`, or None if its files are not there.

    The sizes are a hint for a set that is made rather than read; `load()` cuts off what is too much.
    """

    def register(reader: Reader) -> Reader:
        readers[name] = reader
        return reader

    return register


def folders(data_dir: str | os.PathLike[str] | None = None) -> list[Path]:
    """Where data are looked for: `data_dir`, else $NANOCNN_DATA, else data/ here or in the source tree.

    An explicit choice is the only place, and must exist. Raises DataError.
    """
    named = data_dir if data_dir is not None else os.environ.get(ENVIRONMENT)
    if not named:
        here, *others = HERE
        return [here, *(p for p in others if p.is_dir() and p.resolve() != here.resolve())]
    if not Path(named).exists():
        origin = "--data-dir" if data_dir is not None else f"${ENVIRONMENT}"
        raise DataError(f"{named}: no such file or folder ({origin}); name the folder that holds the data")
    return [Path(named)]


def load(
    name: str = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    *,
    val: float | int = 0.1,
    seed: int = 0,
    train_size: int | None = None,
    test_size: int | None = None,
) -> DataSet:
    """Read a data set and take a validation set off its training set; the network is never touched.

    `"auto"` is CIFAR-10 if it is found, else the built-in shapes. `val` is a fraction below 1 or a number of images;
    which images is drawn with `seed`. `train_size` (before the validation set is taken off) and `test_size` keep the
    first images only. Raises DataError.
    """
    if name != "auto" and name not in readers:
        raise DataError(f"unknown data set {name!r}: expected auto, {', '.join(sorted(readers))}")
    searched = folders(data_dir)
    wanted = "cifar10" if name == "auto" else name
    raw = readers[wanted](searched, train_size, test_size)
    how = f"python data/prepare.py {wanted}"
    where = ", ".join(dict.fromkeys(str(f) for f in searched))
    hint = ""
    if raw is None and name == "auto":
        wanted, hint = "shapes", f"; CIFAR-10 is not in {where}, this gets it: {how}"
        raw = readers[wanted](searched, train_size, test_size)
    if raw is None:
        raise DataError(f"{wanted} is not in {where}; get it with: {how}, or name its folder with --data-dir")
    train = _first(raw.train, train_size, raw.source)
    test = _first(raw.test, test_size, raw.source)
    check(train, len(raw.classes), f"{raw.source}, training images")
    train, held_out = _take_off(train, val, seed)
    mean, std = statistics(train.images)

    def split(part: Part, what: str) -> Split:
        return Split(part.images, part.labels, raw.classes, mean, std, f"{raw.source}, {what} images")

    counts = f"{len(train.labels):,} train, {len(held_out.labels):,} validation, {len(test.labels):,} test"
    return DataSet(
        name=wanted,
        train=split(train, "training"),
        val=split(held_out, "validation"),
        test=split(test, "test"),
        notice=f"data: {wanted} from {raw.source} ({counts}){hint}",
    )


# ------------------------------------------------------------------ what every split passes through


def check(part: Part, classes: int, where: str) -> None:
    """Raise DataError unless images are uint8 (N, H, W, C) and labels int64 (N,) in 0..classes-1."""
    images, labels = part
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or 0 in images.shape[1:]:
        raise DataError(f"{where}: images are {_kind(images)}, expected uint8 (N, height, width, channels)")
    if not isinstance(labels, np.ndarray) or labels.dtype != np.int64 or labels.shape != (len(images),):
        raise DataError(f"{where}: labels are {_kind(labels)}, expected int64 ({len(images)},), one for each image")
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        bad = int(np.flatnonzero((labels < 0) | (labels >= classes))[0])
        raise DataError(f"{where}: label {labels[bad]} of image {bad} is out of range, expected 0 to {classes - 1}")


def statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, of pixels in 0..1: float64 (C,), exact sums of integers."""
    n, h, w, channels = images.shape
    total, squares = np.zeros((2, h * w * channels), np.int64)
    for start in range(0, n, 256):  # a block stays in the cache, and its sums within 32 bits
        block = images[start : start + 256].reshape(-1, h * w * channels)
        total += block.sum(axis=0, dtype=np.uint32)
        squares += np.square(block, dtype=np.uint16).sum(axis=0, dtype=np.uint32)
    pixels = max(1, n * h * w)
    mean = total.reshape(-1, channels).sum(axis=0) / pixels
    variance = np.maximum(squares.reshape(-1, channels).sum(axis=0) / pixels - mean**2, 0)
    std = np.sqrt(variance)
    return mean / 255, np.where(std > 0, std, 255) / 255  # a channel that never changes is only centred


def _first(part: Part, size: int | None, source: str) -> Part:
    if size is None:
        return part
    if not 1 <= size <= len(part.labels):
        raise DataError(f"{source}: {size} images asked for, there are {len(part.labels)}; ask for 1 to that many")
    return Part(part.images[:size], part.labels[:size])


def _take_off(part: Part, val: float | int, seed: int) -> tuple[Part, Part]:
    """Training and validation part: the same for the same seed, each in the order of the files."""
    n = len(part.labels)
    count = round(val * n) if 0 <= val < 1 else val
    if not 0 <= count < n or count != int(count):
        raise DataError(
            f"a validation set of {val} cannot be taken off {n} training images; expected a fraction from 0 to below "
            f"1, or a number of images below {n} (--val)"
        )
    if count == 0:
        return part, Part(part.images[:0], part.labels[:0])
    count = int(count)
    order = np.random.default_rng((SPLIT_STREAM, seed % 2**64)).permutation(n)
    held_out, rest = np.sort(order[:count]), np.sort(order[count:])
    return Part(part.images[rest], part.labels[rest]), Part(part.images[held_out], part.labels[held_out])


def _kind(array: object) -> str:
    return f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else f"a {type(array).__name__}"
