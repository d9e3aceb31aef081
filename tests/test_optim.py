"""Optimisers equal PyTorch's step by step; groups, state, missing gradients, clipping; bad input is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from nanocnn import optim
from nanocnn.kernels import dispatch, threads
from nanocnn.kernels.update import adam_update, sgd_update, sum_of_squares
from nanocnn.tensor import Tensor

SHAPES = {"conv.weight": (3, 3, 4, 8), "conv.bias": (8,), "scale": (), "empty": (0, 5), "fc.weight": (16, 10)}
SMALL = 300  # bytes: several buckets, some of several parameters

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    ("Adam", {}),
    ("Adam", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1}),
    ("AdamW", {}),
    ("AdamW", {"lr": 0.01, "betas": (0.8, 0.9), "eps": 1e-4, "weight_decay": 0.1}),
    ("Adagrad", {}),
    ("Adagrad", {"lr": 0.1, "lr_decay": 0.2, "weight_decay": 0.1, "initial_accumulator_value": 0.5, "eps": 1e-3}),
]
IDS = [f"{name}-{'-'.join(options) or 'defaults'}" for name, options in OPTIONS]
ALL = [*OPTIONS, ("LARS", {"lr": 0.5, "weight_decay": 0.01})]


def parameters(dtype=np.float64, seed=0, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {
        name: Tensor(np.asarray(rng.standard_normal(shape), dtype), requires_grad=True)
        for name, shape in shapes.items()
    }


def gradients(step, dtype=np.float64, shapes=SHAPES):
    rng = np.random.default_rng(1000 + step)
    return {name: np.asarray(rng.standard_normal(shape), dtype) for name, shape in shapes.items()}


def train(optimizer, params, steps, lr=None, dtype=np.float64):
    for step in steps:
        optimizer.zero_grad()
        for name, g in gradients(step, dtype).items():
            params[name].backward(g)
        optimizer.step(None if lr is None else lr(step))


def values(params):
    return {name: p.data.copy() for name, p in params.items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


# ------------------------------------------------------------------ the rules


@pytest.mark.parametrize(("dtype", "rtol", "atol"), [(np.float64, 1e-10, 1e-13), (np.float32, 1e-5, 2e-6)])
@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=IDS)
def test_equals_pytorch_step_by_step(name, options, dtype, rtol, atol):
    torch = pytest.importorskip("torch")
    params = parameters(dtype)
    theirs = {key: torch.nn.Parameter(torch.from_numpy(p.data.copy())) for key, p in params.items()}
    oracle = getattr(torch.optim, name)(list(theirs.values()), **options)
    optimizer = getattr(optim, name)(params.items(), **options, bucket_bytes=SMALL)
    assert len(optimizer.buckets) > 2
    for step in range(20):
        lr = optimizer.lr * (1 + 0.1 * step)
        train(optimizer, params, [step], lambda _, lr=lr: lr, dtype)
        for key, g in gradients(step, dtype).items():
            theirs[key].grad = torch.from_numpy(g)
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        for key, p in params.items():
            expected = theirs[key].detach().numpy()
            np.testing.assert_allclose(p.data, expected, rtol, atol, err_msg=f"{key} at step {step}")
    for key, p in params.items():
        assert p.dtype == dtype
        for kind, named in optimizer.state_dict()["state"].items():
            np.testing.assert_allclose(named[key], oracle.state[theirs[key]][kind].numpy(), rtol, atol)


def test_lars_follows_the_paper():
    """Algorithm 1 of You et al., written out with each layer by itself."""
    params = parameters()
    w = values(params)
    v = {name: np.zeros_like(a) for name, a in w.items()}
    optimizer = optim.LARS(params.items(), lr=2.0, momentum=0.9, weight_decay=0.05, trust_coefficient=0.01, eps=0.0)
    for step in range(20):
        lr = 2.0 * (1 - step / 20) ** 2
        train(optimizer, params, [step], lambda _, lr=lr: lr)
        for name, g in gradients(step).items():
            if g.ndim > 1 and g.size:
                local = 0.01 * np.linalg.norm(w[name]) / (np.linalg.norm(g) + 0.05 * np.linalg.norm(w[name]))
                v[name] = 0.9 * v[name] + lr * local * (g + 0.05 * w[name])
            else:
                v[name] = 0.9 * v[name] + lr * g
            w[name] = w[name] - v[name]
            np.testing.assert_allclose(params[name].data, w[name], rtol=1e-12, atol=1e-14)


def test_lars_moves_a_layer_that_starts_at_zero():
    p = Tensor(np.zeros((4, 4)), requires_grad=True)
    optimizer = optim.LARS([p], lr=0.5)
    p.backward(np.ones((4, 4)))
    optimizer.step()
    np.testing.assert_array_equal(p.data, -0.5)


@pytest.mark.parametrize(("name", "options"), ALL, ids=[*IDS, "LARS"])
def test_variants_and_bucket_sizes_agree_to_the_bit(name, options):
    results = []
    for policy, bucket_bytes in [("reference", SMALL), ("fastest", SMALL), ("fastest", 1 << 20)]:
        params = parameters(np.float32)
        with dispatch.using(policy, sum_of_squares="numba"):
            optimizer = getattr(optim, name)(params.items(), **options, bucket_bytes=bucket_bytes)
            train(optimizer, params, range(5), dtype=np.float32)
        results.append(values(params))
    assert_same(results[0], results[1])
    assert_same(results[1], results[2])


def test_learning_rate_of_one_step_and_of_groups():
    a, b = (Tensor(np.zeros(3), requires_grad=True) for _ in range(2))
    optimizer = optim.SGD([{"params": [("a", a)]}, {"params": b, "lr": 0.4}], lr=0.1)
    for lr, expected_a, expected_b in [(None, -0.1, -0.4), (1.0, -1.1, -4.4), (0.0, -1.1, -4.4), (None, -1.2, -4.8)]:
        optimizer.zero_grad()
        a.backward(np.ones(3))
        b.backward(np.ones(3))
        optimizer.step(lr)
        np.testing.assert_allclose(a.data, expected_a)
        np.testing.assert_allclose(b.data, expected_b)
    for wrong in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="lr must be"):
            optimizer.step(wrong)


def test_nan_gradient_is_seen():
    for name, options in ALL:
        params = parameters(np.float32)
        optimizer = getattr(optim, name)(params.items(), **options)
        train(optimizer, params, [0], dtype=np.float32)
        assert all(np.isfinite(p.data).all() for p in params.values())
        optimizer.zero_grad()
        params["fc.weight"].backward(np.full((16, 10), np.nan, np.float32))
        optimizer.step()
        assert np.isnan(params["fc.weight"].data).all()
        assert np.isfinite(params["conv.weight"].data).all()


# ------------------------------------------------------------------ missing gradients, buckets


@pytest.mark.parametrize(("name", "options"), ALL, ids=[*IDS, "LARS"])
def test_missing_gradient_is_zero(name, options):
    """Neither skipped, as in PyTorch, nor what an earlier step left in the bucket."""
    results = []
    for explicit in (False, True):
        params = parameters()
        optimizer = getattr(optim, name)(params.items(), **options)
        train(optimizer, params, [0])
        optimizer.zero_grad()
        params["fc.weight"].backward(gradients(1)["fc.weight"])
        if explicit:
            for key in params.keys() - {"fc.weight"}:
                params[key].backward(np.zeros(SHAPES[key]))
        optimizer.step()
        results.append(values(params))
    assert_same(*results)


def test_buckets_run_from_the_last_parameter_to_the_first():
    params = parameters()
    optimizer = optim.SGD(params.items(), lr=0.1, bucket_bytes=SMALL)
    names = [bucket.names for bucket in optimizer.buckets]
    assert names == [["fc.weight"], ["empty", "conv.bias", "scale"], ["conv.weight"]]  # of odd size is `scale`
    groups = optim.decay_groups(parameters().items(), 0.5)
    optimizer = optim.SGD(groups, lr=0.1, bucket_bytes=SMALL)
    names = [bucket.names for bucket in optimizer.buckets]
    assert names == [["fc.weight"], ["empty"], ["conv.weight"], ["conv.bias", "scale"]]  # the biases are complete last
    optimizer.zero_grad()
    optimizer.step()  # a gradient of zero: only the decay acts
    start = parameters()
    for bucket in optimizer.buckets:
        for name, p in zip(bucket.names, bucket.params, strict=True):
            np.testing.assert_allclose(p.data, start[name].data * (1 if p.ndim < 2 else 0.95))


def test_decay_groups_leaves_out_an_empty_group():
    params = parameters(shapes={"weight": (2, 2)})
    assert optim.decay_groups(params.items(), 0.1) == [{"params": list(params.items()), "weight_decay": 0.1}]


def test_gradients_may_live_in_memory_of_others():
    """As the averager lets them: slices of a window that is no array's own memory."""
    results = []
    for window in (False, True):
        params = parameters()
        optimizer = optim.SGD(params.items(), lr=0.1, bucket_bytes=SMALL)
        if window:
            memory = np.frombuffer(bytearray(8 * sum(bucket.size for bucket in optimizer.buckets)), np.float64)
            at = 0
            for bucket in optimizer.buckets:
                bucket.hold_grad_in(memory[at : at + bucket.size])
                at += bucket.size
        train(optimizer, params, range(3))
        results.append(values(params))
    assert_same(*results)


