"""Batches on their way to a GPU, while it computes with the one before.

    uploads = Uploads("cuda")
    for x, y in uploads.ahead(batches): ...     # arrays of the device

A copy from ordinary memory makes the host wait: the driver first copies into page-locked memory of its own. So there
are two such buffers here, used in turn, and a stream of their own on which copies run beside kernels. Three waits keep
the order: the host, before it fills a buffer whose copy may still run; the copy, until the kernels are done that read
what lay there before; the kernels, until the copy is done.

Not yet run on a GPU. On the device `emulated` there is nothing to overlap, and arrays are copied when they are sent.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from ..dispatch import Switch, to_device

pinned = Switch(
    "pinned",
    "how a batch gets from the host to a GPU",
    on="through page-locked memory, on a stream of its own, while the batch before is computed with",
    off="from where it lies, when it is needed",
)

SLOTS = 2  # one is read while the other is filled


class _Slot:
    """Page-locked memory, memory of the device, and when the last copy between them was done."""

    def __init__(self, like: Sequence[np.ndarray]):
        import cupy
        import cupyx

        self.host = [cupyx.empty_pinned(a.shape, a.dtype) for a in like]
        self.device = [cupy.empty(a.shape, a.dtype) for a in like]
        self.copied: Any = None


class Uploads:
    """Sends tuples of NumPy arrays to a device. What it hands out is overwritten two batches later."""

    def __init__(self, device: str):
        self.device = device
        self._stream: Any = None
        self._slots: dict[tuple, deque[_Slot]] = {}  # by shapes: the last batch may be smaller

    def ahead(self, batches: Iterable[Sequence[np.ndarray]]) -> Iterator[list[Any]]:
        """Each batch on the device; the next one is on its way before this one is handed out."""
        if self.device != "cuda" or pinned.value == "off":
            for arrays in batches:
                yield [to_device(a, self.device) for a in arrays]
            return
        before: _Slot | None = None
        try:
            for arrays in batches:
                slot = self._send(arrays)
                if before is not None:
                    yield self._arrived(before)
                before = slot
            if before is not None:
                yield self._arrived(before)
        finally:  # also where nobody wants the rest: its memory may be given to others, whom a late copy would hit
            if before is not None:
                self._arrived(before)

    def _send(self, arrays: Sequence[np.ndarray]) -> _Slot:
        import cupy

        if self._stream is None:
            self._stream = cupy.cuda.Stream(non_blocking=True)
        slots = self._slots.setdefault(tuple((a.shape, a.dtype.str) for a in arrays), deque())
        slot = _Slot(arrays) if len(slots) < SLOTS else slots.popleft()  # the one that was used longest ago
        slots.append(slot)
        if slot.copied is not None:
            slot.copied.synchronize()
        for here, a in zip(slot.host, arrays, strict=True):
            np.copyto(here, a)
        self._stream.wait_event(cupy.cuda.get_current_stream().record())
        for there, here in zip(slot.device, slot.host, strict=True):
            there.set(here, stream=self._stream)
        slot.copied = self._stream.record()
        return slot

    def _arrived(self, slot: _Slot) -> list[Any]:
        import cupy

        cupy.cuda.get_current_stream().wait_event(slot.copied)
        return slot.device
