"""nanocnn/data/mnist.py: idx files, honest and lying."""

import gzip
import struct

import numpy as np
import pytest
from cases_data import idx, write_mnist

from nanocnn.data import DataError, hdf5, load, mnist


def test_gzipped_or_not_and_the_hdf5_file_give_the_same(tmp_path):
    folders = write_mnist(tmp_path / "zipped"), write_mnist(tmp_path / "plain", zipped=False)
    hdf5.write(tmp_path / "mnist.h5", mnist.read(folders[0]))
    first, *others = (mnist.read(path) for path in (*folders, tmp_path / "mnist.h5"))
    assert first.train.images.shape == (30, 28, 28, 1)
    assert first.test.labels.dtype == np.int64
    for other in others:
        for a, b in zip((*first.train, *first.test), (*other.train, *other.test), strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("place", ["mnist", "MNIST/raw", "."])
def test_where_it_is_found(tmp_path, place):
    write_mnist(tmp_path / place)
    data = load("mnist", tmp_path, val=0)
    assert len(data.train) == 30
    assert data.classes == tuple("0123456789")


def test_dots_in_the_names(tmp_path):
    for path in list(write_mnist(tmp_path).iterdir()):
        path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    assert len(mnist.read(tmp_path).test.labels) == 10


def test_nothing_there(tmp_path):
    with pytest.raises(DataError, match=r"mnist is not in .*get it with: python data/prepare.py mnist"):
        load("mnist", tmp_path)


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte", "t10k-images-idx3-ubyte"])
def test_a_missing_file(tmp_path, name):
    (write_mnist(tmp_path) / f"{name}.gz").unlink()
    with pytest.raises(DataError, match=f"{name}: not there"):
        mnist.read(tmp_path)


HONEST = idx(np.zeros((30, 28, 28)))


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "begins with nothing, expected 00000803"),
        (HONEST[:10], "begins with 00000803, expected 00000803: no idx file"),
        (b"\x89PNG" + HONEST, "begins with 89504e47, expected 00000803"),
        (b"\0\0\x0d\x03" + HONEST[4:], "begins with 00000d03"),  # floats
        (HONEST[:-1], "the header promises 30 items, 23,520 bytes, and 23,519 follow"),
        (HONEST + b"\0", "23,521 follow"),
        (HONEST[:4] + struct.pack(">3I", 60000, 28, 28) + HONEST[16:], "the header promises 60,000 items"),
        (HONEST[:4] + struct.pack(">3I", 2**32 - 1, 28, 28) + HONEST[16:], "the header promises 4,294,967,295 items"),
        (HONEST[:4] + struct.pack(">3I", 30, 2**31, 2**31) + HONEST[16:], "expected \\[28, 28\\]"),
        (idx(np.zeros((30, 32, 32))), "images of \\[32, 32\\] pixels, expected \\[28, 28\\]"),
    ],
)
def test_headers_that_lie(tmp_path, contents, message):
    path = write_mnist(tmp_path, zipped=False) / "train-images-idx3-ubyte"
    path.write_bytes(contents)
    with pytest.raises(DataError, match=f"train-images-idx3-ubyte: .*{message}|{message}"):
        mnist.read(tmp_path)


def test_a_gzip_bomb(tmp_path):
    path = write_mnist(tmp_path) / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(bytes(50 << 20), 1))
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz: more than 70,008 bytes of contents"):
        mnist.read(tmp_path)


def test_truncated_and_damaged_gzip(tmp_path):
    path = write_mnist(tmp_path) / "train-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0x10
    for contents in (whole[:-5], whole[: len(whole) // 2], bytes(flipped), b"no gzip"):
        path.write_bytes(contents)
        with pytest.raises(DataError, match=r"train-images-idx3-ubyte.gz"):
            mnist.read(tmp_path)


def test_labels_that_do_not_fit(tmp_path):
    path = write_mnist(tmp_path, zipped=False) / "train-labels-idx1-ubyte"
    path.write_bytes(idx(np.zeros(29)))
    with pytest.raises(DataError, match="30 train images but 29 labels"):
        mnist.read(tmp_path)
    path.write_bytes(idx(np.where(np.arange(30) == 8, 10, 0)))
    with pytest.raises(DataError, match="train label 10 of image 8 is out of range"):
        mnist.read(tmp_path)


def test_a_file_of_no_known_form(tmp_path):
    (tmp_path / "mnist.npz").write_bytes(b"PK")
    with pytest.raises(DataError, match="no form of MNIST"):
        mnist.read(tmp_path / "mnist.npz")
