"""One step and one evaluation: learning, weighting by true sizes, and what happens with NaN."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

import nanocnn as nc
from nanocnn import nn
from nanocnn.capture import CaptureError
from nanocnn.data import Augment, Batch, Loader
from nanocnn.models import alexnet_cifar
from nanocnn.optim import SGD
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.train import NonFiniteLoss, evaluate, train_step


def setup(model, lr=0.05, momentum=0.9):
    optimizer = SGD(model.named_parameters(), lr, momentum=momentum)
    return optimizer, GradientAverager(optimizer.buckets, Alone())


def batch_of(x, y, **where):
    return Batch(x=x, y=y, index=np.arange(len(y)), global_size=len(y), **where)


@pytest.mark.parametrize("batch_norm", [False, True])
def test_alexnet_overfits_64_images(batch_norm):
    """Whatever is wrong between the pixels and the update, this would not reach 100 %."""
    nc.manual_seed(0)
    data = nc.data.load("shapes", val=0, train_size=64, test_size=1)
    loader = Loader(data.train, 64, shuffle=False)
    model = alexnet_cifar(width=0.25, dropout=0.0, batch_norm=batch_norm)
    optimizer, averager = setup(model, lr=0.03)
    for _ in range(240):
        for batch in loader.epoch(0):
            result = train_step(model, batch, optimizer, 0.03, averager)
        if result.correct == 64 and result.loss < 64 * 0.05:
            break
    evaluation = evaluate(model, loader.epoch(0), 10, Alone())
    assert evaluation.accuracy == 1.0
    assert np.trace(evaluation.confusion) == 64


@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_recorded_step_learns_the_same(batch_norm):
    """With dropout, whose masks follow epoch and samples, and with batches of two sizes."""
    data = nc.data.load("shapes", val=0, train_size=96, test_size=1)
    states, losses = [], []
    for choice in ("off", "on"):
        nc.manual_seed(0)
        model = alexnet_cifar(width=0.125, dropout=0.3, batch_norm=batch_norm)
        optimizer, averager = setup(model)
        with nc.using(graph=choice):
            for epoch, size in enumerate((32, 32, 48)):
                for batch in Loader(data.train, size).epoch(epoch):
                    losses.append(train_step(model, batch, optimizer, 0.01 / (1 + epoch), averager).loss)
        states.append({name: p.data.copy() for name, p in [*model.named_parameters(), *model.named_buffers()]})
    assert losses[: len(losses) // 2] == losses[len(losses) // 2 :]
    for name, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][name], err_msg=name)


def test_a_recording_is_made_anew_for_another_optimizer():
    losses = []
    for choice in ("off", "on"):
        nc.manual_seed(0)
        model = Linear10()
        batch = batch_of(*images(8))
        with nc.using(graph=choice):
            for _ in range(2):
                optimizer, averager = setup(model, lr=0.5)
                losses += [train_step(model, batch, optimizer, 0.5, averager).loss for _ in range(3)]
    assert losses[:6] == losses[6:]
    assert losses[5] < losses[3] < losses[0]


def test_a_label_that_is_no_class_reaches_no_weight_of_a_recorded_step():
    model = Linear10()
    optimizer, averager = setup(model)
    x, y = images(8)
    with nc.using(graph="on"):
        train_step(model, batch_of(x, y), optimizer, 0.1, averager)
        before = model.head.weight.data.copy()
        with pytest.raises(NonFiniteLoss):
            train_step(model, batch_of(x, y + 10), optimizer, 0.1, averager)
    np.testing.assert_array_equal(model.head.weight.data, before)


def test_a_model_that_cannot_be_recorded_says_what_to_do():
    class Odd(Linear10):
        def forward(self, x):
            return super().forward(x * float(x.data.mean()))

    model = Odd()
    optimizer, averager = setup(model)
    x, y = images(8)
    with nc.using(graph="on"), pytest.raises(CaptureError, match="do not compute") as caught:
        train_step(model, batch_of(x, y), optimizer, 0.1, averager)
    assert caught.value.__notes__ == ["(the switch graph=off trains without capturing)"]


class Linear10(nn.Module):
    def __init__(self):
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        return self.head(x.reshape(len(x), 12))


def images(n, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 2, 2, 3)).astype(np.float32), rng.integers(0, 10, n)


def test_unequal_parts_of_a_global_batch_sum_to_its_mean():
    x, y = images(10)
    gradients = []
    for cuts in ([0, 10], [0, 3, 10], [0, 10, 10]):
        nc.manual_seed(0)
        model = Linear10()
        total = np.zeros((12, 10), np.float32)
        for a, b in pairwise(cuts):
            optimizer, averager = setup(model, momentum=0.0)
            before = model.head.weight.data.copy()
            part = Batch(x=x[a:b], y=y[a:b], index=np.arange(a, b), global_size=10)
            train_step(model, part, optimizer, 1.0, averager)
            total += before - model.head.weight.data
            model.head.weight.data[...], model.head.bias.data[...] = before, 0
        gradients.append(total)
    np.testing.assert_allclose(gradients[1], gradients[0], atol=1e-6)
    np.testing.assert_allclose(gradients[2], gradients[0], atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_pixel_is_an_error_before_the_update(bad):
    x, y = images(4)
    x[2, 1, 1, 1] = bad
    model = Linear10()
    optimizer, averager = setup(model)
    before = model.head.weight.data.copy()
    with pytest.raises(NonFiniteLoss, match=r"epoch 3, step 8.*check the images for NaN"), np.errstate(all="ignore"):
        train_step(model, batch_of(x, y, epoch=2, step=7), optimizer, 0.1, averager)
    np.testing.assert_array_equal(model.head.weight.data, before)


def test_evaluation_counts_every_image_once_and_leaves_the_mode_alone():
    data = nc.data.load("shapes", val=0, train_size=50, test_size=37)
    model = alexnet_cifar(width=0.05).train()
    whole = evaluate(model, Loader(data.test, 37, shuffle=False).epoch(0), 10, Alone())
    cut = evaluate(model, Loader(data.test, 8, shuffle=False).epoch(0), 10, Alone())
    np.testing.assert_array_equal(whole.confusion, cut.confusion)
    np.testing.assert_array_equal(whole.confusion.sum(axis=1), np.bincount(data.test.labels, minlength=10))
    assert abs(whole.loss - cut.loss) < 1e-5
    assert model.training
    assert not whole.stopped


def test_an_evaluation_that_is_stopped_says_so():
    data = nc.data.load("shapes", val=0, train_size=50, test_size=32)
    stopped = evaluate(alexnet_cifar(width=0.05), Loader(data.test, 8).epoch(0), 10, Alone(), stop=lambda: True)
    assert stopped.stopped
    assert stopped.confusion.sum() == 0


def test_an_empty_batch_is_a_rank_without_images():
    model = alexnet_cifar(width=0.05, batch_norm=True).eval()
    empty = batch_of(np.zeros((0, 32, 32, 3), np.float32), np.zeros(0, np.int64))
    assert evaluate(model, [empty], 10, Alone()).confusion.sum() == 0


def test_augmented_steps_do_not_depend_on_how_the_epoch_was_reached():
    """Dropout and augmentation are functions of (seed, epoch, sample): the same step, the same loss."""
    data = nc.data.load("shapes", val=0, train_size=40, test_size=1)
    results = []
    for start in (0, 3):
        nc.manual_seed(3)
        model = alexnet_cifar(width=0.05)
        optimizer, averager = setup(model)
        steps = Loader(data.train, 8, augment=Augment(cutout=4), seed=1).epoch(5, start=start)
        last = [train_step(model, batch, optimizer, 0.0, averager).loss for batch in steps][-1]
        results.append(last)
    assert results[0] == results[1]
