"""nanocnn/data/resident.py: a split that stays on a device gives the batches of the CPU, bit by bit."""

import threading

import numpy as np
import pytest
from launch import NEEDS_GXX

import nanocnn as nc
from nanocnn.data import Augment, DataError, Loader, Split, resident
from nanocnn.data.datasets import statistics
from nanocnn.kernels.augment import augment as primitive
from nanocnn.kernels.dispatch import device_of
from nanocnn.models import lenet5
from nanocnn.parallel import Alone
from nanocnn.train import evaluate


def make_split(n=50, shape=(9, 8, 3)):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, *shape), dtype=np.uint8)
    return Split(images, rng.integers(0, 4, n), tuple("abcd"), *statistics(images), "some images")


@NEEDS_GXX
@pytest.mark.parametrize("augment", [None, Augment(), Augment(2, cutout=5), Augment(0, flip=False, cutout=4)], ids=str)
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_batches_are_those_of_the_cpu(augment, dtype):
    options = dict(augment=augment, seed=2**40 + 3, rank=1, size=2, dtype=dtype, drop_last=False)
    primitive.ran.clear()
    there, here = (list(Loader(make_split(), 16, device=d, **options).epoch(3)) for d in ("emulated", None))
    assert primitive.ran == {"cuda"}
    for a, b in zip(there, here, strict=True):
        assert device_of(a.x) == device_of(a.y) == "emulated"
        assert device_of(a.index) == device_of(b.x) == "cpu"
        for field in ("x", "y", "index", "global_size", "epoch", "step"):
            got, want = getattr(a, field), getattr(b, field)
            assert np.asarray(got).dtype == np.asarray(want).dtype
            np.testing.assert_array_equal(got, want)


@NEEDS_GXX
def test_no_thread_and_the_split_is_copied_once():
    loader = Loader(make_split(), 8, device="emulated", prefetch=2)
    images = loader.resident.images
    batches = loader.epoch(0)
    next(batches)
    assert not [t for t in threading.enumerate() if t.name == "nanocnn prefetch"]
    assert len(list(batches)) == 5
    assert loader.resident.images is images


@pytest.mark.parametrize("prefetch", [0, 2])
def test_batches_that_are_sent_are_the_same(prefetch):
    options = dict(augment=Augment(), seed=7, drop_last=False, prefetch=prefetch)
    with nc.using(resident="off"):
        there, here = (list(Loader(make_split(), 16, device=d, **options).epoch(3)) for d in ("emulated", None))
    assert len(there) == len(here) == 4
    for a, b in zip(there, here, strict=True):
        assert device_of(a.x) == device_of(a.y) == "emulated"
        for field in ("x", "y", "index", "global_size", "epoch", "step"):
            np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@NEEDS_GXX
def test_an_empty_piece_and_an_evaluation():
    split = make_split(9, (28, 28, 1))
    last = [list(Loader(split, 4, shuffle=False, rank=r, size=4, device="emulated").epoch(0))[-1] for r in range(4)]
    assert sorted(len(batch.x) for batch in last) == [0, 0, 0, 1]
    nc.manual_seed(0)
    model = lenet5().to("emulated")
    seen = [
        evaluate(model, Loader(split, 4, shuffle=False, device=d).epoch(0), 10, Alone()) for d in ("emulated", None)
    ]
    assert seen[0].loss == seen[1].loss
    np.testing.assert_array_equal(seen[0].confusion, seen[1].confusion)


def test_images_that_take_too_much(monkeypatch):
    split = make_split(5000)
    monkeypatch.setattr(resident, "free_bytes", lambda device: 2_000_000)
    refusal = r"some images: 1 MB of images, and 2 MB are free on 'emulated', of which they .* with resident=off"
    with nc.using(resident="on"), pytest.raises(DataError, match=refusal):
        Loader(split, 8, device="emulated")
    assert Loader(split, 8, device="emulated").resident is None  # left to itself it sends them
    monkeypatch.setattr(resident, "free_bytes", lambda device: 3_000_000)
    assert Loader(split, 8, device="emulated").resident is not None
