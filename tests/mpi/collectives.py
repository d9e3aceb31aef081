"""Every call of Comm, checked on every rank."""

import sys
from typing import Any

import numpy as np
import pytest
import threadpoolctl

from nanocnn.kernels import threads
from nanocnn.parallel import average_buffers, broadcast_parameters, connect
from nanocnn.parallel.mpi import CHUNK_BYTES

comm = connect()
assert connect() is comm
size, rank = int(sys.argv[1]), comm.rank
assert (comm.size, comm.local_size, comm.local_rank) == (size, size, rank)
assert len(comm.hosts) == 1


# Threads: BLAS and Numba alike, the cores divided among the ranks.
expected = max(1, threads.cores() // size)
assert comm.threads == threads.count() == expected, (comm.threads, threads.count(), expected)
pools = [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]
assert pools == [expected] * len(pools), pools

# Sums, in place: dtypes, more than one chunk, nothing at all, non-contiguous.
a: Any
dtype: Any
for dtype in (np.int32, np.int64, np.float32, np.float64):
    a = np.arange(6, dtype=dtype).reshape(2, 3) * (rank + 1)
    assert comm.all_reduce(a) is a
    np.testing.assert_array_equal(a, np.arange(6).reshape(2, 3) * (size * (size + 1) // 2))
a = np.full(CHUNK_BYTES // 4 * 2 + 5, rank, np.float32)
comm.all_reduce(a)
assert (a == size * (size - 1) // 2).all()
comm.all_reduce(np.empty((0, 3), np.float32))
assert comm.all_reduce(np.array(2.0)) == 2 * size
a = np.ones((4, 6), np.float32)
comm.all_reduce(a[:, ::2])
np.testing.assert_array_equal(a[:, ::2], size)
np.testing.assert_array_equal(a[:, 1::2], 1)
with pytest.raises(TypeError, match="cannot sum bool"):
    comm.all_reduce(np.ones(2, bool))
with pytest.raises(TypeError, match="cannot sum float16"):
    comm.all_reduce(np.ones(2, np.float16))
with pytest.raises(TypeError, match=r"NumPy arrays, got builtins\.list"):
    comm.all_reduce([1.0])  # type: ignore[arg-type]


class Ndarray:  # what a CuPy array looks like from outside
    __module__ = "cupy"


with pytest.raises(TypeError, match=r"cupy\.Ndarray: copy it to the CPU"):
    comm.broadcast(Ndarray())  # type: ignore[arg-type]

# Broadcasts: any root, dtype and shape.
for root in {0, size - 1}:
    for dtype in (bool, np.uint8, np.float16, np.float32, np.int64):
        a = np.full((3, 2), rank + 1).astype(dtype)
        assert comm.broadcast(a, root) is a
        np.testing.assert_array_equal(a, np.full((3, 2), root + 1).astype(dtype))
a = np.full(3 * CHUNK_BYTES + 7, rank + 3, np.uint8)
comm.broadcast(a)
assert (a == 3).all()
a = np.full((4, 6), rank + 3.0)
comm.broadcast(a[::2, ::3])
assert (a[::2, ::3] == 3).all()
assert (a[1] == rank + 3).all()
a = np.array(rank + 3)
comm.broadcast(a)
assert a == 3
comm.broadcast(np.empty(0, np.float32))
with pytest.raises(TypeError, match="Python objects"):
    comm.broadcast(np.array([None]))
with pytest.raises(ValueError, match=f"no rank {size}"):
    comm.broadcast(a, size)

# Objects and flags.
assert comm.all_gather_object({"rank": rank, "much": "x" * 1000 * rank}) == [
    {"rank": r, "much": "x" * 1000 * r} for r in range(size)
]
assert comm.broadcast_object(("from", rank), size - 1) == ("from", size - 1)
assert comm.any(rank == size - 1) is True
assert comm.any(False) is False
comm.barrier()


# The same start everywhere, and running statistics that agree.
class Holder:
    def __init__(self, data):
        self.data = data


buffers = [("bn.running_mean", Holder(np.full(3, rank, np.float32))), ("count", Holder(np.array(7 + rank)))]
bucket: Any = Holder(np.full(5, rank, np.float32))
broadcast_parameters([bucket], buffers, comm)
assert not bucket.data.any()
assert not buffers[0][1].data.any()
assert buffers[1][1].data == 7

rng = np.random.default_rng(0)
parts = [rng.normal(r, 1 + r, (10 * (r + 1), 3)) for r in range(size)]
together = np.concatenate(parts)
own = parts[rank]
buffers = [
    ("bn.running_mean", Holder(own.mean(0).astype(np.float32))),
    ("bn.running_var", Holder(own.var(0).astype(np.float32))),
    ("bn.num_batches_tracked", Holder(np.array(5 + rank))),
    ("running_var", Holder(np.array([1.0 + rank]))),  # no mean beside it: an ordinary number
]
average_buffers(iter(buffers), comm, samples=len(own))
mean, var, count, plain = (holder.data for _, holder in buffers)
np.testing.assert_allclose(mean, together.mean(0), rtol=1e-6)
np.testing.assert_allclose(var, together.var(0), rtol=1e-6)
assert count == 5
weights = np.arange(1, size + 1)
np.testing.assert_allclose(plain, (weights * weights).sum() / weights.sum())
for other in comm.all_gather_object([mean, var]):
    np.testing.assert_array_equal(other, [mean, var])  # to the bit
if size > 1:
    with pytest.raises(ValueError, match="no rank has seen a sample"):
        average_buffers(buffers, comm, samples=0)

if rank == 0:
    print("all checked:", comm.describe())