def test_frozen_parameters_are_left_alone():
    params = parameters()
    params["fc.weight"].requires_grad = False
    before = values(params)
    optimizer = optim.SGD(params.items(), lr=0.1, momentum=0.9, weight_decay=0.1)
    optimizer.step()
    assert "fc.weight" not in optimizer.state_dict()["state"]["momentum_buffer"]
    np.testing.assert_array_equal(params["fc.weight"].data, before["fc.weight"])
    assert not np.array_equal(params["conv.weight"].data, before["conv.weight"])


def test_mixed_precisions_never_share_a_bucket():
    a, b = Tensor(np.ones(3, np.float32), requires_grad=True), Tensor(np.ones(3), requires_grad=True)
    optimizer = optim.Adam([a, ("b", b)])
    a.backward(np.ones(3, np.float32))
    b.backward(np.ones(3))
    optimizer.step()
    assert [bucket.names for bucket in optimizer.buckets] == [["b"], ["0"]]
    assert (a.dtype, b.dtype) == (np.float32, np.float64)
    np.testing.assert_allclose(a.data, b.data, rtol=1e-6)


@pytest.mark.parametrize("what", ["data", "grad"])
def test_a_replaced_array_is_an_error(what):
    params = parameters()
    optimizer = optim.SGD(params.items(), lr=0.1)
    if what == "data":
        params["conv.bias"].data = np.zeros(8)
    else:
        params["conv.bias"].grad_buffer = np.zeros(8)
    with pytest.raises(ValueError, match=rf"'conv.bias' has left its bucket: its `{what}`"):
        optimizer.step()
    assert optimizer.steps == 0


