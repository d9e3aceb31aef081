"""Small data sets in the official formats, and the damage that can be done to them."""

import gzip
import io
import struct
import tarfile
from pathlib import Path

import numpy as np

BATCH = 20  # images in a file; tests set `cifar10.BATCH` to it


def cifar_arrays(seed=0):
    """Planes uint8 (6, BATCH, 3072) and labels (6, BATCH) of the six files."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (6, BATCH, 3072), dtype=np.uint8), rng.integers(0, 10, (6, BATCH))


def cifar_names(suffix=""):
    return [f"data_batch_{i}{suffix}" for i in range(1, 6)] + [f"test_batch{suffix}"]


def python2_batch(planes, labels):
    """A batch as Python 2 pickled the official ones: protocol 2, strings that are bytes."""

    def string(word):
        return b"U" + bytes([len(word)]) + word.encode()

    minus = b"J\xff\xff\xff\xff"
    array = b"cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05(K\x01"
    array += b"J" + struct.pack("<i", planes.shape[0]) + b"J" + struct.pack("<i", planes.shape[1]) + b"\x86"
    array += b"cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87R(K\x03U\x01|NNN" + minus + minus + b"K\x00tb\x89"
    array += b"T" + struct.pack("<i", planes.nbytes) + planes.tobytes() + b"tb"
    pairs = string("batch_label") + string("a batch") + string("labels") + b"]q\x02("
    pairs += b"".join(b"M" + struct.pack("<H", label) for label in labels) + b"e" + string("data") + array
    pairs += string("filenames") + b"](" + b"".join(string(f"{i}.png") for i in range(len(labels))) + b"e"
    return b"\x80\x02}q\x01(" + pairs + b"u."


def write_cifar_python(folder: Path, seed=0) -> Path:
    folder.mkdir(parents=True)
    for name, planes, labels in zip(cifar_names(), *cifar_arrays(seed), strict=True):
        (folder / name).write_bytes(python2_batch(planes, labels))
    (folder / "batches.meta").write_bytes(b"never read")
    return folder


def write_cifar_binary(folder: Path, seed=0) -> Path:
    folder.mkdir(parents=True)
    for name, planes, labels in zip(cifar_names(".bin"), *cifar_arrays(seed), strict=True):
        (folder / name).write_bytes(np.column_stack([labels.astype(np.uint8), planes]).tobytes())
    return folder


def tar_of(folder: Path, path: Path) -> Path:
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.add(folder, folder.name)
    return path


def tar_with(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for info, contents in members:
            info.size = len(contents)
            tar.addfile(info, io.BytesIO(contents))
    return path


def idx(array: np.ndarray) -> bytes:
    return (
        bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.astype(np.uint8).tobytes()
    )


def write_mnist(folder: Path, zipped=True, n=(30, 10), seed=0) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for prefix, count in zip(("train", "t10k"), n, strict=True):
        arrays = {"images-idx3": rng.integers(0, 256, (count, 28, 28)), "labels-idx1": rng.integers(0, 10, count)}
        for name, array in arrays.items():
            path = folder / f"{prefix}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(idx(array), 1) if zipped else idx(array))
    return folder
