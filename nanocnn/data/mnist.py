"""MNIST: LeCun, Bottou, Bengio, Haffner, "Gradient-Based Learning Applied to Document Recognition" (1998).

60,000 training and 10,000 test images of 28x28 grey pixels, handwritten digits. Read from the four idx files, gzipped
or not, or from the HDF5 file that data/prepare.py makes of them.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from . import hdf5
from .datasets import DataError, Part, Raw, dataset
from .files import read_file

CLASSES = tuple("0123456789")
SIZE = 28
MOST_IMAGES = 70_000  # in one file; more is no MNIST but a header that lies
PLACES = ("mnist.h5", "mnist", "MNIST/raw", ".")
_GET = "python data/prepare.py mnist"


@dataset("mnist")
def mnist(folders: Sequence[Path], train_size: int | None = None, test_size: int | None = None) -> Raw | None:
    """MNIST from the first of `folders` that has it; each may also be the idx files' folder or the HDF5 file."""
    path = find(folders)
    return None if path is None else read(path)


def find(folders: Sequence[Path]) -> Path | None:
    """The file or folder that `read()` is to read."""
    for folder in folders:
        if folder.is_file():
            return folder
        for place in PLACES:
            path = folder / place
            if path.is_file() or _idx_file(path, "train-images-idx3-ubyte"):
                return path
    return None


def read(path: Path) -> Raw:
    """All images of a folder of idx files, or of an HDF5 file. Raises DataError."""
    if path.suffix in (".h5", ".hdf5"):
        return hdf5.read(path, CLASSES)
    if not path.is_dir():
        raise DataError(f"{path}: no form of MNIST; expected mnist.h5 or a folder of four idx files. Get it: {_GET}")
    return Raw(_part(path, "train"), _part(path, "t10k"), CLASSES, str(path))


def _part(folder: Path, prefix: str) -> Part:
    images = _read_idx(folder, f"{prefix}-images-idx3-ubyte", (SIZE, SIZE))
    labels = _read_idx(folder, f"{prefix}-labels-idx1-ubyte", ())
    if len(images) != len(labels):
        raise DataError(f"{folder}: {len(images)} {prefix} images but {len(labels)} labels; get them again: {_GET}")
    if labels.max(initial=0) >= len(CLASSES):
        bad = int(np.argmax(labels >= len(CLASSES)))
        raise DataError(f"{folder}: {prefix} label {labels[bad]} of image {bad} is out of range, expected 0 to 9")
    return Part(images[..., None], labels.astype(np.int64))


def _idx_file(folder: Path, name: str) -> Path | None:
    """The file of that name, gzipped or not; some copies have a dot where the official name has its second dash."""
    for spelling in (name, name.replace("-idx", ".idx")):
        for suffix in ("", ".gz"):
            if (folder / f"{spelling}{suffix}").is_file():
                return folder / f"{spelling}{suffix}"
    return None


def _read_idx(folder: Path, name: str, item: tuple[int, ...]) -> np.ndarray:
    """uint8 (N, *item). An idx file begins with 0, 0, 8 (for uint8), the number of dimensions, and each in 4 bytes."""
    path = _idx_file(folder, name)
    if path is None:
        raise DataError(f"{folder / name}: not there, with or without .gz; get it: {_GET}")
    start = 4 + 4 * (1 + len(item))
    raw = read_file(path, start + MOST_IMAGES * math.prod(item))
    if len(raw) < start or raw[:4] != bytes((0, 0, 8, 1 + len(item))):
        expected = bytes((0, 0, 8, 1 + len(item))).hex()
        raise DataError(f"{path}: begins with {raw[:4].hex() or 'nothing'}, expected {expected}: no idx file of {name}")
    count, *shape = struct.unpack(f">{1 + len(item)}I", raw[4:start])
    if tuple(shape) != item:
        raise DataError(f"{path}: images of {shape} pixels, expected {list(item)}; get it again: {_GET}")
    if len(raw) - start != count * math.prod(item):
        raise DataError(
            f"{path}: the header promises {count:,} items, {count * math.prod(item):,} bytes, and {len(raw) - start:,} "
            f"follow; get it again: {_GET}"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(count, *item)