def test_step_is_marked_for_the_profile(monkeypatch):
    seen = []

    class Recorder(dispatch.Recorder):
        def enter(self, name, kind):
            seen.append((name, kind))

        def leave(self, start, stop, **facts):
            seen.append(facts.get("variant"))

    params = parameters()
    optimizer = optim.SGD(params.items(), lr=0.1)
    monkeypatch.setattr(dispatch, "recorder", Recorder())
    optimizer.step()
    assert seen == [("update", "update"), ("sgd_update", "kernel"), "numba", None]


# ------------------------------------------------------------------ state


@pytest.mark.parametrize(("name", "options"), ALL, ids=[*IDS, "LARS"])
def test_state_travels_to_another_bucket_size(name, options):
    make = getattr(optim, name)
    unbroken = parameters()
    train(make(unbroken.items(), **options), unbroken, range(8))

    first = parameters()
    optimizer = make(first.items(), **options, bucket_bytes=SMALL)
    train(optimizer, first, range(4))
    state = optimizer.state_dict()
    assert state["step"] == 4
    for named in state["state"].values():
        assert {key: a.shape for key, a in named.items()} == {key: SHAPES[key] for key in named}

    second = parameters(seed=9)
    resumed = make(second.items(), **options, bucket_bytes=1)
    for key, p in second.items():
        p.data[...] = first[key].data
    resumed.load_state_dict(state)
    train(resumed, second, range(4, 8))
    assert_same(values(second), values(unbroken))


