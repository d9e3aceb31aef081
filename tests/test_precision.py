"""Half precision: close to float32, gradients saved by the loss scale, the scaler's rules, what overflowed first."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import sys

import numpy as np
import pytest
from launch import NEEDS_BFLOAT16, NEEDS_GXX, ROOT, alone, ranks

import nanocnn as nc
from nanocnn import checkpoint, nn
from nanocnn import functional as F
from nanocnn.data import Batch
from nanocnn.kernels import dispatch, half
from nanocnn.kernels.emulated_array import Emulated
from nanocnn.kernels.narrow import HALVES, NARROW
from nanocnn.models import alexnet_cifar, lenet5
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.precision import LossScaler, NonFiniteGradient, at_entrance, check, default_scaler, first_overflow
from nanocnn.tensor import Op, Tensor
from nanocnn.train import NonFiniteLoss, overflow_of_step, train_step

sys.path.insert(0, str(ROOT / "experiments"))  # a script's neighbours are found beside it

from common import make_scaler

PRECISIONS = ["fp16", pytest.param("bf16", marks=NEEDS_BFLOAT16)]
MODELS = {"lenet": ((28, 28, 1), lenet5), "alexnet": ((32, 32, 3), lambda: alexnet_cifar(width=0.125, batch_norm=True))}

HALF_RUNS = [*((name, "fp16") for name in MODELS), pytest.param("lenet", "bf16", marks=NEEDS_BFLOAT16)]


def batch_of(shape, n=16, step=0):
    rng = np.random.default_rng(step)
    x = rng.standard_normal((n, *shape)).astype(np.float32)
    return Batch(x=x, y=rng.integers(0, 10, n), index=np.arange(n), global_size=n, step=step)


def training(name, device="cpu"):
    nc.manual_seed(0)
    shape, make = MODELS[name]
    model = make().to(device)
    optimizer = nc.optim.SGD(model.named_parameters(), 0.05, momentum=0.9)
    return model, optimizer, GradientAverager(optimizer.buckets, Alone()), shape


def one_step(name, precision, device="cpu", scaler=None, **choices):
    """Loss and gradients of a step, and the model after it."""
    model, optimizer, averager, shape = training(name, device)
    with nc.using(precision=precision, **choices):
        scaler = scaler or LossScaler(2.0**10, enabled=precision == "fp16")
        result = train_step(model, batch_of(shape), optimizer, 0.05, averager, scaler=scaler)
    assert scaler.skipped == 0
    return result.loss, {k: np.asarray(p.grad) for k, p in model.named_parameters()}, model


def relative(a, b):
    """The distance of all arrays by name, over the norm of the second ones."""
    norm = math.sqrt(sum(float(np.sum(np.square(x, dtype=np.float64))) for x in b.values()))
    return math.sqrt(sum(float(np.sum(np.square(a[k] - b[k], dtype=np.float64))) for k in b)) / norm


# ------------------------------------------------------------------ numerics


@pytest.mark.parametrize("choices", [{}, {"fuse": "off"}], ids=["fused", "one by one"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_precision_is_near_float32(precision, name, choices):
    """Within a hundredth; gradients in bfloat16, which has three bits less, within eight."""
    loss, grads, model = one_step(name, precision, **choices)
    expected, expected_grads, _ = one_step(name, "fp32", **choices)
    assert 0 < abs(loss / expected - 1) < 1e-2
    assert 0 < relative(grads, expected_grads) < {"fp16": 1e-2, "bf16": 8e-2}[precision]
    assert all(p.dtype == np.float32 and p.grad.dtype == np.float32 for p in model.parameters())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_are_halves_and_statistics_and_loss_float32(precision):
    name = half.dtype_of(precision).name
    seen: dict[str, set] = {}

    class Dtypes(dispatch.Recorder):
        def kernel(self, primitive, variant, args, kwargs):
            result = variant.body(*args, **kwargs)
            found = result if isinstance(result, tuple) else (result,)
            if variant.name in ("fp32", "reference") and any(map(half.is_half, (*args, *kwargs.values()))):
                seen.setdefault(primitive.name, set()).add(tuple(str(getattr(r, "dtype", None)) for r in found))
            return result

    model, *_, shape = training("alexnet")
    batch = batch_of(shape)
    with nc.using(precision=precision):
        try:
            dispatch.recorder = Dtypes()
            loss = F.cross_entropy(model(at_entrance(Tensor(batch.x))), batch.y)
            loss.backward()
        finally:
            dispatch.recorder = None
    assert loss.dtype == np.float32
    assert seen["conv2d"] == seen["matmul"] == seen["batch_norm_apply"] == {(name,)}
    assert seen["batch_norm_stats"] == seen["batch_norm_grad_stats"] == {("float32", "float32")}
    assert seen["max_pool2d"] == {(name, "uint8")}


@pytest.mark.parametrize("dtype", [*HALVES], ids=str)
@pytest.mark.parametrize("policy", ["fastest", "reference"])
def test_long_sums_are_added_up_in_float32(policy, dtype):
    """In float16, 2048 + 1 is 2048, and so the sum of 4096 ones would be; in bfloat16 it would be 256."""
    n = 4096
    ones = Tensor(np.ones((n, 4), dtype), requires_grad=True)
    image = Tensor(np.ones((1, 64, 64, 2), dtype))
    with nc.using(policy):
        assert (ones.transpose(1, 0) @ ones).data[0, 0] == n
        assert F.global_avg_pool2d(image).data[0, 0] == 1
        assert F.avg_pool2d(image, 64).data[0, 0, 0, 0] == 1
        assert F.softmax(Tensor(np.zeros((1, n), dtype))).data.sum(dtype=np.float64) == 1
        loss = F.cross_entropy(Tensor(np.zeros((n, 1024), dtype)), np.zeros(n, int))
        assert abs(loss.item() - math.log(1024)) < 1e-5
        assert nn.Linear(4, 3)(ones).dtype == nn.LayerNorm(4)(ones).dtype == dtype
        bias = Tensor(np.zeros(4, np.float32), requires_grad=True)
        y = F.linear(ones, Tensor(np.eye(4, dtype=dtype)), F.cast(bias, dtype))
        y.backward(np.ones((n, 4), dtype))
        assert (bias.grad == n).all()
    assert (ones.sum(axis=0).data == n).all()
    added = Tensor(np.zeros(4, dtype), requires_grad=True)
    (ones + added).backward(np.ones((n, 4), dtype))
    assert (added.grad == n).all()


@NEEDS_GXX
@pytest.mark.parametrize(("name", "precision"), HALF_RUNS)
def test_the_emulator_computes_the_same(name, precision):
    """Its kernels are CUDA's, and its roundings: the same halves are multiplied, the sums are float32's."""
    loss, grads, _ = one_step(name, precision, "emulated")
    expected, expected_grads, _ = one_step(name, precision)
    assert abs(loss / expected - 1) < 1e-3
    assert relative(grads, expected_grads) < 5e-3


@pytest.mark.parametrize(("name", "precision"), HALF_RUNS)
def test_a_recorded_step_takes_each_steps_scale(name, precision):
    losses, states = [], []
    for graph in ("off", "on"):
        model, optimizer, averager, shape = training(name)
        scaler = LossScaler(2.0**10, interval=2)
        with nc.using(precision=precision, graph=graph):
            batches = [batch_of(shape, step=i) for i in range(5)]
            losses.append([train_step(model, b, optimizer, 0.05, averager, scaler=scaler).loss for b in batches])
        states.append(model.state_dict())
        assert scaler.scale == 2.0**12
    assert losses[0] == losses[1]
    for key, value in states[0].items():
        np.testing.assert_array_equal(value, states[1][key], err_msg=key)


# ------------------------------------------------------------------ the loss scaler


def test_small_gradients_round_to_0_without_a_scale():
    """Those of a rank's part of a very large batch, say: each image's is divided by their number."""
    batch = dataclasses.replace(batch_of((2, 2, 3)), global_size=2**26)
    grads = {}
    for label, precision, scaler in (
        ("fp32", "fp32", LossScaler(enabled=False)),
        ("lost", "fp16", LossScaler(enabled=False)),
        ("saved", "fp16", LossScaler()),
        *[("in range", "bf16", LossScaler(enabled=False))] * (len(HALVES) == len(NARROW)),
    ):
        nc.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
        optimizer = nc.optim.SGD(model.named_parameters(), 0.1)
        with nc.using(precision=precision):
            train_step(model, batch, optimizer, 0.1, GradientAverager(optimizer.buckets, Alone()), scaler=scaler)
        grads[label] = {"weight": model[1].weight.grad}
    assert grads["fp32"]["weight"].all()
    assert not grads["lost"]["weight"].any()
    assert relative(grads["saved"], grads["fp32"]) < 1e-2
    assert relative(grads.get("in range", grads["saved"]), grads["fp32"]) < 2e-2


def buckets_with(*values):
    named = [(str(i), nn.Parameter(np.zeros(3, np.float32))) for i in range(len(values))]
    buckets = nc.optim.SGD(named, 0.1).buckets
    for bucket in buckets:
        bucket.grad[...] = np.repeat(np.array(values, np.float32), 3)[::-1]
    return buckets


def test_the_dynamic_scale_grows_backs_off_and_ends_at_its_floor():
    scaler = LossScaler(8.0, interval=3, floor=2.0)
    scales = []
    for value in (16, 16, 16, math.inf, 16, 16, math.nan, -math.inf, 16):
        buckets = buckets_with(16, value)
        assert scaler.unscale(buckets) == math.isfinite(value)
        scales.append(scaler.scale)
    assert scales == [8, 8, 16, 8, 8, 8, 4, 2, 2]
    assert scaler.skipped == 3
    np.testing.assert_array_equal(buckets[0].grad, 8)
    with pytest.raises(NonFiniteGradient, match="not finite at 2, the floor of the dynamic loss scale"):
        scaler.unscale(buckets_with(math.inf))
    assert scaler.figures() == {"loss_scale": 2, "skipped_steps": 3}


@NEEDS_GXX
@pytest.mark.parametrize("bad", [(), (0,), (2,), (0, 1, 2)])
def test_of_a_device_the_host_asks_once_for_all_buckets(bad, monkeypatch):
    named = [(str(i), nn.Parameter(np.zeros(3, np.float32))) for i in range(3)]
    for _, p in named:
        p.data = dispatch.to_device(p.data, "emulated")
    buckets = nc.optim.SGD(named, 0.1, bucket_bytes=12).buckets
    for i, bucket in enumerate(buckets):
        bucket.grad[...] = math.inf if i in bad else 16
    looks, seen = [], Emulated._seen
    monkeypatch.setattr(Emulated, "_seen", lambda self: looks.append(self) or seen(self))
    assert LossScaler(8.0).unscale(buckets) == (not bad)
    assert (len(buckets), len(looks)) == (3, 1)
    if not bad:
        assert all((np.asarray(bucket.grad) == 2).all() for bucket in buckets)


def test_a_static_scale_stays_and_one_that_is_off_does_nothing():
    static = LossScaler(0.5, dynamic=False, interval=1)
    buckets = buckets_with(3)
    assert static.unscale(buckets)
    assert static.scale == 0.5
    assert (buckets[0].grad == 6).all()
    with pytest.raises(NonFiniteGradient, match=r"0\.5, the static loss scale"):
        static.unscale(buckets_with(math.nan))
    off, buckets = LossScaler(enabled=False), buckets_with(math.nan)
    assert off.unscale(buckets)
    assert (off.scale, off.figures()) == (1.0, {})


@pytest.mark.parametrize("bad", [
    dict(scale=0), dict(scale=math.nan), dict(scale=math.inf), dict(floor=2.0**17), dict(floor=0), dict(growth=0.5),
    dict(backoff=1.0), dict(interval=0),
])  # fmt: skip
def test_a_scaler_of_nonsense_is_refused(bad):
    with pytest.raises(ValueError, match="loss scale"):
        LossScaler(**bad)
    with pytest.raises(ValueError, match="keys 'scale', 'good' and 'skipped', got"):
        LossScaler().load_state_dict({"scale": 1})


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_goes_on_bit_for_bit(precision, tmp_path):
    """Interrupted between two changes of the scale, in the very state that decides the next one."""

    def steps(model, optimizer, averager, shape, scaler, which):
        with nc.using(precision=precision):
            return [
                train_step(model, batch_of(shape, step=i), optimizer, 0.05, averager, scaler=scaler).loss for i in which
            ]

    whole, scaler = training("lenet"), LossScaler(2.0**26, interval=4)
    losses = steps(*whole, scaler, range(16))
    assert bool(scaler.skipped) == (precision == "fp16")  # nothing overflows in bfloat16
    first, before = training("lenet"), LossScaler(2.0**26, interval=4)
    steps(*first, before, range(9))
    state = {"model": first[0].state_dict(), "optimizer": first[1].state_dict(), "scaler": before.state_dict()}
    path = checkpoint.save(tmp_path, 9, state)
    second, after = training("lenet"), LossScaler(2.0**26, interval=4)
    loaded = checkpoint.load(path)
    for part, name in ((second[0], "model"), (second[1], "optimizer"), (after, "scaler")):
        part.load_state_dict(loaded[name])
    assert steps(*second, after, range(9, 16)) == losses[9:]
    assert after.state_dict() == scaler.state_dict()
    for name, value in whole[0].state_dict().items():
        np.testing.assert_array_equal(second[0].state_dict()[name], value, err_msg=name)


@pytest.mark.parametrize("n", [2])
def test_all_ranks_skip_the_step_in_which_one_overflows(n, tmp_path):
    outcome = ranks(n, "scaling.py", tmp_path / "done")
    assert outcome.status == 0, outcome.output
    assert (tmp_path / "done").read_text() == "all alike"


# ------------------------------------------------------------------ what overflowed first


class Net(nn.Module):
    def __init__(self):
        self.features = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten())
        self.norm = nn.BatchNorm1d(36 * 4)
        self.head = nn.Linear(36 * 4, 10)

    def forward(self, x):
        return self.head(self.norm(self.features(x)))


def planted(what):
    """A network and a batch of which one array overflows in float16."""
    nc.manual_seed(0)
    model, batch, scale = Net(), batch_of((8, 8, 3), 4), 1.0
    if what == "output":
        model.features[2].weight.data[...] *= 3e4
    elif what == "weights":
        model.features[2].weight.data[0, 0, 0, 0] = 1e5
    elif what == "weights before":
        model.features[2].weight.data[0, 0, 0, 0] = np.nan
    elif what == "images":
        batch.x[1, 2, 3, 0] = np.inf
    elif what == "gradient":
        model.features[2].weight.data[...] *= 1e-4  # a small deviation, by which batch norm divides
        model.norm.weight.data[...] = 100
        scale = 2.0**10
    return model, batch, scale


@pytest.mark.parametrize(("what", "text"), [
    ("output", r"layer 'features\.2' \(Conv2d\): forward output has [\d,]+ infinities among 576 numbers, "
     r"largest finite [3-6]\.\d\de\+04; float16 ends at 65504"),
    ("weights", r"layer 'features\.2' \(Conv2d\): parameters, cast, has 1 infinities among 144 numbers"),
    ("weights before", r"layer 'features\.2' \(Conv2d\): parameters has 1 NaN among 144 numbers, [^;]*$"),
    ("images", r"layer 'features\.0' \(Conv2d\): input has 1 infinities among 768 numbers"),
    ("gradient", r"layer 'norm' \(BatchNorm1d\): gradient of its input has [\d,]+ infinities"),
])  # fmt: skip
def test_the_microscope_names_what_overflowed_first(what, text):
    model, batch, scale = planted(what)
    before = {k: v.copy() for k, v in model.state_dict().items()}
    with nc.using(precision="fp16"):
        found = overflow_of_step(model, batch, scale)
    assert found is not None
    assert re.search(text, str(found)), str(found)
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)
    assert all(p.grad is None for p in model.parameters())


def test_the_microscope_sees_nothing_where_all_is_finite():
    model, batch, _ = planted("nothing")
    with nc.using(precision="fp16"):
        assert overflow_of_step(model, batch) is None
    assert first_overflow(model, lambda m: m(Tensor(batch.x))) is None
    assert dispatch.recorder is None


def test_an_activation_that_overflows_is_an_error_that_no_scale_would_mend():
    model, batch, _ = planted("output")
    optimizer = nc.optim.SGD(model.named_parameters(), 0.1)
    before, scaler = optimizer.buckets[0].data.copy(), LossScaler()
    text = r"the loss is nan.*The first to overflow is layer 'features\.2' \(Conv2d\).*with --use precision=bf16"
    with nc.using(precision="fp16"), pytest.raises(NonFiniteLoss, match=text), np.errstate(all="ignore"):
        train_step(model, batch, optimizer, 0.1, GradientAverager(optimizer.buckets, Alone()), scaler=scaler)
    np.testing.assert_array_equal(optimizer.buckets[0].data, before)
    assert scaler.skipped == 0


class _Infinite(Op):
    def forward(self, x):
        return x.copy()

    def backward(self, gy):
        gx = gy.copy()
        gx[0] = np.inf
        return gx


class _Overflows(nn.Module):
    def forward(self, x):
        return _Infinite.apply(x)


@NEEDS_GXX
@NEEDS_BFLOAT16
@pytest.mark.parametrize("graph", ["off", "on"])
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_in_bfloat16_an_infinite_gradient_changes_no_weight(device, graph):
    nc.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), _Overflows()).to(device)
    optimizer = nc.optim.SGD(model.named_parameters(), 0.1)
    averager, before = GradientAverager(optimizer.buckets, Alone()), np.array(optimizer.buckets[0].data)
    x = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    batch = Batch(x, np.arange(6) % 5, np.arange(6), 6, 0, 0)
    with nc.using(precision="bf16", graph=graph), np.errstate(invalid="ignore"):
        scaler = default_scaler()
        with pytest.raises(NonFiniteGradient, match=r"^a gradient is not finite in epoch 1, step 1.*lower learning"):
            train_step(model, batch, optimizer, 0.1, averager, scaler=scaler)
    np.testing.assert_array_equal(np.asarray(optimizer.buckets[0].data), before)
    assert scaler.figures() == {}
    assert scaler.unscale([])


def test_a_gradient_that_overflows_skips_steps_and_at_the_floor_is_an_error():
    model, batch, scale = planted("gradient")
    optimizer = nc.optim.SGD(model.named_parameters(), 0.1)
    averager, before = GradientAverager(optimizer.buckets, Alone()), optimizer.buckets[0].data.copy()
    scaler = LossScaler(2 * scale, floor=scale)
    with nc.using(precision="fp16"):
        train_step(model, batch, optimizer, 0.1, averager, scaler=scaler)
        assert (scaler.skipped, scaler.scale) == (1, scale)
        text = (
            r"at 1024, the floor.*in epoch 1, step 1\. The first to overflow is layer 'norm' \(BatchNorm1d\): gradient"
        )
        with pytest.raises(NonFiniteGradient, match=text):
            train_step(model, batch, optimizer, 0.1, averager, scaler=scaler)
    np.testing.assert_array_equal(optimizer.buckets[0].data, before)


@NEEDS_BFLOAT16
def test_what_overflows_in_bfloat16_does_so_in_float32_and_the_advice_is_another():
    model, batch, _ = planted("output")
    model.features[2].weight.data[...] *= 1e30
    model.features[0].weight.data[...] *= 1e5
    optimizer = nc.optim.SGD(model.named_parameters(), 0.1)
    text = (
        r"layer 'features\.2' \(Conv2d\): forward output has .*; bfloat16 ends at 3\.38953e\+38\..* lower learning rate"
    )
    with nc.using(precision="bf16"), pytest.raises(NonFiniteLoss, match=text), np.errstate(all="ignore"):
        train_step(model, batch, optimizer, 0.1, GradientAverager(optimizer.buckets, Alone()))


def test_bfloat16_without_its_package_is_an_error_that_names_it(monkeypatch):
    monkeypatch.setitem(NARROW, "bf16", NARROW["bf16"]._replace(dtype=None))
    with nc.using(precision="bf16"):
        for ask in (lambda: check("cpu"), lambda: at_entrance(Tensor(np.ones(1, np.float32)))):
            with pytest.raises(
                dispatch.ChoiceError, match=r"bf16 needs the package ml_dtypes.* -m pip install 'ml_dtypes"
            ):
                ask()
    with nc.using(precision="fp16"):
        check("cpu")


# ------------------------------------------------------------------ the script


@pytest.mark.parametrize(
    ("precision", "asked", "expected"),
    [("fp32", None, (False, 1.0)), ("fp16", None, (True, 2.0**16)), ("bf16", None, (True, 1.0)),
     ("bf16", "dynamic", (True, 2.0**16)), ("bf16", 8.0, (True, 8.0))],
)  # fmt: skip
def test_which_loss_scale_a_script_makes(precision, asked, expected):
    with nc.using(precision=precision):
        scaler = make_scaler(argparse.Namespace(loss_scale=asked))
    assert (scaler.enabled, scaler.scale) == expected


def test_the_script_trains_in_half_precision_and_refuses_a_scale_without_it(tmp_path):
    script = ROOT / "experiments" / "alexnet_cifar.py"
    small = ("--data", "shapes", "--train-images", "100", "--width", "0.05", "--batch-size", "32", "--epochs", "1")
    options = (*small, "--runs", tmp_path, "--name", "half", "--use", "precision=fp16")
    outcome = alone(script, *options)
    assert outcome.status == 0, outcome.output
    assert "scale 65536  skipped 0" in outcome.output
    state = checkpoint.load(checkpoint.latest(tmp_path / "half" / "checkpoints"))
    assert state["scaler"] == {"scale": 2.0**16, "good": 2, "skipped": 0}
    assert "loss_scale" in (tmp_path / "half" / "metrics.csv").read_text()
    outcome = alone(script, *small, "--loss-scale", "128")
    assert outcome.status == 2
    assert "--loss-scale 128.0: gradients of float32 need none; add --use precision=fp16" in outcome.output
