"""What ranks ask of CuPy and NCCL, in which order and of which stream: on a stand-in, for want of several GPUs."""

from __future__ import annotations

import sys
import types

import numpy as np
import pytest
from stand_in import Array, forget, stand_in

from nanocnn.kernels.cuda import device
from nanocnn.kernels.dispatch import ChoiceError, DeviceError, using
from nanocnn.parallel import Alone, GradientAverager
from nanocnn.parallel.gpu import pick
from nanocnn.parallel.mpi import MPI
from nanocnn.parallel.nccl import NcclReducer, obstacle
from nanocnn.parallel.staged import GPUCopies


class Stream:
    """Says what is put into it, and gets `done` what a test lets it."""

    def __init__(self, said, name):
        self.said, self.name, self.ptr = said, name, 4000 + len(name)

    def record(self):
        self.said.append(f"{self.name}: event")
        return types.SimpleNamespace(of=self.name, done=True)

    def wait_event(self, event):
        self.said.append(f"{self.name}: wait for {event.of}")


class Ranks(MPI):
    """One of several ranks without MPI, whose answers a test knows."""

    def __init__(self, rank=0, size=2, answers=()):
        self.leader, self.rank, self.local_rank = 0, rank, rank
        self.size = self.local_size = size
        self.answers = answers
        self.waits = 0

    def all_gather_object(self, value):
        return [value, *self.answers] if isinstance(value, tuple) else [value] * self.size

    def broadcast_object(self, value, root=0):
        return value

    def wait_until(self, done, doing):
        self.waits += 1
        assert done()

    def at_leave(self, close):
        return lambda: None


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    cupy = stand_in(monkeypatch, tmp_path, gpus=2)
    said = cupy.said
    current = Stream(said, "current")
    cupy.cuda.get_current_stream = lambda: current

    def beside(non_blocking=False):
        assert non_blocking, "it would wait for the null stream, and that for it"
        return Stream(said, "beside")

    class Communicator:
        def __init__(self, ndev, comm_id, rank):
            said.append(f"join {comm_id} as {rank} of {ndev}")

        def allReduce(self, sendbuf, recvbuf, count, datatype, op, stream):
            assert sendbuf == recvbuf
            said.append(f"beside: sum of {count} of type {datatype} into {recvbuf}, op {op}, stream {stream}")

        def destroy(self):
            said.append("destroy")

    cupy.cuda.Stream = beside
    nccl = types.SimpleNamespace(available=True, get_unique_id=lambda: "id", NcclCommunicator=Communicator)
    nccl.NCCL_FLOAT32, nccl.NCCL_FLOAT64, nccl.NCCL_SUM = 7, 8, 0
    cupy.cuda.nccl = nccl
    yield cupy
    forget()


def test_nccl_sums_behind_what_has_filled_the_bucket(gpu):
    grads = Array((5,), "f4"), Array((0,), "f4"), Array((3,), "f8")
    buckets = [types.SimpleNamespace(grad=grad) for grad in grads]
    comm = Ranks(rank=0, size=2)
    reducer = NcclReducer(comm, buckets)
    for index in (2, 1, 0):
        reducer.leave(index)
        reducer.move()
    assert comm.waits == 0
    reducer.wait()
    reducer.close()
    a, b = grads[2].data.ptr, grads[0].data.ptr
    assert gpu.said == [
        "join id as 0 of 2",
        *("current: event", "beside: wait for current"),
        f"beside: sum of 3 of type 8 into {a}, op 0, stream 4006",
        *("current: event", "beside: wait for current"),
        f"beside: sum of 5 of type 7 into {b}, op 0, stream 4006",
        *("beside: event", "current: wait for beside", "destroy"),
    ]
    assert comm.waits == 1  # where a rank finds out that another has ended


@pytest.mark.parametrize(
    ("answers", "available", "why"),
    [
        ([((0, "0000:01:00.0"), "")], True, ""),
        ([((4, "0000:00:00.0"), "")], True, ""),  # the same number on another host
        ([((0, "0000:00:00.0"), "")], True, "ranks 0, 1 share a GPU"),
        ([((0, "0000:01:00.0"), "CuPy finds no NCCL")], True, "CuPy finds no NCCL"),
        ([((0, "0000:01:00.0"), "")], False, "pip install nvidia-nccl-cu13"),
    ],
)
def test_nccl_wants_a_gpu_for_each_rank(answers, available, why, gpu):
    gpu.cuda.nccl.available = available
    found = obstacle(Ranks(answers=answers))
    assert why in found
    assert bool(why) == bool(found)


def test_auto_takes_nccl_where_it_can(gpu):
    bucket = types.SimpleNamespace(grad=Array((5,)), data=Array((5,)), names=[], params=[])
    others = [((0, "0000:01:00.0"), "")]
    assert GradientAverager([bucket], Ranks(answers=others)).method == "nccl"
    gpu.cuda.nccl.available = False
    with using(reduce="nccl"), pytest.raises(ChoiceError, match=r"CuPy finds no NCCL.*reduce=staged can"):
        GradientAverager([bucket], Ranks(answers=others))
    with using(reduce="window"), pytest.raises(ChoiceError, match="cannot sum arrays of the device 'cuda'"):
        GradientAverager([bucket], Ranks(answers=others))


def test_staged_copies_wait_for_what_they_copy(gpu, monkeypatch):
    class Gradient(Array):
        def get(self, stream, out, blocking):
            assert not blocking
            gpu.said.append(f"{stream.name}: to the host")

        def set(self, host, stream):
            gpu.said.append(f"{stream.name}: back")

    pinned = types.SimpleNamespace(empty_pinned=lambda shape, dtype: np.empty(shape, dtype))
    monkeypatch.setitem(sys.modules, "cupyx", pinned)
    grad, copies = Gradient((5,)), GPUCopies()
    host = copies.memory(grad)
    assert (host.shape, host.dtype) == ((5,), np.float32)
    there = copies.fetch(grad, host)
    assert there.done
    copies.send(host, grad)
    copies.join()
    assert gpu.said == [
        *("current: event", "beside: wait for current", "beside: to the host", "beside: event"),
        *("beside: back", "beside: event", "current: wait for beside"),
    ]


def test_ranks_take_gpus_in_turn(gpu):
    assert pick(Ranks(rank=1, size=2)) == "rank 1 on GPU 1 of 2, NVIDIA H200"
    assert gpu.current == 1
    assert pick(Ranks(rank=2, size=3)).endswith("on GPU 0 of 2, NVIDIA H200; 3 ranks of this host share 2 GPUs")
    gpu.current = 1
    assert pick(Alone()) == "rank 0 on GPU 1 of 2, NVIDIA H200"  # alone, the one that is current
    device.check.cache_clear()
    gpu.cuda.runtime.getDeviceCount = lambda: 0
    with pytest.raises(DeviceError, match="no GPU that it shows"):
        pick(Alone())
