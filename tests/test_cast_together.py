"""Weights cast a bucket at a time: the same bits as cast by each layer, fewer launches, and never an old copy."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from launch import NEEDS_GXX

import nanocnn as nc
from nanocnn import functional as F
from nanocnn import nn, train
from nanocnn.data import Batch
from nanocnn.ema import EMA
from nanocnn.functional.basic import Cast
from nanocnn.functional.cast_together import cast_together, made_of
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.precision import LossScaler
from nanocnn.tensor import Tensor
from nanocnn.train import evaluate, train_step


class Net(nn.Module):
    """Two layers share their weights, so that a parameter is cast twice and gets two gradients; one is not trained."""

    def __init__(self):
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.twice, self.head, self.fixed = nn.Linear(288, 288), nn.Linear(288, 10), nn.Linear(10, 10)
        self.fixed.weight.requires_grad = False

    def forward(self, x):
        x = self.norm(self.conv(x), relu=True).reshape(len(x), 288)
        return self.fixed(self.head(self.twice(self.twice(x))))


CASTS = 10  # in forward: of two parameters for each of five layers


def batch_of(step=0, n=6):
    rng = np.random.default_rng(step)
    return Batch(rng.standard_normal((n, 8, 8, 3)).astype(np.float32), rng.integers(0, 10, n), np.arange(n), n, 0, step)


def trained(device, **choices):
    """All arrays after three steps, each with an evaluation and an average of the weights; the recording."""
    nc.manual_seed(0)
    model = Net().to(device)
    optimizer = nc.optim.SGD(model.named_parameters(), 0.05, momentum=0.9, bucket_bytes=5000)
    averager, scaler, told = GradientAverager(optimizer.buckets, Alone()), LossScaler(2.0**10), []
    ema = EMA(optimizer.buckets, 0.5)
    with nc.using(precision="fp16", **choices):
        for step in range(3):
            told.append(train_step(model, batch_of(step), optimizer, 0.05, averager, scaler=scaler))
            ema.update()
            told.append(evaluate(model, [batch_of(9)], 10, Alone()).loss)
            with ema.applied():
                told.append(evaluate(model, [batch_of(9)], 10, Alone()).loss)
            assert not any(made_of(p, np.float16) is not None for p in model.parameters())
    recording = train._recordings.get(model, (None, None))[1]
    return told, {name: np.array(x) for name, x in model.state_dict().items()}, optimizer, recording


def by_each_layer(monkeypatch):
    monkeypatch.setattr(train, "cast_together", lambda *_: contextlib.nullcontext())


def assert_alike(found, expected):
    assert found[0] == expected[0]
    assert len({str(t) for t in found[0]}) == len(found[0])  # each step, and each evaluation, saw other weights
    for name, array in expected[1].items():
        np.testing.assert_array_equal(found[1][name], array, err_msg=name)


@pytest.mark.parametrize("device", ["cpu", pytest.param("emulated", marks=NEEDS_GXX)])
@pytest.mark.parametrize("graph", ["off", "on"])
def test_training_and_evaluation_are_those_of_casts_by_each_layer(device, graph, monkeypatch):
    together = trained(device, graph=graph)
    by_each_layer(monkeypatch)
    assert_alike(together, trained(device, graph="off"))


@NEEDS_GXX
def test_a_recorded_step_has_a_cast_for_each_bucket(monkeypatch):
    _, _, optimizer, together = trained("emulated", graph="on")
    by_each_layer(monkeypatch)
    *_, alone = trained("emulated", graph="on")
    fixed = 1  # in no bucket
    assert len(optimizer.buckets) > 2
    assert len(alone._step.graph) - len(together._step.graph) == CASTS - fixed - len(optimizer.buckets)


def test_what_was_made_is_of_these_weights_and_of_this_dtype():
    layer, x = nn.Linear(4, 3), Tensor(np.ones((2, 4), np.float16))
    buckets = nc.optim.SGD(layer.named_parameters(), 0.1).buckets
    with cast_together(buckets, np.float16):
        assert F.cast(layer.weight, np.float16).data.base is F.cast(layer.bias, np.float16).data.base
        assert made_of(layer.weight, np.float64) is None
        with cast_together(buckets, np.float32):  # nothing to be made
            assert made_of(layer.weight, np.float16) is None
        expected = layer(x).data
        layer.weight.data = 2 * layer.weight.data  # somebody moves in another array
        np.testing.assert_allclose(layer(x).data, 2 * expected, rtol=1e-2)
    with pytest.raises(ArithmeticError), cast_together(buckets, np.float16):
        raise ArithmeticError
    assert made_of(layer.bias, np.float16) is None


def test_a_gradient_is_cast_into_its_place():
    p = nn.Parameter(np.ones(3, np.float32))
    p.grad_buffer = place = np.full(3, np.nan, np.float32)
    for times in (1, 2):  # the second is added
        Cast.apply(p, dtype=np.dtype(np.float16)).backward(np.array([1, 2, np.inf], np.float16))
        assert p.grad is place
        np.testing.assert_array_equal(place, times * np.array([1, 2, np.inf]))
