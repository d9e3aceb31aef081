"""Fused and unfused: the same values, gradients that are derivatives, and the passes that are saved."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nanocnn as nc
from nanocnn import functional as F
from nanocnn import nn
from nanocnn.kernels import dispatch
from nanocnn.models import alexnet_cifar, resnet18
from nanocnn.tensor import Tensor, saved_bytes
from nanocnn.testing import check_gradients

POLICIES = ("reference", "fastest")
BOTH = ("on", "off")


def _away_from_zero(rng, *shape):
    """Numbers at whose ReLU a small step changes nothing."""
    x = rng.standard_normal(shape)
    return np.where(abs(x) < 0.05, 0.1, x)


def _statistics(rng, channels):
    return dict(running_mean=rng.standard_normal(channels), running_var=rng.random(channels) + 0.5)


def _norm(rng, c, training, **more):
    how = dict(_statistics(rng, c), training=training, momentum=0.0)
    return lambda x, w, b, *residual: F.batch_norm(
        x, weight=w, bias=b, residual=residual[0] if residual else None, **how, **more
    )


def _conv(**how):
    return lambda x, w, b, *residual: F.conv2d(x, w, b, padding=1, residual=residual[0] if residual else None, **how)


def _calls():
    """Each function with `relu` or `residual`: name -> (function of tensors, arrays)."""
    rng = np.random.default_rng(5)
    image, kernel, bias = rng.standard_normal((2, 5, 6, 4)), rng.standard_normal((3, 3, 4, 7)), rng.standard_normal(7)
    like_y = rng.standard_normal((2, 5, 6, 7))
    channel = rng.standard_normal((2, 4))
    return {
        "conv": (_conv(relu=True), (image, kernel, bias)),
        "conv without bias": (lambda x, w: F.conv2d(x, w, stride=2, relu=True), (image, kernel)),
        "conv with residual": (_conv(relu=True), (image, kernel, bias, like_y)),
        "conv with residual, no ReLU": (_conv(), (image, kernel, bias, like_y)),
        "conv of groups": (
            lambda x, w, b: F.conv2d(x, w, b, groups=2, relu=True),
            (image, kernel[:, :, :2, :6], bias[:6]),
        ),
        "linear": (lambda x, w, b: F.linear(x, w, b, relu=True), (image, kernel[0, 0], bias)),
        "linear without bias": (lambda x, w: F.linear(x, w, relu=True), (image, kernel[0, 0])),
        "batch norm": (_norm(rng, 4, True, relu=True), (image, *channel)),
        "batch norm, evaluation": (_norm(rng, 4, False, relu=True), (image, *channel)),
        "batch norm with residual": (_norm(rng, 4, True, relu=True), (image, *channel, image[::-1].copy())),
        "batch norm with residual, no ReLU": (_norm(rng, 4, True), (image, *channel, image[::-1].copy())),
        "max pool": (lambda x: F.max_pool2d(x, 2, relu=True), (_away_from_zero(rng, 2, 5, 6, 4),)),
        "max pool, overlapping": (lambda x: F.max_pool2d(x, 3, 2, 1, relu=True), (_away_from_zero(rng, 2, 5, 6, 4),)),
    }


CALLS = _calls()


@pytest.mark.parametrize("fuse", BOTH)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CALLS)
def test_gradients(name, policy, fuse):
    fn, arrays = CALLS[name]
    with nc.using(policy, fuse=fuse):
        check_gradients(fn, *arrays)


def _assert_alike(fn, arrays, gy, tolerance):
    """Values and gradients, fused and unfused."""
    results = []
    for fuse in BOTH:
        inputs = [Tensor(a, requires_grad=True) for a in arrays]
        with nc.using(fuse=fuse):
            y = fn(*inputs)
            y.backward(gy)
        results.append([y.data, *(t.grad for t in inputs)])
    for ours, theirs in zip(*results, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance * abs(theirs).max(initial=1e-3))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CALLS)
def test_fused_equals_unfused(name, dtype):
    fn, arrays = CALLS[name]
    arrays = [a.astype(dtype) for a in arrays]
    gy = np.random.default_rng(0).standard_normal(fn(*map(Tensor, arrays)).shape).astype(dtype)
    _assert_alike(fn, arrays, gy, 2e-5 if dtype == np.float32 else 1e-12)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(0, 90),
    columns=st.integers(1, 150),
    residual=st.booleans(),
    training=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_batch_norm_over_random_sizes(rows, columns, residual, training, seed):
    rng = np.random.default_rng(seed)
    fn = _norm(rng, columns, training and rows != 1, relu=True)
    x, more, gy = rng.standard_normal((3, rows, columns))
    arrays = [x, *rng.standard_normal((2, columns)), *([more] if residual else [])]
    _assert_alike(fn, arrays, gy, 1e-9)


def test_what_is_fused_has_no_pass_of_its_own():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)]
    net = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 5), nn.ReLU())
    x = Tensor(np.random.default_rng(0).standard_normal((2, 8, 8, 3)).astype(np.float32))
    ran = {}
    for fuse in BOTH:
        for p in dispatch.primitives.values():
            p.ran.clear()
        with nc.using(fuse=fuse):
            net(x).sum().backward()
        ran[fuse] = set(dispatch.variants_that_ran())
    assert {"relu", "relu_grad", "add_bias"} <= ran["off"]
    assert not {"relu", "relu_grad", "add_bias"} & ran["on"]
    assert "relu_bias_grad" in ran["on"] - ran["off"]


def test_fusing_keeps_less_for_backward():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2))
    x = Tensor(np.ones((2, 10, 10, 3), np.float32))
    kept = {}
    for fuse in BOTH:
        with nc.using(fuse=fuse):
            kept[fuse] = saved_bytes(net(x))
    assert kept["off"] - kept["on"] == 2 * 8 * 8 * 8 * 4  # the ReLU's output, which pooling makes superfluous


def test_a_relu_of_a_nan_is_a_nan():
    x = np.array([[np.nan, -1.0], [2.0, 3.0]])
    for fuse in BOTH:
        with nc.using(fuse=fuse):
            assert np.isnan(F.linear(Tensor(x), Tensor(np.eye(2)), relu=True).data[0, 0])
            pooled = F.max_pool2d(Tensor(x.reshape(1, 2, 2, 1), requires_grad=True), 2, relu=True)
            assert np.isnan(pooled.data).all()
            pooled.backward(np.ones_like(pooled.data))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_window_without_a_positive_pixel_sends_no_gradient(policy):
    x = Tensor(np.array([[-1.0, 0.0], [-2.0, -0.0]]).reshape(1, 2, 2, 1), requires_grad=True)
    with nc.using(policy):
        y = F.max_pool2d(x, 2, relu=True)
        y.backward(np.ones_like(y.data))
    assert y.item() == 0
    np.testing.assert_array_equal(x.grad, 0)


# ------------------------------------------------------------------ Sequential: who does the ReLU


def _done(*modules):
    return [(type(m).__name__, relu) for m, relu in nn._with_relu(list(modules))]


def test_who_does_the_relu():
    conv, norm, relu, pool = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2)
    assert _done(conv, relu) == [("Conv2d", True)]
    assert _done(conv, norm, relu) == [("Conv2d", False), ("BatchNorm2d", True)]
    assert _done(conv, relu, pool) == [("Conv2d", False), ("MaxPool2d", True)]
    assert _done(conv, relu, relu, pool) == [("Conv2d", True), ("MaxPool2d", True)]
    assert _done(relu, conv) == [("ReLU", False), ("Conv2d", False)]
    assert _done(nn.Identity(), relu) == [("Identity", False), ("ReLU", False)]
    assert _done(conv, pool) == [("Conv2d", False), ("MaxPool2d", False)]
    assert _done() == []


class Doubled(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2.0


class Leaky(nn.ReLU):
    def forward(self, x):
        return F.relu(x) - F.relu(-x) * 0.1


def test_a_subclass_and_a_wrapped_forward_are_left_alone():
    assert _done(Doubled(1, 1, 1), nn.ReLU()) == [("Doubled", False), ("ReLU", False)]
    assert _done(nn.Conv2d(1, 1, 1), Leaky()) == [("Conv2d", False), ("Leaky", False)]
    seen = []
    net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2), nn.ReLU())
    original = net[1].forward
    net[1].forward = lambda x: seen.append(original(x)) or seen[-1]
    net(Tensor(np.ones((1, 2), np.float32)))
    assert len(seen) == 1


def test_the_profile_names_the_layer_that_did_it():
    net = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with nc.profile(net) as p:
        net(Tensor(np.ones((1, 2), np.float32)))
    assert {row["name"] for row in p.rows()["layers"]} >= {"0"}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_alexnet_trains_alike(batch_norm):
    results = []
    x = np.random.default_rng(0).standard_normal((3, 32, 32, 3))
    for fuse in BOTH:
        nc.manual_seed(1)
        model = alexnet_cifar(width=0.05, batch_norm=batch_norm, dropout=0.5).to(np.float64)
        with nc.using(fuse=fuse), nc.random.keyed(0, np.arange(3)):
            F.cross_entropy(model(Tensor(x)), np.arange(3)).backward()
        results.append([*(p.grad for p in model.parameters()), *(b.data for _, b in model.named_buffers())])
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize("fuse", BOTH)
def test_a_residual_that_does_not_fit(fuse):
    x, w = Tensor(np.ones((2, 4, 4, 3))), Tensor(np.ones((3, 3, 3, 5)))
    with nc.using(fuse=fuse):
        with pytest.raises(ValueError, match=r"residual of float64 \(2, 4, 4, 5\): expected float64 \(2, 2, 2, 5\)"):
            F.conv2d(x, w, residual=Tensor(np.ones((2, 4, 4, 5))))
        with pytest.raises(ValueError, match=r"residual of float32 .* expected float64 \(2, 4, 4, 3\)"):
            nn.BatchNorm2d(3).to(np.float64)(x, residual=Tensor(np.ones((2, 4, 4, 3), np.float32)), relu=True)
        with pytest.raises(ValueError, match=r"residual of float64 \(3,\)"):
            nn.BatchNorm2d(3).to(np.float64)(x, residual=Tensor(np.ones(3)))


# ------------------------------------------------------------------ batch norm folded into the weights


class Block(nn.Module):
    """As ResNet's: a sum of two paths."""

    folds = (("conv1", "bn1"), ("conv2", "bn2"))

    def __init__(self, channels):
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = nn.Sequential(nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x):
        y = self.bn1(self.conv1(x), relu=True)
        return self.bn2(self.conv2(y), residual=self.downsample(x), relu=True)


