"""Constant weights: what kernels keep of them is what they would make, and lives as long as they do."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import nanocnn as nc
from nanocnn import nn
from nanocnn.kernels import constant
from nanocnn.kernels.conv2d import conv2d
from nanocnn.kernels.matmul import matmul
from nanocnn.kernels.memory import contiguous
from nanocnn.models import alexnet_cifar, resnet18
from nanocnn.tensor import Tensor

RNG = np.random.default_rng(0)


def random(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_nobody_writes_to_a_constant():
    x = random(3, 4)
    c = constant.constant(x)
    assert constant.is_constant(c)
    assert not constant.is_constant(x)
    assert np.shares_memory(c, x)
    with pytest.raises(ValueError, match="read-only"):
        c[0] = 1


def test_what_is_made_of_a_constant_is_made_once():
    c, made = constant.constant(random(3)), []

    def make():
        made.append(1)
        return c + 1

    first = constant.derived(c, "plus one", make)
    assert constant.derived(c, "plus one", make) is first
    assert constant.is_constant(first)
    assert constant.derived(c, "again", make) is not first
    assert len(made) == 2
    plain = random(3)
    assert constant.derived(plain, "plus one", make) is not constant.derived(plain, "plus one", make)


GEOMETRIES = [  # images, height, C, kernel, O, stride
    (2, 9, 32, 3, 64, 1),  # Winograd
    (8, 16, 64, 3, 70, 1),
    (16, 16, 24, 3, 64, 2),
    (1, 4, 40, 3, 128, 1),  # direct: few rows
    (4, 9, 20, 5, 48, 2),
    (3, 8, 16, 1, 40, 1),  # pointwise
    (2, 12, 3, 3, 40, 2),  # few channels
]


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_a_convolution_of_constants_is_the_same(geometry):
    n, side, c, k, o, stride = geometry
    x, w, bias = random(n, side, side, c), random(k, k, c, o), random(o)
    frozen = constant.constant(w)
    args = (stride, stride), (k // 2, k // 2), (1, 1), 1
    expected = conv2d.variants["reference"].body(x, w, *args, bias=bias, relu=True)
    for variant in conv2d.rungs("cpu").values():
        if variant.supports(x, w, *args, bias=bias, relu=True):
            for _ in range(2):  # made, and kept
                y = variant.body(x, frozen, *args, bias=bias, relu=True)
                np.testing.assert_allclose(y, expected, rtol=1e-3, atol=1e-3 * k * c**0.5, err_msg=variant.name)


@pytest.mark.parametrize("shape", [(1, 70, 50), (16, 300, 64), (17, 300, 64), (40, 513, 1000), (300, 70, 33)], ids=str)
def test_a_product_with_a_constant_is_the_same(shape):
    m, k, n = shape
    a, b, bias = random(m, k), random(k, n), random(n)
    frozen = constant.constant(b)
    for variant in matmul.rungs("cpu").values():
        if variant.supports(a, b, bias=bias, relu=True):
            for _ in range(2):
                y = variant.body(a, frozen, bias=bias, relu=True)
                np.testing.assert_allclose(y, np.maximum(a @ b + bias, 0), rtol=1e-3, atol=1e-3, err_msg=variant.name)


def test_what_was_kept_goes_with_the_model():
    gc.collect()
    before = len(constant._kept)
    model = nn.freeze(resnet18(width=1 / 4).eval())
    with nc.no_grad():
        for n in (1, 16):
            model(Tensor(random(n, 32, 32, 3)))
    assert len(constant._kept) > before + len(list(model.parameters()))
    del model
    gc.collect()
    assert len(constant._kept) == before


@pytest.mark.parametrize("make", [alexnet_cifar, resnet18])
def test_a_frozen_model_infers_the_same(make):
    model = make(width=1 / 8)
    x = Tensor(random(5, 32, 32, 3))
    model(x)  # running statistics
    model.eval()
    frozen = nn.freeze(model)
    with nc.no_grad():
        expected = model(x).numpy()
        for _ in range(2):
            np.testing.assert_allclose(frozen(x).numpy(), expected, rtol=1e-3, atol=1e-4)
    assert not any(p.requires_grad for p in frozen.parameters())
    assert all(p.requires_grad for p in model.parameters())


def test_the_original_learns_on_and_the_frozen_model_stays():
    model = nn.Sequential(nn.Linear(4, 3)).eval()
    frozen, x = nn.freeze(model), Tensor(random(2, 4))
    before = frozen(x).numpy().copy()
    model[0].weight.data += 1
    np.testing.assert_array_equal(frozen(x).numpy(), before)
    with pytest.raises(ValueError, match="read-only"):
        frozen.load_state_dict(model.state_dict())


def test_a_model_in_training_is_not_frozen():
    with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
        nn.freeze(alexnet_cifar(width=1 / 16))


def test_freezing_twice_and_freezing_a_folded_model():
    model = resnet18(width=1 / 8).eval()
    x = Tensor(random(2, 32, 32, 3))
    once = nn.freeze(model)
    for again in (nn.freeze(once), nn.freeze(nn.fold_batch_norm(model)), nn.freeze(nn.freeze(model).eval())):
        np.testing.assert_allclose(again(x).numpy(), once(x).numpy(), rtol=1e-4, atol=1e-5)
        assert all(constant.is_constant(p.data) for p in again.parameters())


def test_what_cannot_be_folded_is_frozen_all_the_same():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    x = Tensor(random(2, 4))
    np.testing.assert_allclose(nn.freeze(model)(x).numpy(), model(x).numpy(), rtol=1e-5)


def test_a_pointwise_convolution_keeps_the_panels_of_its_matrix():
    w = constant.constant(random(1, 1, 16, 40))
    conv2d(random(3, 8, 8, 16), w, (1, 1), (0, 0), (1, 1), 1)
    assert "panels" in constant._kept[id(constant._kept[id(w)]["matrix"])]


def test_kernels_take_an_alias_of_what_may_not_be_written_to():
    x = random(4, 5)
    x.flags.writeable = False
    y = contiguous(x)
    assert y.flags.writeable
    assert np.shares_memory(x, y)
    del x
    gc.collect()
    assert np.isfinite(y).all()