def test_wrong_state_is_refused_and_changes_nothing():
    params = parameters()
    optimizer = optim.SGD(params.items(), lr=0.1, momentum=0.9)
    train(optimizer, params, range(2))
    good = optimizer.state_dict()["state"]["momentum_buffer"]
    before = {name: a.copy() for name, a in good.items()}
    wrong = {name: np.zeros_like(a) for name, a in good.items() if name != "scale"}
    wrong.update({"conv.bias": np.zeros(9), "head.bias": np.zeros(3)})
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        optimizer.load_state_dict({"step": 7, "state": {"momentum_buffer": wrong}})
    for part in (
        "missing: momentum_buffer of scale ()",
        "unexpected: momentum_buffer of head.bias (3,)",
        "momentum_buffer of conv.bias: expected shape (8,), got (9,)",
    ):
        assert part in str(error.value)
    assert_same(good, before)
    assert optimizer.steps == 2
    for nonsense in ({}, {"step": 1}, {"steps": 1, "state": {}}, None):
        with pytest.raises(ValueError, match="keys 'step' and 'state'"):
            optimizer.load_state_dict(nonsense)
    with pytest.raises(ValueError, match=r"unexpected: momentum_buffer of conv\.weight"):
        optim.SGD(parameters().items(), lr=0.1).load_state_dict(optimizer.state_dict())


def test_sgd_without_momentum_has_no_state():
    assert optim.SGD(parameters().items(), lr=0.1).state_dict() == {"step": 0, "state": {}}


# ------------------------------------------------------------------ bad input


def test_wrong_parameters_are_refused():
    p, q = (Tensor(np.ones(2), requires_grad=True) for _ in range(2))
    frozen, leaf = Tensor(np.ones(2)), Tensor(np.ones(2), requires_grad=True)
    result = Tensor(np.ones(2), requires_grad=True)
    result.node = object()
    for params, kind, words in [
        ([], ValueError, "empty list"),
        ([{"params": [p]}, {"params": []}], ValueError, "empty list"),
        ([p, q, p], ValueError, "'2' was given already, as '0'"),
        ([("w", p), ("w", q)], ValueError, "two parameters have the name 'w'"),
        ([("1", p), q], ValueError, "two parameters have the name '1'"),
        ([{"params": [p]}, {"params": [p]}], ValueError, "given already"),
        ([{"params": [p], "speed": 1}], ValueError, "SGD has no hyper-parameter speed; it has: lr"),
        ([{"params": [p]}, q], TypeError, "holds only dicts"),
        ([{"weight_decay": 0.1}], TypeError, "with the key 'params'"),
        ([np.ones(2)], TypeError, "expected a Tensor or a pair"),
        (["w"], TypeError, "expected a Tensor or a pair"),
        ([frozen], ValueError, "none of the 1 parameters requires a gradient"),
        ([leaf, result], ValueError, "'1' is the result of an operation"),
        (p, TypeError, "iterable of parameters"),
        ({"w": p}, TypeError, "iterable of parameters"),
        (3, TypeError, "iterable of parameters"),
    ]:
        with pytest.raises(kind, match=words):
            optim.SGD(params, lr=0.1)


def test_wrong_hyper_parameters_are_refused():
    for make, options, words in [
        (optim.SGD, {"lr": -0.1}, "lr must be"),
        (optim.SGD, {"lr": math.nan}, "lr must be"),
        (optim.SGD, {"lr": 0.1, "weight_decay": -1}, "weight_decay must be"),
        (optim.SGD, {"lr": 0.1, "nesterov": True}, "nesterov needs a momentum"),
        (optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "nesterov": True}, "no dampening"),
        (optim.Adam, {"betas": (0.9, 1.0)}, "betas must be"),
        (optim.AdamW, {"betas": (0.9,)}, "betas must be"),
        (optim.Adagrad, {"eps": -1}, "eps must be"),
        (optim.LARS, {"trust_coefficient": -1}, "trust_coefficient must be"),
    ]:
        with pytest.raises(ValueError, match=words):
            make(parameters().values(), **options)
    with pytest.raises(ValueError, match="momentum must be"):
        optim.SGD([{"params": parameters().values(), "momentum": -1}], lr=0.1)
    with pytest.raises(ValueError, match="in proportion"):
        optim.SGD([{"params": parameters().values(), "lr": 0.1}], lr=0.0)