def _trained(model):
    """Random weights and statistics, in evaluation mode."""
    rng = np.random.default_rng(2)
    for name, array in model.state_dict().items():
        array[...] = rng.random(array.shape) + 0.5 if "var" in name else rng.standard_normal(array.shape) * 0.3
    return model.eval()


FOLDABLE = {
    "sequential": (
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(100, 5)),
        (2, 7, 7, 3),
    ),
    "groups": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6, eps=0.1)), (2, 7, 7, 4)),
    "linear": (lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU()), (6, 3)),
    "residual block": (lambda: nn.Sequential(Block(3), Block(3)), (2, 6, 5, 3)),
    "alexnet": (lambda: alexnet_cifar(width=0.05, batch_norm=True), (2, 32, 32, 3)),
    "resnet": (lambda: resnet18(width=1 / 16), (2, 16, 16, 3)),
    "resnet, another stem": (lambda: resnet18(width=1 / 16, stem="imagenet"), (2, 64, 64, 3)),
}


@pytest.mark.parametrize("fuse", BOTH)
@pytest.mark.parametrize("name", FOLDABLE)
def test_folded_equals_unfolded(name, fuse):
    make, shape = FOLDABLE[name]
    model = _trained(make().to(np.float64))
    x = Tensor(np.random.default_rng(0).standard_normal(shape))
    before = {k: a.copy() for k, a in model.state_dict().items()}
    with nc.using(fuse=fuse), nc.no_grad():
        folded = nn.fold_batch_norm(model)
        np.testing.assert_allclose(folded(x).data, model(x).data, rtol=1e-9, atol=1e-12)
    assert not any(isinstance(m, nn.BatchNorm2d) for _, m in folded.named_modules())
    assert any(isinstance(m, nn.BatchNorm2d) for _, m in model.named_modules())
    for k, a in folded.state_dict().items():  # nothing is shared, and the original is as it was
        a += 1
        assert not any(np.shares_memory(a, b) for b in model.state_dict().values()), k
    for k, a in model.state_dict().items():
        np.testing.assert_array_equal(a, before[k])


