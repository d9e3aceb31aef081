"""A gradient overflows on the last rank alone: all ranks skip that step, and hold the same scale and weights."""

import sys
from pathlib import Path

import numpy as np

import nanocnn as nc
from nanocnn import nn
from nanocnn.data import Batch
from nanocnn.kernels.narrow import BFLOAT16
from nanocnn.parallel import GradientAverager, connect
from nanocnn.precision import LossScaler, NonFiniteGradient
from nanocnn.train import NonFiniteLoss, train_step

comm = connect(quiet=True)
rng = np.random.default_rng(comm.rank)
nc.use(precision="fp16")
nc.manual_seed(0)
model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 10))
optimizer = nc.optim.SGD(model.named_parameters(), 0.1)
averager = GradientAverager(optimizer.buckets, comm)


def batch(factor: float, step: int) -> Batch:
    """Images of which the last rank's are `factor` times as large."""
    x = rng.standard_normal((4, 2, 2, 3)).astype(np.float32) * (factor if comm.rank == comm.size - 1 else 1)
    return Batch(x, rng.integers(0, 10, 4), np.arange(4) + 4 * comm.rank, 4 * comm.size, 0, step)


def weights() -> np.ndarray:
    return np.concatenate([bucket.data for bucket in optimizer.buckets])


# The gradient of a layer's weights is as large as its input.
scaler = LossScaler(2.0**14)
decisions = []
for step, factor in enumerate((1, 3e3, 3e3, 1)):
    before, skipped = weights(), scaler.skipped
    train_step(model, batch(factor, step), optimizer, 0.0 if factor > 1 else 0.1, averager, scaler=scaler)
    decisions.append(scaler.skipped > skipped)
    assert scaler.skipped == skipped or (weights() == before).all()
assert decisions[0] is False, decisions
assert decisions[1] is True, decisions
for theirs in comm.all_gather_object((scaler.state_dict(), decisions, weights().tobytes())):
    assert theirs == (scaler.state_dict(), decisions, weights().tobytes())

# At the floor, and where the loss itself is not finite, it is an error on every rank that names the rank and the layer.
errors = []
for factor, kind in ((3e3, NonFiniteGradient), (6e5, NonFiniteLoss)):
    try:
        with np.errstate(all="ignore"):
            train_step(model, batch(factor, 9), optimizer, 0.0, averager, scaler=LossScaler(2.0**14, dynamic=False))
    except kind as error:
        errors.append(str(error))
assert len(errors) == 2, errors
assert f"on rank {comm.size - 1} is layer '3' (Linear): gradient of its parameters has" in errors[0], errors
assert f"on rank {comm.size - 1} is layer '0' (Flatten): input has" in errors[1], errors

# In bfloat16 a gradient as large is in range: the step is taken without a scale, by all ranks alike.
if BFLOAT16 is not None:
    before = weights()
    with nc.using(precision="bf16"):
        train_step(model, batch(3e3, 10), optimizer, 1e-6, averager)
    assert np.isfinite(weights()).all()
    assert (weights() != before).any()
    assert set(comm.all_gather_object(weights().tobytes())) == {weights().tobytes()}
if comm.rank == 0:
    Path(sys.argv[1]).write_text("all alike")