# ------------------------------------------------------------------ clipping and norms


@pytest.mark.parametrize("max_norm", [0.5, 1e3, 0.0])
def test_clip_grad_norm_equals_pytorch(max_norm):
    torch = pytest.importorskip("torch")
    params = parameters()
    optimizer = optim.SGD(params.items(), lr=0.1, bucket_bytes=SMALL)
    theirs = []
    for key, g in gradients(0).items():
        params[key].backward(g)
        theirs.append(torch.zeros(g.shape, dtype=torch.float64, requires_grad=True))
        theirs[-1].grad = torch.from_numpy(g.copy())
    norm = optim.clip_grad_norm_(optimizer.buckets, max_norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    np.testing.assert_allclose(norm, expected.item(), rtol=1e-14)
    for p, t in zip(params.values(), theirs, strict=True):
        np.testing.assert_allclose(p.grad, t.grad.numpy(), rtol=1e-14)


def test_clipping_counts_no_stale_gradient_and_shows_nan():
    params = parameters()
    optimizer = optim.SGD(params.items(), lr=0.1)
    train(optimizer, params, [0])
    optimizer.zero_grad()
    params["conv.bias"].backward(np.full(8, 2.0))
    np.testing.assert_allclose(optim.clip_grad_norm_(optimizer.buckets, math.inf), math.sqrt(8 * 4))
    np.testing.assert_array_equal(params["conv.bias"].grad, 2.0)
    params["conv.bias"].grad[3] = np.nan
    assert math.isnan(optim.clip_grad_norm_(optimizer.buckets, 1.0))
    assert np.isnan(params["fc.weight"].grad).all()
    for wrong in (-1.0, math.nan):
        with pytest.raises(ValueError, match="max_norm"):
            optim.clip_grad_norm_(optimizer.buckets, wrong)


def test_clip_grad_value():
    params = parameters()
    optimizer = optim.SGD(params.items(), lr=0.1)
    g = gradients(0)
    g["fc.weight"][0, 0] = np.nan
    for key in ("fc.weight", "conv.weight"):
        params[key].backward(g[key])
    optim.clip_grad_value_(optimizer.buckets, 0.25)
    np.testing.assert_array_equal(params["fc.weight"].grad, np.clip(g["fc.weight"], -0.25, 0.25))
    assert np.isnan(params["fc.weight"].grad[0, 0])
    np.testing.assert_array_equal(params["conv.bias"].grad, 0)
    with pytest.raises(ValueError, match="clip_value"):
        optim.clip_grad_value_(optimizer.buckets, -1)


def test_sum_of_squares_does_not_depend_on_threads():
    x = np.random.default_rng(0).standard_normal(200_001).astype(np.float32)
    before = threads.count()
    sums = set()
    try:
        for count in (1, 2, 2, 2):
            threads.limit(count)
            with dispatch.using("fastest"):
                sums.add(sum_of_squares(x))
    finally:
        threads.limit(before)
    assert len(sums) == 1
    np.testing.assert_allclose(sums.pop(), math.fsum(x.astype(np.float64) ** 2), rtol=1e-13)
    huge = np.full(10, 1e30, np.float32)  # its square is beyond float32
    for policy in ("reference", "fastest"):
        with dispatch.using(policy):
            np.testing.assert_allclose(sum_of_squares(huge), 1e61, rtol=1e-6)


def test_strided_arrays_go_to_the_reference():
    """An in-place update of a copy would be lost, so the fused variants decline; asking for one is an error."""
    rng = np.random.default_rng(0)
    memory, grad, buffer = (rng.standard_normal(20) for _ in range(3))
    expected = memory[::2] - 0.1 * (0.9 * buffer[::2] + grad[::2])
    sgd_update(memory[::2], grad[::2], buffer[::2], 0.1, 0.9)
    np.testing.assert_allclose(memory[::2], expected)
    with dispatch.using(adam_update="numba"), pytest.raises(dispatch.ChoiceError, match="cannot do this call"):
        adam_update(memory[::2], grad[::2], buffer[::2], grad[::2] ** 2, 1, 0.1)
