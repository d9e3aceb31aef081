"""kernels/multi_tensor.py: one launch for all buckets, a loss scale that needs no host, and the optimisers on both."""

from __future__ import annotations

import numpy as np
import pytest
from launch import NEEDS_GXX

from nanocnn.kernels.cuda.emulated import KernelError, counting
from nanocnn.kernels.cuda.launch import Kernel
from nanocnn.kernels.dispatch import DeviceError, to_device, using
from nanocnn.kernels.multi_tensor import (
    GOOD,
    SCALE,
    SKIPPED,
    STEP,
    found_nonfinite_,
    multi_adam_update,
    multi_sgd_update,
    update_scale_,
)
from nanocnn.kernels.update import sgd_update
from nanocnn.optim import SGD, Adam, AdamW, Optimizer
from nanocnn.tensor import Tensor

pytestmark = NEEDS_GXX


def on_emulator(*arrays):
    return [to_device(a, "emulated") for a in arrays]


# ------------------------------------------------------------------ the optimisers


def trained(cls, device, steps=3, **hyper):
    """Parameters and state after a few steps, two groups in several buckets."""
    rng = np.random.default_rng(0)
    params = [Tensor(rng.standard_normal(n).astype(np.float32), requires_grad=True).to(device) for n in (70, 3, 500, 9)]
    own = {"weight_decay": 0.1, "lr": 0.02} | ({"momentum": 0.0, "nesterov": False} if cls is SGD else {})
    groups = [{"params": params[:2], **own}, {"params": params[2:]}]
    optimizer = cls(groups, lr=0.1, bucket_bytes=400, **hyper)
    for lr in (0.1, 0.05, None)[:steps]:
        optimizer.zero_grad()
        for p in params[:3]:  # the last one receives none
            p.grad_buffer[...] = to_device(rng.standard_normal(p.shape).astype(np.float32), device)
            p.grad = p.grad_buffer
        optimizer.step(lr)
    return [p.numpy() for p in params], optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("cls", "hyper"),
    [
        (SGD, {}),
        (SGD, {"momentum": 0.9, "dampening": 0.3}),
        (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
        (Adam, {"weight_decay": 0.01}),
        (AdamW, {}),
    ],
    ids=str,
)
def test_optimisers_update_as_bucket_by_bucket(cls, hyper):
    primitive = cls.together
    primitive.ran.clear()
    together, state = trained(cls, "emulated", **hyper)
    assert primitive.ran == {"cuda"}
    for device, switch in (("emulated", "off"), ("cpu", "on")):
        with using(multi_tensor=switch):
            primitive.ran.clear()
            apart, other_state = trained(cls, device, **hyper)
            assert not primitive.ran
        for a, b in zip(together, apart, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
        assert state.keys() == other_state.keys()
        for kind, arrays in state.items():
            for name, array in arrays.items():
                np.testing.assert_allclose(array, other_state[kind][name], rtol=1e-5, atol=1e-6)


def test_one_launch_whatever_the_number_of_buckets():
    with counting() as report:
        trained(Adam, "emulated", steps=1)
    assert report.launches == {"multi_adam": 1}
    with counting() as report, using(multi_tensor="off"):
        trained(Adam, "emulated", steps=1)
    assert report.launches == {"adam": 3}


def test_a_rule_of_ones_own_is_not_passed_over():
    class Signs(SGD):
        def update(self, bucket, state, lr, **hyper):
            bucket.data -= lr * np.sign(bucket.grad)

    assert Signs.together is None
    assert SGD.together is multi_sgd_update
    assert Optimizer.together is None
    p = Tensor(np.zeros(3, np.float32), requires_grad=True).to("emulated")
    optimizer = Signs([p], lr=0.5)
    p.grad_buffer[...] = 7
    p.grad = p.grad_buffer
    optimizer.step()
    np.testing.assert_array_equal(p.numpy(), [-0.5] * 3)


# ------------------------------------------------------------------ steps with a loss scale


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_steps_with_a_loss_scale(device):
    """Against a loop in plain Python: which steps are made, what the scale becomes, what the weights are."""
    rng = np.random.default_rng(1)
    data = [rng.standard_normal(n).astype(np.float32) for n in (40, 300)]
    plain = [w.copy() for w in data]
    plain_buffers = [np.zeros_like(w) for w in data]
    control, hyper = np.array([0.0, 0, 2.0**10, 0, 0]), np.array([[1.0, 0.9, 0, 0.1, 0], [1.0, 0.9, 0, 0, 1]])
    found = np.zeros(1, np.int32)
    buffers = [np.zeros_like(w) for w in data]
    data, buffers = ([to_device(a, device) for a in held] for held in (data, buffers))
    control, hyper, found = (to_device(a, device) for a in (control, hyper, found))
    scale, good, made, skipped = 2.0**10, 0, 0, 0
    for step, bad in enumerate([None, np.inf, None, None, np.nan, -np.inf, None, None, None]):
        lr = 0.1 / (step + 1)
        gradients = [rng.standard_normal(w.shape).astype(np.float32) for w in plain]
        grads = [to_device((g * scale).astype(np.float32), device) for g in gradients]
        if bad is not None:
            grads[step % 2][step] = bad
        control[0] = lr  # all that the host says; the three calls ask it for nothing
        found_nonfinite_(grads, found)
        multi_sgd_update(control, hyper, data, grads, buffers, found)
        update_scale_(control, found, interval=2, floor=2.0**9)
        if bad is not None:
            scale, good, skipped = max(scale / 2, 2.0**9), 0, skipped + 1
        else:
            for w, g, v, (_, momentum, _, decay, nesterov) in zip(
                plain, gradients, plain_buffers, hyper.tolist(), strict=True
            ):
                sgd_update.__wrapped__(w, g, v, lr, momentum, 0.0, decay, bool(nesterov))
            good, made = good + 1, made + 1
            if good == 2:
                scale, good = scale * 2, 0
        assert found[0] == 0
        assert [control[i] for i in (SCALE, GOOD, STEP, SKIPPED)] == [scale, good, made, skipped]
        for w, p in zip(data, plain, strict=True):
            np.testing.assert_allclose(w, p, rtol=1e-5, atol=1e-6)
    assert (made, skipped, scale) == (6, 3, 2.0**10)


def test_a_skipped_step_reads_no_weights():
    arrays = [on_emulator(*np.ones((2, 1000), np.float32)) for _ in range(4)]
    control, hyper = on_emulator(np.array([0.1, 0, 1, 0, 0]), np.ones((2, 6)))
    with counting() as report:
        multi_adam_update(control, hyper, *arrays, found=to_device(np.ones(1, np.int32), "emulated"))
    assert report.total("global").bytes == 2 * 256 * 4  # the flag, by each thread


# ------------------------------------------------------------------ lists of arrays, as a kernel takes them


def test_what_a_kernel_does_beyond_an_array_of_a_list():
    kernel = Kernel("multi_tensor.cu", "found_nonfinite")
    a, b = on_emulator(np.zeros(8, np.float32), np.zeros(8, np.float32))
    chunks, sizes, found = on_emulator(np.array([[1, 0]], np.int32), np.array([8, 9]), np.zeros(1, np.int32))
    with (
        counting(),
        pytest.raises(
            KernelError, match=r"multi_tensor.cu:\d+: out of bounds: .* past the end of grads \(float32\[8\]\)"
        ),
    ):
        kernel((1,), (256,), chunks, sizes, [a, b], found)


def test_what_a_list_must_be():
    kernel = Kernel("multi_tensor.cu", "found_nonfinite")
    a, chunks, sizes = on_emulator(np.zeros(8, np.float32), np.zeros((1, 2), np.int32), np.array([8]))
    found = to_device(np.zeros(1, np.int32), "emulated")
    for given, error, message in [
        (a, TypeError, "grads is a list of arrays, got Emulated"),
        ([a, a.astype(np.float64)], TypeError, "grads points to float32; got float64"),
        ([a[::2]], TypeError, "grads points to float32; got float32, not C-contiguous"),
        ([np.zeros(8, np.float32)], DeviceError, r"needs arrays of one device.*got \['cpu', 'emulated'\]"),
    ]:
        with pytest.raises(error, match=message):
            kernel((1,), (256,), chunks, sizes, given, found)
