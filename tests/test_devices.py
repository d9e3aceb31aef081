"""The same training on the device `emulated`: dispatch, modules, optimisers, the loop and the scripts."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
from launch import NEEDS_GXX, ROOT, alone, finish, mpiexec, start

import nanocnn as nc
from nanocnn.data import Batch
from nanocnn.kernels import dispatch
from nanocnn.kernels.cuda.emulated import counting
from nanocnn.kernels.dispatch import DEVICES, DeviceError, device_of, to_device, xp_of
from nanocnn.models import lenet5
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.train import evaluate, train_step

pytestmark = NEEDS_GXX


def batches(count=3, images=8):
    rng = np.random.default_rng(0)
    for step in range(count):
        x, y = rng.standard_normal((images, 28, 28, 1)).astype(np.float32), rng.integers(0, 10, images)
        yield Batch(x, y, np.arange(images), images, 0, step)


def trained(device):
    """LeNet after a few steps: losses, its evaluation, and its parameters on the CPU."""
    nc.manual_seed(0)
    model = lenet5().to(device)
    optimizer = nc.optim.SGD(model.named_parameters(), 0.05, momentum=0.9)
    averager = GradientAverager(optimizer.buckets, Alone())
    losses = [train_step(model, batch, optimizer, 0.05, averager).loss for batch in batches()]
    assert all(p.device == device for p in model.parameters())
    assert model.device == device
    return losses, evaluate(model, batches(1), 10, Alone()), model.state_dict()


def test_lenet_trains_alike_on_the_emulator():
    (losses, seen, weights), (other_losses, other_seen, others) = trained("cpu"), trained("emulated")
    np.testing.assert_allclose(other_losses, losses, rtol=1e-4)
    assert (other_seen.confusion == seen.confusion).all()
    for name, array in weights.items():
        np.testing.assert_allclose(others[name], array, rtol=1e-3, atol=1e-5, err_msg=name)


def test_cuda_kernels_do_the_work():
    for p in dispatch.primitives.values():
        p.ran.clear()
    trained("emulated")
    ran = dispatch.variants_that_ran()
    assert not [name for name, variants in ran.items() if "reference" in variants]
    assert ran["matmul"] == ["cublas"]
    assert {"conv2d", "conv2d_grad_x", "conv2d_grad_w", "max_pool2d", "cross_entropy", "multi_sgd_update"} <= set(ran)


def test_a_step_is_without_faults():
    """All kernels of a step, each access checked."""
    model = lenet5().to("emulated")
    batch = next(batches(1, images=2))
    with counting() as report:
        loss = nc.functional.cross_entropy(model(nc.Tensor(batch.x).to("emulated")), to_device(batch.y, "emulated"))
        loss.backward()
    assert report.launches
    assert all(p.grad is not None and device_of(p.grad) == "emulated" for p in model.parameters())


def test_what_numpy_makes_for_the_emulator_is_of_the_emulator():
    x = to_device(np.ones((2, 3), np.float32), "emulated")
    xp = xp_of(x)
    for made in (xp.zeros(3), xp.empty_like(x), xp.where(x > 0, x, 0), xp.arange(4), *xp.divmod(x, 2), xp.pad(x, 1)):
        assert device_of(made) == "emulated"
    assert xp.float32 is np.float32
    assert xp.pi == np.pi


def test_a_place_that_is_taken_twice_gets_both_gradients():
    x = nc.Tensor(to_device(np.arange(3.0), "emulated"), requires_grad=True)
    x[np.array([2, 0, 2])].sum().backward()
    np.testing.assert_array_equal(x.grad, [1, 0, 2])
    assert device_of(x.grad) == "emulated"


def test_arrays_of_two_devices():
    x = np.ones((2, 3), np.float32)
    with pytest.raises(DeviceError, match=r"Add was given arrays of two devices, cpu and emulated: .*to\('cpu'\)"):
        nc.Tensor(x) + nc.Tensor(x).to("emulated")
    model = lenet5().to("emulated")
    with pytest.raises(DeviceError, match="arrays of two devices"):
        model(nc.Tensor(np.ones((1, 28, 28, 1), np.float32)))


def test_a_script_trains_on_the_emulator_alone_and_with_two_ranks_alike(tmp_path):
    words = (
        "--data shapes --device emulated --width 0.05 --epochs 1 --train-images 32 --batch-size 16 --val 0 --ema 0.9"
    )
    command = [
        sys.executable,
        str(ROOT / "experiments" / "alexnet_cifar.py"),
        *words.split(" "),
        "--runs",
        str(tmp_path),
    ]
    jobs = [start([*command, "--name", "one"]), start([mpiexec(), "-n", "2", *command, "--name", "two"])]
    for job in jobs:
        outcome = finish(job, timeout=300)
        assert outcome.status == 0, outcome.output
        assert "test images of shapes" in outcome.output
    one, two = (json.loads((tmp_path / name / "result.json").read_text()) for name in ("one", "two"))
    assert (one["ranks"], two["ranks"]) == (1, 2)
    for figure in ("loss", "train_accuracy", "test_loss", "test_accuracy"):
        assert two["history"][0][figure] == pytest.approx(one["history"][0][figure], rel=1e-4), figure


def test_a_script_says_what_a_device_lacks():
    help_text = alone(ROOT / "experiments" / "alexnet_cifar.py", "--help").output
    assert all(name in help_text for name in DEVICES)
    outcome = alone(ROOT / "experiments" / "alexnet_cifar.py", "--device", "cuda", CUDA_VISIBLE_DEVICES="")
    assert outcome.status == 2
    assert "--device cuda: cannot use the device 'cuda'" in outcome.output
    assert "To do: " in outcome.output
