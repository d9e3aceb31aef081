"""What a device does, recorded once and then launched as a whole: a CUDA graph.

    graph = Graph("cuda")
    with graph.recording():
        y = model(x)            # nothing is computed: the stream writes down what it is given
    x[...] = images             # the arrays stay where they are, and so does `y`
    graph.launch()

A launch costs the host some microseconds, however many kernels there are. In return everything that is in the graph
stays what it was: which kernels, on which memory, with which numbers. What is to change from launch to launch (images,
labels, the learning rate) must lie in arrays of the device; and the host can neither look at a value nor send one.

The memory: all that is allocated while a graph is recorded comes of a pool of its own, and goes back to it when Python
lets go of it, for what is recorded later. Kernels of one stream run one after the other, so what the second writes the
first has read: the pool lays out what in other engines is planned ahead. Nobody else takes from that pool.

On the device `emulated` a graph is a list of what NumPy and the kernels would have done (kernels/emulated_array.py),
and it refuses what a GPU would refuse or, worse, do silently wrong. The path through CuPy was not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any
from weakref import WeakSet

from .. import emulated_array
from ..dispatch import DeviceError
from ..emulated_array import HostError

__all__ = ["Graph", "HostError"]

REFUSED = re.compile("stream ?capture", re.I)  # in the words of CUDA and of CuPy for what cannot be recorded


_graphs: WeakSet[Graph] = WeakSet()  # of a GPU


def pools() -> list[Any]:
    """Those from which the memory of graphs comes."""
    return [graph._memory for graph in _graphs]


class Graph:
    """Recorded once, launched often. `device` is "cuda" or "emulated"."""

    def __init__(self, device: str):
        if device not in ("cuda", "emulated"):
            raise DeviceError(
                f"a graph is of the device 'cuda' or 'emulated', got {device!r}; nc.capture() is the CPU's"
            )
        self.device = device
        self._recorded: Any = None
        self._memory: Any = None
        if device == "cuda":
            import cupy

            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._memory = cupy.cuda.MemoryPool()
            _graphs.add(self)

    @contextlib.contextmanager
    def warming_up(self) -> Iterator[None]:
        """Inside, work is done at once, with the memory and the stream of the recording that is to follow.

        A kernel is compiled when it is first used, and memory is taken of the driver: neither can be recorded.
        """
        if self.device == "emulated":
            yield
            return
        import cupy

        before = cupy.cuda.get_current_stream()
        self._stream.wait_event(before.record())
        with cupy.cuda.using_allocator(self._memory.malloc), self._stream:
            yield
        before.wait_event(self._stream.record())

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Inside, work is recorded and not done. Once; raises HostError on what depends on the device's values."""
        if self._recorded is not None:
            raise RuntimeError("a graph is recorded once: make another one")
        with self.warming_up():
            if self.device == "cuda":
                self._stream.begin_capture()
                try:
                    yield
                except BaseException as error:
                    with contextlib.suppress(Exception):  # of a recording that has failed there is none
                        self._stream.end_capture()
                    if REFUSED.search(f"{error}"):
                        raise HostError(f"while a graph was recorded: {error}") from error
                    raise
                self._recorded = self._stream.end_capture()
            else:
                if emulated_array.recording is not None:
                    raise RuntimeError("a graph is being recorded already")
                emulated_array.recording = []
                try:
                    yield
                    self._recorded = emulated_array.recording
                finally:
                    emulated_array.recording = None

    def launch(self) -> None:
        """Do what was recorded, after all that the current stream was given before."""
        if self._recorded is None:
            raise RuntimeError("nothing was recorded: launch() comes after `with graph.recording():`")
        if self.device == "cuda":
            import cupy

            self._recorded.launch(cupy.cuda.get_current_stream())
        else:
            emulated_array.make_up_for(self._recorded)

    def __len__(self) -> int:
        """Nodes, as far as they are known: on the emulator."""
        return len(self._recorded or ()) if self.device == "emulated" else 0
