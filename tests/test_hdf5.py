"""nanocnn/data/hdf5.py: written whole or not at all, and not a bit different when read."""

import h5py
import numpy as np
import pytest

from nanocnn.data import DataError, Part, Raw, hdf5

CLASSES = ("a", "b", "c")


@pytest.fixture
def raw():
    rng = np.random.default_rng(0)

    def part(n):
        return Part(rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8), rng.integers(0, 3, n))

    return Raw(part(300), part(7), CLASSES, "made up")


def test_round_trip(tmp_path, raw):
    path = tmp_path / "set.h5"
    hdf5.write(path, raw)
    back = hdf5.read(path, CLASSES)
    for a, b in zip((*raw.train, *raw.test), (*back.train, *back.test), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype
    assert back.source == str(path)
    assert [p.name for p in tmp_path.iterdir()] == ["set.h5"]


def test_any_program_reads_it(tmp_path, raw):
    path = tmp_path / "set.h5"
    hdf5.write(path, raw)
    with h5py.File(path) as file:
        images = file["train/images"]
        assert images.chunks == (128, 8, 8, 3)
        assert images.fletcher32
        assert images.dtype == np.uint8
        np.testing.assert_array_equal(images[...], raw.train.images)
        assert list(file.attrs["classes"]) == list(CLASSES)


def test_every_flipped_bit_and_every_cut_is_found(tmp_path, raw):
    path = tmp_path / "set.h5"
    hdf5.write(path, raw)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    for at in [0, 45, 600, 520, len(whole) - 1, *rng.integers(0, len(whole), 40)]:
        if len(hdf5.MAGIC) + 64 <= at < hdf5.BLOCK:
            continue  # the padding of the first block says nothing
        flipped = bytearray(whole)
        flipped[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        with pytest.raises(DataError, match=r"set.h5: (damaged or truncated|not a data file)"):
            hdf5.read(path, CLASSES)
    for size in (0, 100, hdf5.BLOCK, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=r"set.h5: (damaged or truncated|not a data file).*python data/prepare.py"):
            hdf5.read(path, CLASSES)


def test_files_of_others(tmp_path, raw):
    path = tmp_path / "set.h5"
    with h5py.File(path, "w") as file:
        file["x"] = 1
    with pytest.raises(DataError, match="not a data file of nanocnn"):
        hdf5.read(path, CLASSES)
    hdf5.write(path, raw)
    with pytest.raises(DataError, match="holds the classes a, b, c, expected cat, dog"):
        hdf5.read(path, ("cat", "dog"))
    with pytest.raises(DataError, match="cannot be read, FileNotFoundError"):
        hdf5.read(tmp_path / "none.h5", CLASSES)


def test_a_full_disk_loses_nothing(tmp_path, raw, monkeypatch):
    path = tmp_path / "set.h5"
    hdf5.write(path, raw)
    before = path.read_bytes()

    def full(fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hdf5.os, "fsync", full)
    with pytest.raises(DataError, match=r"set.h5: cannot be written, .*No space left on device; nothing was changed"):
        hdf5.write(path, raw)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["set.h5"]


def test_an_unwritable_folder(tmp_path, raw):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        hdf5.write(tmp_path / "file" / "set.h5", raw)
