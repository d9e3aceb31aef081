"""CIFAR-10: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images" (2009), chapter 3.

50,000 training and 10,000 test images of 32x32 RGB in ten classes. Read from the official Python or binary batches, in
a folder or still in their .tar.gz, or from the one HDF5 file that data/prepare.py makes of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from . import hdf5
from .datasets import DataError, Part, Raw, dataset
from .files import read_file, read_tar
from .pickles import as_array, read_pickle

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BATCH = 10_000  # images in each of the six files
PIXELS = 3 * 32 * 32  # bytes of an image: all its reds, all its greens, all its blues
BATCHES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch")
MOST_BYTES = 32 << 20  # a file has 30.7 MB of images and labels; the Python ones add 0.3 MB of file names

# in order of preference: checked and fastest first
PLACES = (
    "cifar10.h5",
    "cifar-10-batches-py",
    "cifar-10-batches-bin",
    "cifar-10-python.tar.gz",
    "cifar-10-binary.tar.gz",
)


@dataset("cifar10")
def cifar10(folders: Sequence[Path], train_size: int | None = None, test_size: int | None = None) -> Raw | None:
    """CIFAR-10 from the first of `folders` that has it; each may also be the batches' folder or the file itself."""
    path = find(folders)
    return None if path is None else read(path)


def find(folders: Sequence[Path]) -> Path | None:
    """The file or folder that `read()` is to read."""
    for folder in folders:
        if folder.is_file() or _is_batches(folder):
            return folder
        for place in PLACES:
            if (folder / place).exists():
                return folder / place
    return None


def read(path: Path) -> Raw:
    """All images of a folder of batches, a .tar.gz of one, or an HDF5 file. Raises DataError."""
    if path.suffix in (".h5", ".hdf5"):
        return hdf5.read(path, CLASSES)
    train = Part(np.empty((5 * BATCH, 32, 32, 3), np.uint8), np.empty(5 * BATCH, np.int64))
    test = Part(np.empty((BATCH, 32, 32, 3), np.uint8), np.empty(BATCH, np.int64))
    places = {name: (train, slice(i * BATCH, (i + 1) * BATCH)) for i, name in enumerate(BATCHES[:5])}
    places["test_batch"] = (test, slice(0, BATCH))
    for file, contents in _files(path):
        where = path / file
        name, _, binary = file.partition(".")
        if name not in places:
            raise DataError(f"{where}: this batch is there twice; expected each of {', '.join(BATCHES)} once")
        part, at = places.pop(name)
        planes, labels = _decode_binary(contents, where) if binary else _decode_python(contents, where)
        for channel in range(3):  # a plane at a time: three times faster than a transposed copy
            part.images[at][..., channel] = planes[:, channel * 1024 : (channel + 1) * 1024].reshape(-1, 32, 32)
        part.labels[at] = labels
    if places:
        raise DataError(f"{path}: {', '.join(places)} missing; expected {', '.join(BATCHES)}. Get them: {_GET}")
    return Raw(train, test, CLASSES, str(path))


_GET = "python data/prepare.py cifar10"


def _is_batches(folder: Path) -> bool:
    return any((folder / f"data_batch_1{suffix}").exists() for suffix in ("", ".bin"))


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each batch in a folder or archive."""
    if path.is_dir():
        suffix = ".bin" if (path / "data_batch_1.bin").exists() else ""
        for name in BATCHES:
            if (path / f"{name}{suffix}").exists():
                yield f"{name}{suffix}", read_file(path / f"{name}{suffix}", MOST_BYTES)
    elif path.name.endswith((".tar.gz", ".tgz")):
        limits = {f"{name}{suffix}": MOST_BYTES for name in BATCHES for suffix in ("", ".bin")}
        yield from read_tar(path, limits, total=7 * MOST_BYTES)
    else:
        raise DataError(f"{path}: no form of CIFAR-10; expected {', '.join(PLACES)}. Get it: {_GET}")


def _decode_binary(contents: bytes, where: Path) -> tuple[np.ndarray, np.ndarray]:
    """One byte of label and PIXELS bytes of image, BATCH times."""
    size = BATCH * (1 + PIXELS)
    if len(contents) != size:
        raise DataError(f"{where}: {len(contents):,} bytes, expected {size:,}; get it again: {_GET}")
    rows = np.frombuffer(contents, np.uint8).reshape(BATCH, 1 + PIXELS)
    return rows[:, 1:], _checked(rows[:, 0].tolist(), where)


def _decode_python(contents: bytes, where: Path) -> tuple[np.ndarray, np.ndarray]:
    """A dictionary with `data`, uint8 (BATCH, PIXELS), and `labels`, a list."""
    batch = read_pickle(contents, where)
    if not isinstance(batch, dict) or "data" not in batch or "labels" not in batch:
        raise DataError(f"{where}: expected a dictionary with data and labels; get it again: {_GET}")
    planes, labels = as_array(batch["data"], where), batch["labels"]
    if planes.shape != (BATCH, PIXELS):
        raise DataError(f"{where}: images of shape {planes.shape}, expected ({BATCH}, {PIXELS}); get it again: {_GET}")
    if not isinstance(labels, list) or len(labels) != BATCH or not all(type(label) is int for label in labels):
        raise DataError(f"{where}: labels are not a list of {BATCH} whole numbers; get it again: {_GET}")
    return planes, _checked(labels, where)


def _checked(labels: list[int], where: Path) -> np.ndarray:
    for i, label in enumerate(labels):
        if not 0 <= label < len(CLASSES):
            raise DataError(
                f"{where}: label {label} of image {i} is out of range, expected 0 to 9; get it again: {_GET}"
            )
    return np.array(labels, np.int64)
