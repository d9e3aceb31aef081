"""Sums of gradients that lie on a device, through the host's memory: for ranks without NCCL, or that share a GPU.

A bucket that leaves is copied to the host, on a stream of its own while backward goes on; when it is there, MPI sums
it; and it is copied back. The host's buffers are pinned: only from such memory does a GPU copy while it computes.

On the device `emulated`, where the tests run it, a copy is done at once. The copies of a GPU are not yet run on one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..buckets import Bucket
from ..kernels.dispatch import device_of, to_device
from .mpi import MPI, chunks


class StagedReducer:
    """Buckets on three ways, in the order in which they left: to the host, over the ranks, and back."""

    def __init__(self, comm: MPI, buckets: Sequence[Bucket]):
        self.comm, self.buckets = comm, buckets
        self.world = comm.world.Dup()  # as IallreduceReducer's
        on_gpu = any(device_of(bucket.grad) == "cuda" for bucket in buckets)
        self.copies: Any = GPUCopies() if on_gpu else PlainCopies()
        self.hosts = [self.copies.memory(bucket.grad) for bucket in buckets]
        self.coming: deque[tuple[int, Any]] = deque()  # buckets on the way to the host, with what says they are there
        self.summing: deque[tuple[int, list[Any]]] = deque()  # with their messages

    def leave(self, index: int) -> None:
        self.coming.append((index, self.copies.fetch(self.buckets[index].grad, self.hosts[index])))

    def move(self) -> None:
        """Take each bucket a stage further that has come to the end of one; waits for nobody."""
        while self.coming and self.coming[0][1].done:  # in this order on all ranks: so do messages find each other
            index, _ = self.coming.popleft()
            pieces = chunks(self.hosts[index])
            self.summing.append((index, [self.world.Iallreduce(self.comm.mpi.IN_PLACE, piece) for piece in pieces]))
        while self.summing and self.comm.mpi.Request.Testall(self.summing[0][1]):
            index, _ = self.summing.popleft()
            self.copies.send(self.hosts[index], self.buckets[index].grad)

    def wait(self) -> None:
        def over() -> bool:
            self.move()
            return not self.coming and not self.summing

        self.comm.wait_until(over, "averager.finish()")
        self.copies.join()

    def close(self) -> None:
        self.world.Free()


class GPUCopies:
    """Copies on a stream beside the one that computes, from and to pinned memory."""

    def __init__(self) -> None:
        import cupy

        self.stream = cupy.cuda.Stream(non_blocking=True)

    def memory(self, grad: Any) -> np.ndarray:
        """Of a bucket's size and dtype, on the host."""
        import cupyx

        return cupyx.empty_pinned(grad.shape, grad.dtype)

    def fetch(self, grad: Any, host: np.ndarray) -> Any:
        """Begin to copy what the current stream will have written; the event that is returned is `done` at the end."""
        import cupy

        self.stream.wait_event(cupy.cuda.get_current_stream().record())
        grad.get(stream=self.stream, out=host, blocking=False)
        return self.stream.record()

    def send(self, host: np.ndarray, grad: Any) -> None:
        """Begin to copy back."""
        grad.set(host, stream=self.stream)

    def join(self) -> None:
        """What the current stream is given from here on comes after all copies; the host does not wait."""
        import cupy

        cupy.cuda.get_current_stream().wait_event(self.stream.record())


class PlainCopies:
    """The same where a copy is over when the call is."""

    done = True

    def memory(self, grad: Any) -> np.ndarray:
        return np.empty(grad.shape, grad.dtype)

    def fetch(self, grad: Any, host: np.ndarray) -> PlainCopies:
        np.copyto(host, to_device(grad, "cpu"))
        return self

    def send(self, host: np.ndarray, grad: Any) -> None:
        grad[...] = to_device(host, device_of(grad))

    def join(self) -> None:
        pass
