"""nanocnn/data/datasets.py: where to look, what `auto` means, the split, the checks."""

import numpy as np
import pytest
from cases_data import BATCH, write_cifar_python, write_mnist

from nanocnn.data import DataError, Split, cifar10, load
from nanocnn.data import datasets as module


@pytest.fixture(autouse=True)
def _nowhere(monkeypatch, tmp_path):
    """No data of this machine: neither $NANOCNN_DATA nor data/."""
    monkeypatch.delenv("NANOCNN_DATA", raising=False)
    monkeypatch.setattr(module, "HERE", (tmp_path / "data",))
    monkeypatch.setattr(cifar10, "BATCH", BATCH)


def split_of(images, labels, **changes):
    channels = images.shape[-1] if isinstance(images, np.ndarray) and images.ndim == 4 else 3
    given = dict(classes=tuple("abc"), mean=np.full(channels, 0.5), std=np.full(channels, 0.25))
    return Split(images, labels, **{**given, **changes})


IMAGES, LABELS = np.zeros((4, 8, 8, 3), np.uint8), np.array([0, 1, 2, 0])


def test_auto_is_shapes_without_files_and_says_how_to_get_cifar10(tmp_path):
    data = load(train_size=40, test_size=10, val=0.25)
    assert data.name == "shapes"
    assert (len(data.train), len(data.val), len(data.test)) == (30, 10, 10)
    assert "python data/prepare.py cifar10" in data.notice
    assert "\n" not in data.notice


def test_auto_is_cifar10_as_soon_as_it_is_there(tmp_path):
    write_cifar_python(tmp_path / "data" / "cifar-10-batches-py")
    data = load()
    assert data.name == "cifar10"
    assert str(tmp_path / "data" / "cifar-10-batches-py") in data.notice
    assert (len(data.train), len(data.val), len(data.test)) == (90, 10, BATCH)


def test_auto_does_not_hide_damaged_files(tmp_path):
    folder = write_cifar_python(tmp_path / "data" / "cifar-10-batches-py")
    (folder / "data_batch_4").unlink()
    with pytest.raises(DataError, match="data_batch_4 missing"):
        load()


def test_an_explicit_folder_is_the_only_one(tmp_path, monkeypatch):
    write_cifar_python(tmp_path / "a" / "cifar-10-batches-py", seed=1)
    write_cifar_python(tmp_path / "b" / "cifar-10-batches-py", seed=2)
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("NANOCNN_DATA", str(tmp_path / "a"))
    assert str(tmp_path / "a") in load("cifar10").notice
    assert str(tmp_path / "b") in load("cifar10", tmp_path / "b").notice
    with pytest.raises(DataError, match=r"cifar10 is not in .*empty; get it with: python data/prepare.py cifar10"):
        load("cifar10", tmp_path / "empty")


@pytest.mark.parametrize("name", ["auto", "cifar10", "shapes"])
def test_a_folder_that_does_not_exist(tmp_path, monkeypatch, name):
    with pytest.raises(DataError, match=r"none: no such file or folder \(--data-dir\)"):
        load(name, tmp_path / "none")
    monkeypatch.setenv("NANOCNN_DATA", str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"no such file or folder \(\$NANOCNN_DATA\)"):
        load(name)


def test_unknown_name_lists_what_there_is():
    with pytest.raises(DataError, match="unknown data set 'imagenet': expected auto, cifar10, mnist, shapes"):
        load("imagenet")


def test_the_validation_set_is_drawn_by_the_seed(tmp_path):
    write_mnist(tmp_path / "data")

    def parts(**options):
        data = load("mnist", **options)
        return data.train.images, data.val.images

    train, val = parts(val=0.3)
    assert (len(train), len(val)) == (21, 9)
    both = np.concatenate([train, val]).reshape(30, -1)
    whole = parts(val=0)[0].reshape(30, -1)
    np.testing.assert_array_equal(np.unique(both, axis=0), np.unique(whole, axis=0))  # nothing lost, nothing twice
    np.testing.assert_array_equal(val, parts(val=9)[1])
    np.testing.assert_array_equal(val, parts(val=9.0, seed=0)[1])
    assert not np.array_equal(val, parts(val=0.3, seed=1)[1])
    assert len(parts(val=0)[1]) == 0


@pytest.mark.parametrize("val", [-0.1, 30, 31, 2.5, -1, float("nan")])
def test_impossible_validation_sets(tmp_path, val):
    write_mnist(tmp_path / "data")
    with pytest.raises(DataError, match="cannot be taken off 30 training images"):
        load("mnist", val=val)


@pytest.mark.parametrize("size", [0, -1, 31])
def test_more_images_than_there_are(tmp_path, size):
    write_mnist(tmp_path / "data")
    with pytest.raises(DataError, match="images asked for, there are 30"):
        load("mnist", train_size=size)
    assert len(load("mnist", train_size=12, val=2).train) == 10


def test_statistics_are_those_of_the_training_part_only(tmp_path):
    write_cifar_python(tmp_path / "data" / "cifar-10-batches-py")
    data = load("cifar10", val=0.2)
    pixels = data.train.images / 255
    np.testing.assert_allclose(data.test.mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-12)
    np.testing.assert_allclose(data.val.std, pixels.std(axis=(0, 1, 2)), rtol=1e-12)


def test_statistics_of_many_bright_images_do_not_overflow():
    mean, std = module.statistics(np.full((600, 4, 4, 1), 255, np.uint8))
    assert mean == 1
    assert std == 1  # a channel that never changes is not divided by zero


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (IMAGES.astype(np.float32), LABELS, r"images are float32 \(4, 8, 8, 3\), expected uint8"),
        (IMAGES[..., 0], LABELS, r"images are uint8 \(4, 8, 8\), expected uint8 \(N, height, width, channels\)"),
        (IMAGES[:, :, :0], LABELS, "images are uint8"),
        (IMAGES.tolist(), LABELS, "images are a list"),
        (IMAGES, LABELS[:3], r"labels are int64 \(3,\), expected int64 \(4,\)"),
        (IMAGES, LABELS.astype(np.int32), "labels are int32"),
        (IMAGES, LABELS[:, None], "labels are int64"),
        (IMAGES, np.array([0, 1, 3, 0]), "label 3 of image 2 is out of range, expected 0 to 2"),
        (IMAGES, np.array([0, -1, 1, 0]), "label -1 of image 1 is out of range"),
    ],
)
def test_a_split_checks_what_it_is_given(images, labels, message):
    with pytest.raises(DataError, match=message):
        split_of(images, labels)


def test_images_that_are_not_contiguous():
    split = split_of(np.arange(4 * 8 * 8 * 3, dtype=np.uint8).reshape(4, 3, 8, 8).transpose(0, 2, 3, 1), LABELS)
    assert split.images.flags.c_contiguous
    assert split.images[0, 0, 0].tolist() == [0, 64, 128]


def test_a_split_checks_its_statistics():
    with pytest.raises(DataError, match="expected one number a channel"):
        split_of(IMAGES, LABELS, mean=np.zeros(1))
