"""A recorded step of several ranks (graph=on) goes the way of the eager one, bit by bit: on the CPU and `emulated`."""

import sys

import numpy as np

import nanocnn as nc
from nanocnn import capture_on_device, nn, train
from nanocnn.data import Batch
from nanocnn.kernels.dispatch import device_of, using
from nanocnn.parallel import GradientAverager, broadcast_parameters, connect
from nanocnn.precision import LossScaler
from nanocnn.recorded_step import RecordedBackward
from nanocnn.train import train_step

comm = connect(quiet=True)
devices = sys.argv[1:]


class Net(nn.Module):
    """With masks; with batch norm, whose statistics are a rank's own; with a layer that the last rank alone uses."""

    def __init__(self):
        self.conv, self.norm, self.drop = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2)
        self.extra, self.head = nn.Linear(8 * 9, 8 * 9), nn.Linear(8 * 9, 5)

    def forward(self, x):
        x = self.drop(nc.functional.max_pool2d(self.norm(self.conv(x), relu=True), 2)).reshape(len(x), 8 * 9)
        return self.head(self.extra(x) if comm.rank == comm.size - 1 else x)


def batches(steps):
    """Unequal parts; other sizes at the third step; at the fifth the first rank has no images."""
    rng = np.random.default_rng(7)
    for step in range(steps):
        samples = 24 if step != 2 else 14
        x, y = rng.standard_normal((samples, 8, 8, 1)).astype(np.float32), rng.integers(0, 5, samples)
        first = 0 if step == 4 else 5
        cuts = [0, *np.linspace(first, samples, comm.size).astype(int)]
        part = slice(*cuts[comm.rank : comm.rank + 2])
        yield Batch(x[part], y[part], np.arange(samples)[part], samples, 0, step)


def trained(device, graph, precision="fp32", optimizer="SGD", **more):
    """Weights, statistics, the optimiser's state, and what each step told; the scaler."""
    nc.manual_seed(0)
    model = Net().to(device)
    with using(graph=graph, precision=precision):
        rule = getattr(nc.optim, optimizer)(model.named_parameters(), 0.1, bucket_bytes=1000)
        averager = GradientAverager(rule.buckets, comm)
        broadcast_parameters(rule.buckets, model.named_buffers(), comm)
        assert len(rule.buckets) > 1
        scaler = LossScaler(2.0**30, backoff=2.0**-9, interval=2) if precision == "fp16" else train.UNSCALED
        told = [train_step(model, b, rule, 0.1, averager, scaler=scaler, **more) for b in batches(6)]
        if device != "cpu" and graph == "on":
            rule.zero_grad()  # the flags that say what has arrived are Python's: a recording does not depend on them
            told += [train_step(model, b, rule, 0.1, averager, scaler=scaler, **more) for b in batches(1)]
        elif device != "cpu":
            told += [train_step(model, b, rule, 0.1, averager, scaler=scaler, **more) for b in batches(1)]
    method = averager.method
    recording = train._recordings.get(model, (None, None))[1]
    assert isinstance(recording, RecordedBackward) == (graph == "on")
    if graph == "on" and device != "cpu":
        assert isinstance(recording._work, capture_on_device.CapturedOnDevice)
    averager.close()
    assert {device_of(p.data) for p in model.parameters()} == {device}
    arrays = {name: np.array(x) for name, x in model.state_dict().items()}
    for kind, held in rule.state_dict()["state"].items():
        arrays |= {f"{kind} of {name}": np.array(x) for name, x in held.items()}
    return arrays, told, scaler, method


def compare(device, expected_method=None, **how):
    (eager, told, scaler, method), (recorded, other_told, other_scaler, _) = (
        trained(device, graph, **how) for graph in ("off", "on")
    )
    assert expected_method in (None, method)
    assert told == other_told
    assert scaler.state_dict() == other_scaler.state_dict()
    if how.get("precision") == "fp16":
        assert 0 < scaler.skipped < 4, scaler.skipped
    for name, array in eager.items():
        np.testing.assert_array_equal(recorded[name], array, err_msg=f"{device} {how} {name}")
    weights = [name for name in eager if "running" not in name]
    for theirs in comm.all_gather_object({name: recorded[name] for name in weights}):
        for name in weights:
            np.testing.assert_array_equal(theirs[name], recorded[name], err_msg=f"ranks: {device} {how} {name}")


if "cpu" in devices:
    for reduce in ("window", "iallreduce", "allreduce"):
        with using(reduce=reduce):
            compare("cpu", reduce)
    compare("cpu", precision="fp16")
    compare("cpu", optimizer="Adam", clip=0.1)
if "emulated" in devices:
    compare("emulated", "staged")
    compare("emulated", precision="fp16", optimizer="AdamW")
    with using(overlap="off"):
        compare("emulated", optimizer="LARS", clip=0.1)
if comm.rank == 0:
    print("all alike")
