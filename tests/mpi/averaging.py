"""GradientAverager: sums, orders of arrival, missing gradients, weights; then training, whose result goes to a file."""

import itertools
import sys

import numpy as np
import pytest
import tiny

import nanocnn.parallel.window as window
from nanocnn.buckets import make_buckets
from nanocnn.kernels.dispatch import ChoiceError, using
from nanocnn.parallel import GradientAverager, broadcast_parameters, connect
from nanocnn.tensor import Tensor

comm = connect(quiet=True)
size, rank = comm.size, comm.rank
WAYS = list(itertools.product(("auto", "window", "iallreduce", "allreduce"), ("on", "off")))


# ---------------------------------------------------------------- sums, whatever arrives, in whatever order

shapes = [(300, 70), (11,), (1,), (64, 3, 5), (2, 2), (1000,), (0,), (513,)]
dtypes = [np.float32] * 5 + [np.float64] * 3
named = [
    (f"p{i}", Tensor(np.zeros(s, t), requires_grad=True)) for i, (s, t) in enumerate(zip(shapes, dtypes, strict=True))
]
named.append(("frozen", Tensor(np.zeros(3, np.float32))))
buckets = make_buckets(named, 4000)
assert len(buckets) > 4
averager = GradientAverager(buckets, comm)
own = np.random.default_rng(rank)  # each rank its own order and its own missing gradients
common = np.random.default_rng(99)
for step, (reduce, overlap) in enumerate(WAYS * 3):
    with using(reduce=reduce, overlap=overlap):
        everybodys = [[common.standard_normal(p.shape).astype(p.dtype) for _, p in named] for _ in range(size)]
        arrives = [[common.random() < 0.8 and p.requires_grad for _, p in named] for _ in range(size)]
        if step == 3:
            arrives[-1] = [False] * len(named)  # a rank without samples
        averager.zero()
        for i in own.permutation(len(named)):
            if arrives[rank][i]:
                named[i][1].backward(everybodys[rank][i])
                named[i][1].on_grad and named[i][1].on_grad(named[i][1])  # a bare leaf has no graph that would
        if reduce != "allreduce" or overlap == "off":
            comm.barrier()  # a call of the script's own, while some ranks have sent more buckets than others
        averager.finish()
        assert averager.method == ("none" if size == 1 else "window" if reduce == "auto" else reduce)
        for i, (name, p) in enumerate(named):
            total = np.zeros(p.shape, p.dtype)
            for r in range(size):  # in the order of ranks, as the window sums: the same bits
                total += everybodys[r][i] if arrives[r][i] else 0
            if averager.method == "window":
                np.testing.assert_array_equal(p.grad, total, err_msg=f"{name} {reduce} {overlap}")
            np.testing.assert_allclose(p.grad, total, rtol=1e-5, atol=1e-6, err_msg=f"{name} {reduce} {overlap}")
assert averager.seconds > 0 or size == 1

# Closing gives the gradients private memory, with what was in it.
before = [p.grad.copy() for _, p in named]
averager.close()
averager.close()
for (_, p), g in zip(named, before, strict=True):
    np.testing.assert_array_equal(p.grad, g)
    assert p.on_grad is None

# ---------------------------------------------------------------- what must not be

if size > 1:
    p = Tensor(np.zeros(3, np.float32), requires_grad=True)
    q = Tensor(np.zeros(3 + rank, np.float32), requires_grad=True)
    with pytest.raises(ValueError, match="differ in buckets"):
        GradientAverager(make_buckets([("q", q)]), comm)
    with using(overlap="off" if rank else "on"), pytest.raises(ValueError, match="differ in overlap"):
        GradientAverager(make_buckets([("p", p)]), comm)

    window.free_bytes, truth = (lambda: 10), window.free_bytes
    averager = GradientAverager(make_buckets([("p", p)]), comm)
    assert averager.method == "iallreduce"
    with using(reduce="window"), pytest.raises(ChoiceError, match="--shm-size"):
        averager.zero()
    window.free_bytes = truth
    averager.close()

# ---------------------------------------------------------------- several backward passes in a step

named = tiny.parameters()
averager = GradientAverager(make_buckets(named, 2000), comm)
x, t = tiny.batch(0)
averager.zero()
with averager.no_sync():
    tiny.loss(named, x, t, 1 / size).backward()
tiny.loss(named, x, t, 1 / size).backward()
averager.finish()
single = tiny.parameters()
tiny.loss(single, x, t, 2).backward()
for (_, p), (_, s) in zip(named, single, strict=True):
    if size > 1:  # alone, a second backward is nobody's business
        np.testing.assert_allclose(p.grad, 0 if s.grad is None else s.grad, rtol=1e-5, atol=1e-6)
averager.zero()
tiny.loss(named, x, t, 1 / size).backward()
if size > 1:
    with pytest.raises(RuntimeError, match="no_sync"):
        tiny.loss(named, x, t, 1 / size).backward()
averager.finish()
averager.close()

# ---------------------------------------------------------------- 20 steps, unequal batches, every way

results = {}
for reduce, overlap in WAYS:
    with using(reduce=reduce, overlap=overlap):
        named = tiny.parameters(seed=rank)  # only rank 0's count
        buckets = make_buckets(named, 2000)
        broadcast_parameters(buckets, [], comm)
        averager = GradientAverager(buckets, comm)
        for step in range(tiny.STEPS):
            x, t = tiny.batch(step)
            cuts = np.sort(np.random.default_rng(step).integers(0, tiny.SAMPLES + 1, size - 1))
            if step == 7:
                cuts[:] = 0  # all ranks but the last have nothing
            part = slice(*[0, *cuts, tiny.SAMPLES][rank : rank + 2])
            averager.zero()
            if len(x[part]):
                tiny.loss(named, x[part], t[part], averager.weight(len(x[part]), tiny.SAMPLES)).backward()
            averager.finish()
            for bucket in buckets:
                bucket.data -= np.float32(tiny.LR) * bucket.grad
        averager.close()
        results[reduce, overlap] = np.concatenate([p.data.ravel() for _, p in named])
for other in comm.all_gather_object(results):
    for way in WAYS:
        np.testing.assert_array_equal(other[way], results[way])  # ranks agree to the bit
np.testing.assert_array_equal(results["window", "on"], results["window", "off"])
for way in WAYS:
    np.testing.assert_allclose(results[way], results["allreduce", "off"], atol=1e-5)
if rank == 0:
    np.save(sys.argv[1], results["auto", "on"])
    print("all checked")
