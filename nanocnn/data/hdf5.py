"""A data set in one HDF5 file: uint8 NHWC, chunked, checked before use, written all at once or not at all.

    /train/images  uint8 (N, H, W, C), chunks of 128 images, fletcher32      /train/labels  int64 (N,), fletcher32
    /test/images   ...                                                       attributes: classes, source

The first 512 bytes are the format's own "user block", which HDF5 leaves to the application: it holds the SHA-256 of
all that follows. It is checked before libhdf5 sees the file, because a damaged one can make the library loop for ever
(HDFGroup/hdf5 issue 1707). The fletcher32 sums are for other programs, which know nothing of the block.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from pathlib import Path

import h5py
import numpy as np

from .datasets import DataError, Part, Raw

BLOCK = 512
MAGIC = b"nanocnn data set 1, sha256 of the rest: "
CHUNK = 128  # images


def write(path: Path, raw: Raw) -> None:
    """Write `raw` beside `path` and move it there. Raises DataError (a full disk, say) and leaves `path` as it was."""
    memory = io.BytesIO()  # an error while libhdf5 writes to disk leaves it unable to close the file
    with h5py.File(memory, "w", userblock_size=BLOCK) as file:
        file.attrs["classes"] = list(raw.classes)
        file.attrs["source"] = raw.source
        for name, part in (("train", raw.train), ("test", raw.test)):
            n, *shape = part.images.shape
            group = file.create_group(name)
            group.create_dataset("images", data=part.images, chunks=(min(n, CHUNK), *shape), fletcher32=True)
            group.create_dataset("labels", data=part.labels, chunks=(n,), fletcher32=True)
    contents = memory.getbuffer()
    digest = hashlib.sha256(contents[BLOCK:]).hexdigest().encode()
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as out:
            out.write((MAGIC + digest).ljust(BLOCK, b"\n"))
            out.write(contents[BLOCK:])
            out.flush()
            os.fsync(out.fileno())
        os.replace(beside, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise DataError(f"{path}: cannot be written, {error}; nothing was changed, try another folder") from error
        raise


def read(path: Path, classes: tuple[str, ...]) -> Raw:
    """What `write()` wrote. Raises DataError if a single bit differs, or if it is a data set of other classes."""
    again = "make it again: python data/prepare.py"
    try:
        with open(path, "rb") as stream:
            block = stream.read(BLOCK)
            if not block.startswith(MAGIC) or len(block) < BLOCK:
                raise DataError(f"{path}: not a data file of nanocnn, its first bytes are {block[:16]!r}; {again}")
            found = hashlib.file_digest(stream, "sha256").hexdigest()
        expected = block[len(MAGIC) :].strip().decode("ascii", "replace")
        if found != expected:
            raise DataError(f"{path}: damaged or truncated, its SHA-256 is {found}, expected {expected}; {again}")
        with h5py.File(path, "r", locking=False) as file:
            size = path.stat().st_size
            train, test = (Part(*(_array(file[f"{n}/{k}"], size) for k in Part._fields)) for n in ("train", "test"))
            held = tuple(str(c) for c in file.attrs["classes"])
        if held != classes:
            raise DataError(f"{path}: holds the classes {', '.join(held)}, expected {', '.join(classes)}; {again}")
        return Raw(train, test, classes, str(path))
    except DataError:
        raise
    except Exception as error:  # h5py's exceptions are many and undocumented
        raise DataError(f"{path}: cannot be read, {type(error).__name__}: {error}; {again}") from error


def _array(stored: h5py.Dataset, most_bytes: int) -> np.ndarray:
    """The whole array; ours are not compressed, so one larger than its file is not ours."""
    if stored.nbytes > most_bytes:
        raise ValueError(f"{stored.name} claims {stored.nbytes:,} bytes in a file of {most_bytes:,}")
    return stored[...]
