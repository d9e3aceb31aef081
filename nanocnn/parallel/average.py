"""Gradients averaged over ranks, each bucket on its way as soon as it is full, while backward still runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

from ..buckets import Bucket
from ..kernels.dispatch import ChoiceError, Switch, device_of, span
from ..tensor import Tensor
from .comm import Comm
from .messages import AllreduceReducer, IallreduceReducer
from .mpi import MPI
from .nccl import NcclReducer, obstacle
from .staged import StagedReducer
from .window import WindowReducer, shortage

reduce = Switch(
    "reduce",
    "how gradients are summed over ranks",
    auto="window if all ranks share a host (and its shared memory suffices), else iallreduce; of arrays on a device: "
    "nccl if each rank has a GPU of its own (and CuPy finds NCCL), else staged",
    window="each rank sums its slice in shared memory: no message, no barrier",
    iallreduce="non-blocking messages of 4 MB, kept moving while backward runs",
    allreduce="messages of 4 MB, each waited for",
    staged="of arrays on a device: copied to the host, iallreduce, and copied back",
    nccl="of arrays on GPUs, one a rank: NVIDIA's library, on a stream beside backward",
)
overlap = Switch(
    "overlap",
    "when gradients are summed over ranks",
    on="each bucket as it fills, while backward still runs",
    off="all buckets after backward",
)

REDUCERS: dict[str, Any] = {"window": WindowReducer, "iallreduce": IallreduceReducer, "allreduce": AllreduceReducer}
ON_DEVICES: dict[str, Any] = {"staged": StagedReducer, "nccl": NcclReducer}


class GradientAverager:
    """Sums the gradients in `buckets` over the ranks of `comm`; alone, it does nothing at all.

    zero(), backward(), finish(), and each rank holds the same gradients. Collective: all ranks make it with alike
    buckets and take the same number of steps. Buckets leave in one fixed order, whatever the order in which gradients
    arrive: in the first step as listed, then as they filled in rank 0's first step.

    The sum is the mean over the global batch if each rank scales its loss by `weight()`.
    """

    def __init__(self, buckets: Sequence[Bucket], comm: Comm):
        self.buckets: list[Bucket] = list(buckets)
        self.comm: Any = comm
        self.seconds = 0.0  # that steps have spent here so far: sending, summing, waiting
        self.method = "none"  # what `reduce` came to: it may be "auto"
        self._order = list(range(len(self.buckets)))
        self._settled = False  # whether that order is final
        self._arrived: set[int] = set()  # ids of the parameters whose gradients are complete
        self._holding = False
        if not isinstance(comm, MPI) or comm.size == 1:
            return
        self._device = device_of(self.buckets[0].grad) if self.buckets else "cpu"
        _check_alike(comm, self.buckets, self._device)
        self._reducers: dict[str, Any] = {}
        self._index = {id(p): i for i, bucket in enumerate(self.buckets) for p in bucket.params}
        for bucket in self.buckets:
            for p in bucket.params:
                p.on_grad = self._on_grad
        self._shortage: str | None = None  # why there can be no window, or no NCCL, once we know
        self._stay = comm.at_leave(self.close)
        self._begin()

    @staticmethod
    def weight(n_local: int, n_global: int) -> float:
        """What a rank's mean loss over its `n_local` samples is multiplied by: its part of the global batch.

        sum over ranks of weight * (mean over local samples) = mean over global samples, however unequal the ranks'
        batches are. (A sum over local samples is divided by `n_global`.) A rank without samples skips backward: the
        mean of nothing is NaN, and what does not arrive counts as zero.
        """
        return n_local / n_global

    def zero(self) -> None:
        """Forget the gradients, and begin()."""
        for bucket in self.buckets:
            bucket.zero()
        self.begin()

    def begin(self) -> None:
        """Heed the switches `reduce` and `overlap` from here on, and expect all gradients. Collective."""
        if self.comm.size > 1:
            self._begin()

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        """Inside, gradients only add up here: for all backward passes of a step but the last (as PyTorch's DDP)."""
        before, self._holding = self._holding, True
        try:
            yield
        finally:
            self._holding = before

    def finish(self) -> None:
        """Wait until every bucket holds the sum over ranks. A gradient that did not arrive is zero."""
        if self.comm.size == 1:
            for bucket in self.buckets:
                bucket.fill_missing()
            return
        start = time.perf_counter()
        rest = self._order[self._sent :]
        with span("average", "communication", bytes=sum(self.buckets[i].grad.nbytes for i in rest)):
            for index in rest:
                self._send(index)
            self._reducer.wait()
            if not self._settled:
                self._settle()
        self._reset()
        self.seconds += time.perf_counter() - start

    def close(self) -> None:
        """Let go of the parameters and of shared memory. Collective; at the end of the job it happens by itself."""
        if self.comm.size == 1:
            return
        for bucket in self.buckets:
            for p in bucket.params:
                p.on_grad = None
        while self._reducers:
            self._reducers.popitem()[1].close()
        self._stay()

    # ---------------------------------------------------------------- one step

    def _begin(self) -> None:
        """Make what the switches ask for, and expect all gradients."""
        self._overlap = overlap.value == "on"
        self.method = self._resolve()
        if self.method not in self._reducers:
            self._reducers[self.method] = (REDUCERS | ON_DEVICES)[self.method](self.comm, self.buckets)
        self._reducer = self._reducers[self.method]
        self._reset()

    def _reset(self) -> None:
        self._arrived.clear()
        self._missing = [sum(p.requires_grad for p in bucket.params) for bucket in self.buckets]
        self._filled: list[int] = []  # buckets in the order in which they filled
        self._sent = 0  # how many of self._order have left

    def _on_grad(self, p: Tensor) -> None:
        """The gradient of `p` is complete: send what is full now, and keep moving what is under way."""
        if self._holding:
            return
        if id(p) in self._arrived:
            raise RuntimeError(
                "a second backward() before finish(): the first one's gradients may be on their way already. "
                "Put all backward passes of a step but the last under averager.no_sync()"
            )
        self._arrived.add(id(p))
        index = self._index[id(p)]
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._filled.append(index)
        if not self._overlap:
            return
        start = time.perf_counter()
        while self._sent < len(self._order) and self._missing[self._order[self._sent]] == 0:
            index = self._order[self._sent]
            with span("average", "communication", bytes=self.buckets[index].grad.nbytes):
                self._send(index)
        if self._sent:
            self._reducer.move()
        self.seconds += time.perf_counter() - start

    def _send(self, index: int) -> None:
        self.buckets[index].fill_missing()
        self._reducer.leave(index)
        self._reducer.move()
        self._sent += 1

    def _settle(self) -> None:
        rest = [i for i in self._order if i not in self._filled]
        self._order = self.comm.broadcast_object(self._filled + rest)
        self._settled = True

    def _resolve(self) -> str:
        """What `reduce` comes to. Raises ChoiceError, on all ranks, if something is asked for that cannot be had."""
        own, others = (REDUCERS, ON_DEVICES) if self._device == "cpu" else (ON_DEVICES, REDUCERS)
        if reduce.value in others:
            raise ChoiceError(
                f"reduce={reduce.value} cannot sum arrays of the device '{self._device}'; what can: {', '.join(own)}"
            )
        if self._device != "cpu":
            return self._resolve_on_device()
        if reduce.value not in ("auto", "window") or "window" in self._reducers:
            return "window" if reduce.value == "auto" else reduce.value
        if self._shortage is None:
            self._shortage = shortage(self.comm, self.buckets)
        if self._shortage and reduce.value == "window":
            raise ChoiceError(f"reduce=window cannot be had: {self._shortage}; reduce=iallreduce can")
        return "iallreduce" if self._shortage else "window"

    def _resolve_on_device(self) -> str:
        if reduce.value == "staged" or "nccl" in self._reducers:
            return "staged" if reduce.value == "staged" else "nccl"
        if self._shortage is None:
            on_gpu = self._device == "cuda"
            self._shortage = obstacle(self.comm) if on_gpu else f"the device '{self._device}' is no GPU"
        if self._shortage and reduce.value == "nccl":
            raise ChoiceError(f"reduce=nccl cannot be had: {self._shortage}; reduce=staged can")
        return "staged" if self._shortage else "nccl"


def _check_alike(comm: Comm, buckets: Sequence[Bucket], device: str) -> None:
    """Raise ValueError, on all ranks, if they would wait for different messages: other models or other switches."""
    mine = {
        "buckets": [(bucket.names, [p.shape for p in bucket.params], str(bucket.data.dtype)) for bucket in buckets],
        "device": device,
        "reduce": reduce.value,
        "overlap": overlap.value,
    }
    for rank, theirs in enumerate(comm.all_gather_object(mine)):
        for what in mine:
            if theirs[what] != mine[what]:
                raise ValueError(
                    f"ranks {comm.rank} and {rank} differ in {what}: {str(mine[what])[:200]} and "
                    f"{str(theirs[what])[:200]}; all ranks must build the same model and be given the same switches"
                )