def test_a_folded_model_leaves_the_training_run_out():
    """Hooks on the parameters and the memory of their gradients belong to the run, and stay with it."""
    model = _trained(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    for p in model.parameters():
        p.on_grad, p.grad_buffer = (lambda _: pytest.fail("a hook was copied")), np.zeros(p.shape, np.float32)
    folded = nn.fold_batch_norm(model)
    folded(Tensor(np.ones((1, 2, 2, 1), np.float32))).sum().backward()
    assert all(not p.grad_buffer.any() for p in model.parameters())
    assert folded[1].weight.dtype == np.float32


def test_batch_norms_that_follow_something_else_stay():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    model = _trained(model.to(np.float64))
    x = Tensor(np.random.default_rng(0).standard_normal((4, 3, 3, 2)))
    folded = nn.fold_batch_norm(model)
    assert [type(m).__name__ for m in folded] == ["BatchNorm2d", "Identity", "Conv2d", "ReLU", "BatchNorm2d"]
    np.testing.assert_allclose(folded(x).data, model(x).data, rtol=1e-10)


class Wrong(nn.Module):
    folds = (("conv", "norm"),)

    def __init__(self):
        self.conv = nn.Conv2d(1, 2, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)), "in training mode"),
        (nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()).eval(), "nothing to fold in Sequential"),
        (Wrong().eval(), r"Wrong: cannot fold 'norm' \(NoneType\) into 'conv' \(Conv2d with weight"),
        (
            nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(3)).eval(),
            r"fold '1' \(BatchNorm2d with weight \(3,\)\) into '0' \(Conv2d with weight \(1, 1, 1, 2\)\)",
        ),
    ],
)
def test_what_cannot_be_folded(model, message):
    with pytest.raises(ValueError, match=message):
        nn.fold_batch_norm(model)
