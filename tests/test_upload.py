"""Batches on their way to a GPU: on a machine that does not have one, with streams that are as late as they may be."""

from __future__ import annotations

import random
import sys
import types

import numpy as np
import pytest

import nanocnn as nc
from nanocnn.kernels.cuda.upload import Uploads
from nanocnn.kernels.dispatch import device_of


class Machine:
    """Streams of work that is done as late, or in as odd an order, as waits allow. `seed` says which."""

    def __init__(self, seed):
        self.streams, self.random = [], random.Random(seed)

    def stream(self):
        made = Stream(self)
        self.streams.append(made)
        return made

    def advance(self, until):
        """Do pieces of work of streams that may go on, in any order, until `until()`."""
        while not until():
            able = [s for s in self.streams if s.work and s.work[0][0]()]
            assert able, "all streams wait for each other"
            self.random.choice(able).work.pop(0)[1]()


class Stream:
    def __init__(self, machine):
        self.machine, self.work = machine, []

    def add(self, do, when=lambda: True):
        self.work.append((when, do))

    def record(self):
        event = Event(self.machine)
        self.add(event.happen)
        return event

    def wait_event(self, event):
        self.add(lambda: None, lambda: event.done)


class Event:
    def __init__(self, machine):
        self.machine, self.done = machine, False

    def happen(self):
        self.done = True

    def synchronize(self):
        self.machine.advance(lambda: self.done)


class DeviceArray(np.ndarray):
    def set(self, host, stream):
        stream.add(lambda: np.copyto(self, host))  # reads the host's memory when its turn comes


@pytest.fixture
def machine(monkeypatch, request):
    """Stands in for the parts of CuPy that upload.py uses. Returns the machine and its stream of kernels."""
    made = Machine(request.param)
    kernels = made.stream()
    cupy, cupyx = types.ModuleType("cupy"), types.ModuleType("cupyx")
    cupy.empty = lambda shape, dtype: np.zeros(shape, dtype).view(DeviceArray)
    cupy.cuda = types.SimpleNamespace(Stream=lambda non_blocking: made.stream(), get_current_stream=lambda: kernels)
    cupyx.empty_pinned = np.empty
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupyx", cupyx)
    return made, kernels


SIZES = 4, 4, 4, 2, 4, 2, 2, 4, 4, 1


def batches():
    for i, size in enumerate(SIZES):
        yield np.full((size, 3), i, np.float32), np.full(size, 100 + i)


@pytest.mark.parametrize("machine", range(20), indirect=True)
def test_kernels_find_their_batch_whatever_comes_late(machine):
    """Kernels read a batch late, copies run late, and buffers are used again and again."""
    made, kernels = machine
    seen = []
    for x, y in Uploads("cuda").ahead(batches()):
        kernels.add(lambda x=x, y=y: seen.append((x.copy(), y.copy())))
    made.advance(lambda: not kernels.work)
    assert len(seen) == len(SIZES)
    for (x, y), (want_x, want_y) in zip(seen, batches(), strict=True):
        np.testing.assert_array_equal(x, want_x)
        np.testing.assert_array_equal(y, want_y)


@pytest.mark.parametrize("machine", [0], indirect=True)
def test_buffers_are_used_again(machine):
    uploads = Uploads("cuda")
    places = [id(x) for _ in range(3) for x, _ in uploads.ahead(batches())]
    assert len(set(places)) == 2 * len(set(SIZES))


@pytest.mark.parametrize("machine", [0], indirect=True)
def test_the_next_batch_is_on_its_way_before_this_one_is_used(machine):
    sent = []

    def counted():
        for batch in batches():
            sent.append(batch)
            yield batch

    ahead = Uploads("cuda").ahead(counted())
    next(ahead)
    assert len(sent) == 2


@pytest.mark.parametrize(("device", "choice"), [("emulated", "on"), ("emulated", "off"), ("cpu", "on")])
def test_without_a_gpu_there_is_nothing_to_overlap(device, choice):
    with nc.using(pinned=choice):
        found = list(Uploads(device).ahead(batches()))
    assert len(found) == len(SIZES)
    for (x, y), (want_x, want_y) in zip(found, batches(), strict=True):
        assert device_of(x) == device_of(y) == device
        np.testing.assert_array_equal(x, want_x)
        np.testing.assert_array_equal(y, want_y)
