"""Ranks whose arrays lie on the device `emulated`: sums, weights, statistics, averages: equal to one process."""

import numpy as np
import pytest

import nanocnn as nc
from nanocnn.data import Batch
from nanocnn.ema import EMA
from nanocnn.kernels.dispatch import ChoiceError, device_of, using
from nanocnn.parallel import Alone, GradientAverager, average_buffers, broadcast_parameters, connect
from nanocnn.train import evaluate, train_step

SAMPLES = 12
comm = connect(quiet=True)
size, rank = comm.size, comm.rank


def network(seed, device):
    """Without batch norm, which would see the ranks' parts one by one."""
    nc.manual_seed(seed)
    layers = nc.nn.Conv2d(1, 4, 3), nc.nn.ReLU(), nc.nn.MaxPool2d(2), nc.nn.Flatten(), nc.nn.Linear(4 * 9, 5)
    return nc.nn.Sequential(*layers).to(device)


def batches(steps, comm):
    rank, size = comm.rank, comm.size
    rng = np.random.default_rng(7)
    for step in range(steps):
        x, y = rng.standard_normal((SAMPLES, 8, 8, 1)).astype(np.float32), rng.integers(0, 5, SAMPLES)
        cuts = [0, *np.sort(rng.integers(1, SAMPLES, 3))[: size - 1], SAMPLES]  # unequal parts
        part = slice(*cuts[rank : rank + 2])
        yield Batch(x[part], y[part], np.arange(SAMPLES)[part], SAMPLES, 0, step)


def trained(device, comm=comm):
    """Parameters after four steps, and the average of the weights; the loss of an evaluation."""
    model = network(seed=comm.rank, device=device)  # only rank 0's count
    optimizer = nc.optim.SGD(model.named_parameters(), 0.1, momentum=0.9, bucket_bytes=300)
    assert len(optimizer.buckets) > 1
    averager = GradientAverager(optimizer.buckets, comm)
    broadcast_parameters(optimizer.buckets, model.named_buffers(), comm)
    ema = EMA(optimizer.buckets, 0.9)
    for batch in batches(4, comm):
        train_step(model, batch, optimizer, 0.1, averager)
        ema.update()
    assert {device_of(b.grad) for b in optimizer.buckets} == {device}
    with ema.applied():
        averaged = model.state_dict()
    seen = evaluate(model, batches(1, comm), 5, comm)
    method, state = averager.method, model.state_dict()
    averager.close()
    return method, {**state, **{f"average of {k}": v for k, v in averaged.items()}, "loss": np.array(seen.loss)}


# ---------------------------------------------------------------- every way, and the CPU's

results = {}
for reduce in ("auto", "staged"):
    for overlap in ("on", "off"):
        with using(reduce=reduce, overlap=overlap):
            method, results[reduce, overlap] = trained("emulated")
            assert method == "staged"
for theirs in comm.all_gather_object(results):
    for way, arrays in results.items():
        for name, array in arrays.items():
            np.testing.assert_array_equal(theirs[way][name], array, err_msg=f"{way} {name}")  # ranks agree to the bit
            np.testing.assert_allclose(array, results["auto", "on"][name], rtol=1e-5, atol=1e-6)
for other in (trained("emulated", Alone()), trained("cpu")):  # one process with the whole batch; ranks on the CPU
    for name, array in other[1].items():
        np.testing.assert_allclose(results["auto", "on"][name], array, rtol=1e-4, atol=1e-5, err_msg=name)
assert np.isfinite(results["auto", "on"]["loss"])

# ---------------------------------------------------------------- running statistics

both = []
for device in ("cpu", "emulated"):
    norm = nc.nn.Sequential(nc.nn.BatchNorm2d(3)).to(device)
    for _, buffer in norm.named_buffers():
        values = np.random.default_rng(rank).random(buffer.data.shape) + rank
        buffer.data[...] = values.astype(buffer.data.dtype)
    average_buffers(norm.named_buffers(), comm, samples=rank + 1)
    assert all(device_of(buffer.data) == device for _, buffer in norm.named_buffers())
    both.append({name: np.array(buffer.data) for name, buffer in norm.named_buffers()})
for name, array in both[0].items():
    np.testing.assert_array_equal(both[1][name], array, err_msg=name)

# ---------------------------------------------------------------- what must not be

for device, reduce, found in (
    ("emulated", "window", "cannot sum arrays of the device 'emulated'; what can: staged, nccl"),
    ("emulated", "nccl", "reduce=nccl cannot be had: the device 'emulated' is no GPU; reduce=staged can"),
    ("cpu", "staged", "cannot sum arrays of the device 'cpu'; what can: window, iallreduce, allreduce"),
):
    buckets = nc.optim.SGD(network(0, device).named_parameters(), 0.1).buckets
    with using(reduce=reduce), pytest.raises(ChoiceError, match=found):
        GradientAverager(buckets, comm)
buckets = nc.optim.SGD(network(0, "cpu" if rank else "emulated").named_parameters(), 0.1).buckets
with pytest.raises(ValueError, match="differ in device"):
    GradientAverager(buckets, comm)

if rank == 0:
    print("all checked")
