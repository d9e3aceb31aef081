"""EMA of the weights: its formula, the swap and its undoing, its state."""

from __future__ import annotations

import numpy as np
import pytest

from nanocnn import optim
from nanocnn.ema import EMA
from nanocnn.kernels import dispatch
from nanocnn.tensor import Tensor

SHAPES = {"a": (3, 4), "b": (5,), "c": ()}


def model(bucket_bytes=64, dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    params = {
        name: Tensor(np.asarray(rng.standard_normal(shape), dtype), requires_grad=True)
        for name, shape in SHAPES.items()
    }
    return params, optim.SGD(params.items(), lr=0.1, bucket_bytes=bucket_bytes).buckets


def walk(params, ema, steps, seed=1):
    """Random steps of the weights, each taken into the average; returns the weights after each."""
    rng = np.random.default_rng(seed)
    path = []
    for _ in range(steps):
        for p in params.values():
            p.data += rng.standard_normal(p.shape)
        ema.update()
        path.append({name: p.data.copy() for name, p in params.items()})
    return path


@pytest.mark.parametrize("warmup", [False, True])
def test_formula(warmup):
    params, buckets = model()
    assert len(buckets) > 1
    expected = {name: p.data.copy() for name, p in params.items()}
    ema = EMA(buckets, decay=0.6, warmup=warmup)
    for n, weights in enumerate(walk(params, ema, 12)):
        decay = min(0.6, (1 + n) / (10 + n)) if warmup else 0.6
        expected = {name: decay * expected[name] + (1 - decay) * w for name, w in weights.items()}
    for name, average in ema.state_dict()["average"].items():
        np.testing.assert_allclose(average, expected[name], rtol=1e-12, atol=1e-14)


def test_equals_pytorch():
    torch = pytest.importorskip("torch")
    swa = torch.optim.swa_utils
    params, buckets = model()
    net = torch.nn.ParameterDict({name: torch.nn.Parameter(torch.from_numpy(p.data)) for name, p in params.items()})
    theirs = swa.AveragedModel(net, multi_avg_fn=swa.get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(net)  # PyTorch's first update copies, and so does our constructor
    ema = EMA(buckets, 0.9, warmup=False)
    for _ in range(5):
        walk(params, ema, 1)  # PyTorch's parameters share our memory
        theirs.update_parameters(net)
    for name, average in ema.state_dict()["average"].items():
        np.testing.assert_allclose(average, theirs.module[name].detach().numpy(), rtol=1e-12)


def test_applied_swaps_in_and_back_even_on_an_exception():
    params, buckets = model(dtype=np.float32)
    ema = EMA(buckets, 0.9)
    weights = walk(params, ema, 3)[-1]
    arrays = {name: p.data for name, p in params.items()}
    with ema.applied():
        for name, average in ema.state_dict()["average"].items():
            np.testing.assert_array_equal(params[name].data, average)
            assert not np.array_equal(average, weights[name])
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.applied(), ema.applied():
        raise RuntimeError("evaluation failed")
    for name, p in params.items():
        assert p.data is arrays[name]  # the same memory: other views of it see the swap too
        np.testing.assert_array_equal(p.data, weights[name])
        assert p.dtype == np.float32


def test_state_travels_to_other_buckets():
    params, buckets = model()
    ema = EMA(buckets, 0.9)
    walk(params, ema, 3)
    others, other_buckets = model(bucket_bytes=1 << 20, seed=5)
    resumed = EMA(other_buckets, 0.9)
    resumed.load_state_dict(ema.state_dict())
    assert resumed.updates == 3
    for name, p in others.items():
        p.data[...] = params[name].data
    walk(params, ema, 3, seed=2)
    walk(others, resumed, 3, seed=2)
    for name, average in ema.state_dict()["average"].items():
        np.testing.assert_array_equal(resumed.state_dict()["average"][name], average)


def test_bad_input():
    params, buckets = model()
    for decay in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="decay must be"):
            EMA(buckets, decay)
    ema = EMA(buckets)
    before = {name: a.copy() for name, a in ema.state_dict()["average"].items()}
    with pytest.raises(ValueError, match=r"missing: b \(5,\); .*unexpected: d \(1,\); .*a: expected shape \(3, 4\)"):
        ema.load_state_dict({"updates": 1, "average": {"a": np.zeros((4, 3)), "c": np.zeros(()), "d": np.zeros(1)}})
    with pytest.raises(ValueError, match="keys 'updates' and 'average'"):
        ema.load_state_dict({"average": before})
    assert ema.updates == 0
    for name, a in ema.state_dict()["average"].items():
        np.testing.assert_array_equal(a, before[name])
    assert params["a"].shape == (3, 4)


def test_variants_agree_to_the_bit():
    averages = []
    for policy in ("reference", "fastest"):
        params, buckets = model(dtype=np.float32)
        ema = EMA(buckets, 0.9)
        with dispatch.using(policy):
            walk(params, ema, 4)
        averages.append(np.concatenate(ema.averages))
    np.testing.assert_array_equal(*averages)
