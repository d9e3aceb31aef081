"""nanocnn/data/shapes.py: the same images everywhere, and nothing in them for a linear model."""

import numpy as np
import pytest

from nanocnn.data import load, shapes
from nanocnn.data.shapes import CHUNK, CLASSES, SHAPES, make_shapes


def test_the_same_images_again():
    images, labels = make_shapes(50)
    assert images.shape == (50, 32, 32, 3)
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    for a, b in zip((images, labels), make_shapes(50), strict=True):
        np.testing.assert_array_equal(a, b)


def test_an_image_depends_on_its_number_only():
    """Not on how many are made with it, nor on where the chunks of the work begin."""
    images, labels = make_shapes(CHUNK + 9)
    for first, n in ((0, 1), (3, 17), (CHUNK - 2, 4), (CHUNK, 9)):
        some, some_labels = make_shapes(n, first=first)
        np.testing.assert_array_equal(some, images[first : first + n])
        np.testing.assert_array_equal(some_labels, labels[first : first + n])
    np.testing.assert_array_equal(make_shapes(0)[0], images[:0])


def test_seeds_and_splits_differ():
    images, _ = make_shapes(200)
    others = np.concatenate([make_shapes(200, split="test")[0], make_shapes(200, seed=1)[0]])
    assert len(np.unique(np.concatenate([images, others]).reshape(600, -1), axis=0)) == 600


def test_the_seed_of_load_splits_and_never_redraws():
    a, b = (load("shapes", seed=seed, train_size=60, test_size=20, val=0) for seed in (0, 1))
    np.testing.assert_array_equal(a.train.images, b.train.images)
    np.testing.assert_array_equal(a.test.images, b.test.images)
    assert a.classes == CLASSES


def test_ten_classes_about_equally_often():
    _, labels = make_shapes(2000)
    assert len(CLASSES) == 10
    assert np.bincount(labels, minlength=10).min() > 150


@pytest.mark.parametrize("shape", SHAPES, ids=CLASSES)
def test_each_outline_is_closed_and_about_as_large_as_the_others(shape):
    axis = np.linspace(-2, 2, 201, dtype=np.float32)
    distance = shape(*np.meshgrid(axis, axis))
    inside = distance < 0
    assert not inside[0].any()
    assert not inside[-1].any()
    assert not inside[:, [0, -1]].any()
    assert 0.4 < np.hypot(*np.gradient(distance, axis, axis)).mean() < 1.1  # a distance: its slope is about one
    assert 0.7 < inside.mean() * 16 < 2.7  # square units; the unit circle has 3.1
    rows, columns = np.nonzero(inside)
    assert 0.7 < max(abs(axis[rows]).max(), abs(axis[columns]).max()) < 1.15


def test_colour_says_nothing_about_the_class():
    """The means by class of brightness, of each channel and of contrast all lie within chance of the overall ones."""
    images, labels = make_shapes(3000)
    pixels = images.reshape(3000, -1, 3).astype(np.float64)
    for feature in (pixels.mean(axis=(1, 2)), *pixels.mean(axis=1).T):
        spread = feature.std() / np.sqrt(np.bincount(labels))
        means = np.array([feature[labels == c].mean() for c in range(10)])
        assert (abs(means - feature.mean()) < 4.5 * spread).all()


def test_a_linear_model_stays_far_below_60_percent():
    """Softmax regression on normalised pixels, long enough to fit the training images much better than others."""
    data = load("shapes", train_size=3000, test_size=1000, val=0)

    def pixels(split):
        return ((split.images / 255 - split.mean) / split.std).reshape(len(split), -1).astype(np.float32)

    x, y, xt, yt = pixels(data.train), data.train.labels, pixels(data.test), data.test.labels
    w, b = np.zeros((x.shape[1], 10), np.float32), np.zeros(10, np.float32)
    best = 0.0
    for epoch in range(6):
        for rows in np.random.default_rng(epoch).permutation(3000).reshape(-1, 100):
            scores = x[rows] @ w + b
            p = np.exp(scores - scores.max(axis=1, keepdims=True))
            p /= p.sum(axis=1, keepdims=True)
            p[np.arange(100), y[rows]] -= 1
            w -= 0.01 / 100 * (x[rows].T @ p)
            b -= 0.01 / 100 * p.sum(axis=0)
        best = max(best, ((xt @ w + b).argmax(axis=1) == yt).mean())
    assert ((x @ w + b).argmax(axis=1) == y).mean() > best + 0.1
    assert best < 0.3


def test_any_number_of_images():
    assert len(load("shapes", train_size=7, test_size=3, val=0).train) == 7
    assert (shapes.TRAIN, shapes.TEST) == (10_000, 2_000)
