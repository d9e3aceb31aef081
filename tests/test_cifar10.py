"""nanocnn/data/cifar10.py: the official forms give the same arrays, and each kind of damage one error."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from cases_data import (
    BATCH,
    cifar_arrays,
    cifar_names,
    python2_batch,
    tar_of,
    tar_with,
    write_cifar_binary,
    write_cifar_python,
)

from nanocnn.data import DataError, cifar10, hdf5


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    monkeypatch.setattr(cifar10, "BATCH", BATCH)


def assert_is_cifar(raw):
    planes, labels = cifar_arrays()
    images = planes.reshape(6, BATCH, 3, 32, 32).transpose(0, 1, 3, 4, 2)
    np.testing.assert_array_equal(raw.train.images, images[:5].reshape(-1, 32, 32, 3))
    np.testing.assert_array_equal(raw.train.labels, labels[:5].ravel())
    np.testing.assert_array_equal(raw.test.images, images[5])
    np.testing.assert_array_equal(raw.test.labels, labels[5])
    assert raw.train.images.flags.c_contiguous
    assert raw.train.labels.dtype == np.int64
    assert raw.classes[3] == "cat"


def test_every_form_gives_the_same(tmp_path):
    python = write_cifar_python(tmp_path / "cifar-10-batches-py")
    binary = write_cifar_binary(tmp_path / "cifar-10-batches-bin")
    archives = tar_of(python, tmp_path / "cifar-10-python.tar.gz"), tar_of(binary, tmp_path / "cifar-10-binary.tar.gz")
    file = tmp_path / "cifar10.h5"
    hdf5.write(file, cifar10.read(python))
    for path in (python, binary, *archives, file):
        assert_is_cifar(cifar10.read(path))


def test_what_is_preferred_and_where_it_is_found(tmp_path):
    (tmp_path / "empty").mkdir()
    assert cifar10.cifar10([tmp_path / "empty", tmp_path]) is None
    binary = write_cifar_binary(tmp_path / "cifar-10-batches-bin")
    assert cifar10.find([tmp_path / "empty", tmp_path]) == binary
    assert cifar10.find([binary]) == binary  # the folder of the batches itself
    python = write_cifar_python(tmp_path / "cifar-10-batches-py")
    assert cifar10.find([tmp_path]) == python
    archive = tar_of(python, tmp_path / "elsewhere.tar.gz")
    assert_is_cifar(cifar10.cifar10([archive]))


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_batches_that_a_later_python_pickled(tmp_path, protocol):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, planes, labels in zip(cifar_names(), *cifar_arrays(), strict=True):
        (folder / name).write_bytes(pickle.dumps({"data": planes, "labels": labels.tolist()}, protocol))
    assert_is_cifar(cifar10.read(folder))


@pytest.mark.parametrize("cut", [0, 1, 1000, -1])
def test_truncated_python_batch(tmp_path, cut):
    path = write_cifar_python(tmp_path / "cifar-10-batches-py") / "data_batch_3"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(DataError, match=r"data_batch_3: a damaged or truncated pickle"):
        cifar10.read(path.parent)


@pytest.mark.parametrize("change", [lambda b: b[:-1], lambda b: b + b"\0", lambda b: b""])
def test_binary_batch_of_the_wrong_size(tmp_path, change):
    path = write_cifar_binary(tmp_path / "cifar-10-batches-bin") / "test_batch.bin"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=r"test_batch.bin: [\d,]+ bytes, expected 61,460"):
        cifar10.read(path.parent)


@pytest.mark.parametrize("write", [write_cifar_python, write_cifar_binary])
def test_a_missing_batch(tmp_path, write):
    folder = write(tmp_path / "batches")
    next(folder.glob("data_batch_2*")).unlink()
    with pytest.raises(
        DataError, match=r"data_batch_2 missing; expected data_batch_1, .* python data/prepare.py cifar10"
    ):
        cifar10.read(folder)


def test_labels_out_of_range(tmp_path):
    planes, labels = cifar_arrays()
    labels[1, 7] = 10
    folder = write_cifar_python(tmp_path / "py")
    (folder / "data_batch_2").write_bytes(python2_batch(planes[1], labels[1]))
    with pytest.raises(DataError, match="data_batch_2: label 10 of image 7 is out of range, expected 0 to 9"):
        cifar10.read(folder)
    binary = write_cifar_binary(tmp_path / "bin")
    raw = bytearray((binary / "data_batch_1.bin").read_bytes())
    raw[0] = 255
    (binary / "data_batch_1.bin").write_bytes(raw)
    with pytest.raises(DataError, match=r"data_batch_1.bin: label 255 of image 0"):
        cifar10.read(binary)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ([1, 2], "expected a dictionary with data and labels"),
        ({"data": np.zeros((BATCH, 3072), np.uint8)}, "expected a dictionary with data and labels"),
        (
            {"data": np.zeros((BATCH, 3071), np.uint8), "labels": [0] * BATCH},
            r"images of shape \(20, 3071\), expected \(20, 3072\)",
        ),
        ({"data": np.zeros((BATCH, 3072), np.float32), "labels": [0] * BATCH}, "expected an array of bytes"),
        ({"data": "pixels", "labels": [0] * BATCH}, "expected an array of bytes"),
        (
            {"data": np.zeros((BATCH, 3072), np.uint8), "labels": [0] * (BATCH - 1)},
            "labels are not a list of 20 whole numbers",
        ),
        (
            {"data": np.zeros((BATCH, 3072), np.uint8), "labels": ["cat"] * BATCH},
            "labels are not a list of 20 whole numbers",
        ),
        ({"data": np.zeros((BATCH, 3072), np.uint8), "labels": [1 << 80] * BATCH}, "is out of range"),
    ],
)
def test_batches_of_something_else(tmp_path, batch, message):
    folder = write_cifar_python(tmp_path / "py")
    (folder / "data_batch_5").write_bytes(pickle.dumps(batch, 4))
    with pytest.raises(DataError, match=f"data_batch_5: .*{message}|data_batch_5: {message}"):
        cifar10.read(folder)


def test_an_archive_that_is_cut_off_or_damaged(tmp_path):
    archive = tar_of(write_cifar_python(tmp_path / "cifar-10-batches-py"), tmp_path / "c.tar.gz")
    whole = archive.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    wrong_sum = whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:]
    for contents in (whole[: len(whole) // 2], whole[:-4], bytes(flipped), wrong_sum, b"", b"no gzip at all"):
        archive.write_bytes(contents)
        with pytest.raises(DataError, match=r"c.tar.gz: a damaged or truncated archive"):
            cifar10.read(archive)


def member(name, type=tarfile.REGTYPE, link=""):
    info = tarfile.TarInfo(name)
    info.type, info.linkname = type, link
    return info


@pytest.mark.parametrize(
    ("info", "message"),
    [
        (member("../../data_batch_1"), "points outside"),
        (member("/etc/data_batch_1"), "points outside"),
        (member("cifar-10-batches-py/../../x"), "points outside"),
        (member("cifar-10-batches-py/data_batch_1", tarfile.SYMTYPE, "/etc/passwd"), "is a link or a device"),
        (member("cifar-10-batches-py/data_batch_1", tarfile.LNKTYPE, "../secret"), "is a link or a device"),
        (member("cifar-10-batches-py/data_batch_1", tarfile.CHRTYPE), "is a link or a device"),
        (member("cifar-10-batches-py/data_batch_1", tarfile.FIFOTYPE), "is a link or a device"),
    ],
)
def test_an_archive_that_escapes(tmp_path, info, message):
    path = tar_with(tmp_path / "evil.tar.gz", (info, b""))
    with pytest.raises(DataError, match=rf"evil.tar.gz: member '.*' {message}.*; do not trust this file"):
        cifar10.read(path)
    assert [p.name for p in tmp_path.iterdir()] == ["evil.tar.gz"]  # nothing was unpacked


def test_a_gzip_bomb(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MOST_BYTES", 1 << 20)
    zeros = bytes(9 << 20)  # nine megabytes in nine kilobytes
    huge_member = tar_with(tmp_path / "member.tar.gz", (member("cifar-10-batches-py/data_batch_1"), zeros))
    with pytest.raises(DataError, match="has 9,437,184 bytes, expected at most 1,048,576"):
        cifar10.read(huge_member)
    skipped_member = tar_with(tmp_path / "skipped.tar.gz", (member("readme.html"), zeros))
    with pytest.raises(DataError, match="more than 7,340,032 bytes of contents"):
        cifar10.read(skipped_member)


def test_a_batch_that_is_there_twice(tmp_path):
    planes, labels = cifar_arrays()
    batch = python2_batch(planes[0], labels[0])
    path = tar_with(tmp_path / "t.tar.gz", (member("a/data_batch_1"), batch), (member("b/data_batch_1"), batch))
    with pytest.raises(DataError, match="there twice"):
        cifar10.read(path)


def test_a_file_of_no_known_form(tmp_path):
    (tmp_path / "cifar.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"no form of CIFAR-10; expected cifar10.h5"):
        cifar10.read(tmp_path / "cifar.zip")
    with pytest.raises(DataError, match=r"data_batch_1, .*missing"):
        cifar10.read(tmp_path)


def test_a_file_larger_than_any_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "MOST_BYTES", 1000)
    with pytest.raises(DataError, match="data_batch_1: more than 1,000 bytes"):
        cifar10.read(write_cifar_python(tmp_path / "py"))


def test_a_pickle_that_imports(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("this must never be printed",)

    folder = write_cifar_python(tmp_path / "py")
    (folder / "data_batch_1").write_bytes(pickle.dumps(Evil(), 4))
    with pytest.raises(DataError, match=r"data_batch_1: the pickle imports builtins.print, .*do not trust this file"):
        cifar10.read(folder)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        tar.add(folder, "cifar-10-batches-py")
    (tmp_path / "evil.tar.gz").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match=r"evil.tar.gz/data_batch_1: the pickle imports"):
        cifar10.read(tmp_path / "evil.tar.gz")
