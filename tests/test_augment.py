"""nanocnn/data/augment.py: against one image at a time, and the same for a sample wherever it comes."""

import numpy as np
import pytest

from nanocnn.data import Augment, DataError, Split
from nanocnn.data.augment import load_batch
from nanocnn.data.datasets import statistics
from nanocnn.kernels import dispatch
from nanocnn.kernels.augment import BLOCK, STREAM
from nanocnn.kernels.random import random_bits


def make_split(n=90, height=9, width=12, channels=3):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (n, height, width, channels), dtype=np.uint8)
    return Split(images, rng.integers(0, 4, n), tuple("abcd"), *statistics(images))


def normalised(split, image):
    return (image / 255 - split.mean) / split.std


def one_by_one(split, samples, augment, seed, epoch):
    """The same by np.pad, slices and loops."""
    out = []
    height, width = split.images.shape[1:3]
    for sample, words in zip(samples, random_bits(samples, 5, seed, epoch, STREAM), strict=True):
        down, flip, right, cut_row, cut_column = (int(word) for word in words)
        pad = augment.pad
        padded = np.pad(split.images[sample], ((pad, pad), (pad, pad), (0, 0)), mode="reflect")
        down, right = down * (2 * pad + 1) >> 32, right * (2 * pad + 1) >> 32
        crop = padded[down : down + height, right : right + width]
        if augment.flip and flip >= 2**31:
            crop = padded[down : down + height, right : right + width][:, ::-1]
        x = normalised(split, crop)
        if augment.cutout:
            top = (cut_row * height >> 32) - augment.cutout // 2
            left = (cut_column * width >> 32) - augment.cutout // 2
            x[max(0, top) : top + augment.cutout, max(0, left) : left + augment.cutout] = 0
        out.append(x)
    return np.stack(out)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "augment",
    [Augment(), Augment(0, flip=True), Augment(2, flip=False), Augment(8, cutout=5), Augment(1, cutout=4)],
    ids=str,
)
def test_equals_one_image_at_a_time(augment, channels, dtype):
    split = make_split(channels=channels)
    samples = np.random.default_rng(1).integers(0, len(split), 2 * BLOCK + 3)
    x = load_batch(split, samples, augment, seed=7, epoch=3, dtype=dtype)
    assert x.dtype == dtype
    assert x.flags.c_contiguous
    tolerance = 1e-5 if dtype is np.float32 else 1e-12
    np.testing.assert_allclose(x, one_by_one(split, samples, augment, 7, 3), rtol=0, atol=tolerance)


def test_nothing_but_normalisation():
    split = make_split()
    samples = np.arange(len(split))
    x = load_batch(split, samples)
    np.testing.assert_allclose(x, normalised(split, split.images), atol=1e-5)
    np.testing.assert_allclose(x.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.std(axis=(0, 1, 2)), 1, atol=1e-5)
    np.testing.assert_array_equal(x, load_batch(split, samples, Augment(0, flip=False)))


def test_what_is_drawn_depends_on_seed_epoch_and_sample_only():
    split, augment = make_split(), Augment(cutout=3)
    samples = np.random.default_rng(2).permutation(len(split))
    whole = load_batch(split, samples, augment, seed=1, epoch=2)
    pieces = [load_batch(split, piece, augment, seed=1, epoch=2) for piece in np.array_split(samples, 7)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))
    back = np.argsort(samples)
    np.testing.assert_array_equal(whole[back], load_batch(split, samples[back], augment, seed=1, epoch=2))
    assert not np.array_equal(whole, load_batch(split, samples, augment, seed=1, epoch=3))
    assert not np.array_equal(whole, load_batch(split, samples, augment, seed=2, epoch=2))


def test_every_place_and_both_sides_come_up():
    ramp = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1).repeat(2000, axis=0)
    split = Split(ramp, np.zeros(2000, np.int64), ("a",), np.zeros(1), np.full(1, 1 / 255))
    centre = load_batch(split, np.arange(2000), Augment(2))[:, 3:5, 3:5, 0]
    flipped = centre[:, 0, 0] > centre[:, 0, 1]
    assert 900 < flipped.sum() < 1100
    counts = np.unique(np.minimum(centre[:, 0, 0], centre[:, 0, 1]), return_counts=True)[1]
    assert len(counts) == 25  # 5 rows x 5 columns
    assert counts.min() > 40


def test_cutout_may_stick_out():
    split = make_split(n=2000, height=8, width=8, channels=1)
    cut = (load_batch(split, np.arange(2000), Augment(0, flip=False, cutout=4)) == 0).sum(axis=(1, 2, 3))
    assert cut.min() >= 4  # a corner: 2 x 2
    assert 16 in cut
    assert cut.max() < 20  # the square, and the odd pixel that is the mean anyway


def test_no_sample():
    assert load_batch(make_split(), np.arange(0), Augment(cutout=2)).shape == (0, 9, 12, 3)


def test_leaves_no_mark_in_the_profile(monkeypatch):
    """It runs in a background thread, and the recorder belongs to the main one."""
    monkeypatch.setattr(dispatch, "recorder", object())  # whose enter() does not exist
    load_batch(make_split(), np.arange(5), Augment())


@pytest.mark.parametrize("augment", [Augment(9), Augment(-1), Augment(0, cutout=10), Augment(0, cutout=-1)], ids=str)
def test_what_does_not_fit(augment):
    with pytest.raises(DataError, match=r"do not fit images of 9 x 12 pixels; expected a pad of 0 to 8"):
        augment.check(make_split().images)
