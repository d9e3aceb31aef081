"""Batches: shuffled, shared out to ranks, augmented, normalised, and ready before they are asked for."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from ..kernels.cuda.upload import Uploads
from ..kernels.dispatch import Switch, span
from ..kernels.narrow import is_float
from .augment import Augment, load_batch
from .datasets import DataError, Split
from .resident import resident_or_none

prefetch_switch = Switch(
    "prefetch",
    "who loads and augments the next batches",
    on="a background thread, while this one computes",
    off="the training thread itself, between two steps",
)


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch.

    x: float (n, H, W, C), normalised, C-contiguous. y: int64 (n,) labels. Both lie on the loader's device. index: int64
    (n,) sample numbers in the split, on the CPU, which key dropout too. global_size: images in the batch over all
    ranks; means are weighted by it. epoch and step: where in the run it belongs.
    """

    x: np.ndarray
    y: np.ndarray
    index: np.ndarray
    global_size: int
    epoch: int = 0
    step: int = 0


class Loader:
    """The batches of a split for one rank of `size`: `for batch in loader.epoch(e)`; `len(loader)` steps an epoch.

    `batch_size` is that of all ranks together. An epoch's order is drawn from (seed, epoch), alike on every rank, and
    global batch s is `order[s * batch_size : (s + 1) * batch_size]`, cut into `size` nearly equal pieces: what a step
    learns from does not depend on how many ranks share it, and all ranks take the same number of steps.

    shuffle: draw an order (training), or keep that of the split (evaluation). drop_last: leave out the last global
    batch if it is not full; by default when shuffling. If it is kept, a rank's piece of it may have no image.
    prefetch: how many batches the background thread keeps ready; 0, or the switch `prefetch=off`, is no thread.
    device: where batches lie. With the switch `resident` the whole split is there, as bytes, and they are made there:
    with the same bits as on the CPU, and without a thread, since a kernel is launched and not waited for. Else they are
    made on the CPU and sent, the next one while this one is computed with; then a batch is overwritten two batches
    later. Raises DataError if a batch or a piece of one would be empty, and if `resident=on` does not fit.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        rank: int = 0,
        size: int = 1,
        shuffle: bool = True,
        drop_last: bool | None = None,
        prefetch: int = 2,
        dtype: type = np.float32,
        device: str | None = None,
    ):
        self.split, self.batch_size, self.augment, self.seed = split, batch_size, augment, seed
        self.rank, self.size, self.shuffle, self.prefetch, self.dtype = rank, size, shuffle, prefetch, dtype
        self.drop_last = shuffle if drop_last is None else drop_last
        n, where = len(split), split.source
        if not 0 <= rank < size:
            raise DataError(f"rank {rank} of {size}: expected 0 to {size - 1}")
        if n < size:
            raise DataError(
                f"{where}: {n} images for {size} ranks; run fewer ranks, or give each rank one image at least"
            )
        if batch_size < size:
            raise DataError(
                f"a global batch of {batch_size} for {size} ranks; expected one image a rank at least (--batch-size)"
            )
        if self.drop_last and batch_size > n:
            raise DataError(
                f"{where}: a batch of {batch_size} is larger than the {n} images; lower --batch-size to {n} at most"
            )
        if not is_float(np.dtype(dtype)):
            raise DataError(f"{where}: dtype {np.dtype(dtype)}, expected a floating-point one for normalised images")
        if augment is not None:
            augment.check(split.images)
        self.resident = resident_or_none(split, device, dtype)
        self.uploads = None if device in (None, "cpu") or self.resident else Uploads(str(device))

    def __len__(self) -> int:
        whole, rest = divmod(len(self.split), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def order(self, epoch: int) -> np.ndarray:
        """(N,) int64: the sample numbers in the order of this epoch, alike on every rank."""
        if not self.shuffle:
            return np.arange(len(self.split))
        return np.random.default_rng((self.seed % 2**64, epoch)).permutation(len(self.split))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from step `start` on. Close it, or let it go, and its thread ends."""
        if not 0 <= start <= len(self):
            raise DataError(f"{self.split.source}: cannot start at step {start}, an epoch has {len(self)}")
        order = self.order(epoch)
        steps = iter(range(start, len(self)))
        if self.resident is None and self.prefetch > 0 and prefetch_switch.value == "on":
            batches = _ahead(lambda: self._batch(order, epoch, next(steps)), self.prefetch)
        else:
            batches = self._one_by_one(order, epoch, steps)
        return batches if self.uploads is None else self._sent(batches, self.uploads)

    def _one_by_one(self, order: np.ndarray, epoch: int, steps: Iterator[int]) -> Iterator[Batch]:
        for step in steps:
            with span("load", "data"):
                batch = self._batch(order, epoch, step)
            yield batch

    @staticmethod
    def _sent(batches: Iterator[Batch], uploads: Uploads) -> Iterator[Batch]:
        """Each on the device; the next one is on its way before this one is handed out."""
        whole: deque[Batch] = deque()

        def arrays() -> Iterator[tuple[np.ndarray, np.ndarray]]:
            for batch in batches:
                whole.append(batch)
                yield batch.x, batch.y

        for x, y in uploads.ahead(arrays()):
            yield replace(whole.popleft(), x=x, y=y)

    def _batch(self, order: np.ndarray, epoch: int, step: int) -> Batch:
        whole = order[step * self.batch_size : (step + 1) * self.batch_size]
        mine = whole[len(whole) * self.rank // self.size : len(whole) * (self.rank + 1) // self.size]
        if self.resident is not None:
            x, y = self.resident.batch(mine, self.augment, self.seed, epoch)
        else:
            x, y = load_batch(self.split, mine, self.augment, self.seed, epoch, self.dtype), self.split.labels[mine]
        return Batch(x, y, mine, len(whole), epoch, step)


def _ahead(make: Callable[[], Batch], depth: int) -> Iterator[Batch]:
    """What `make` returns until it raises StopIteration, made by a thread that is at most `depth` batches ahead.

    Any other exception is raised here, with the thread's traceback. The thread ends with the iteration, also when that
    is given up in the middle.
    """
    ready: queue.SimpleQueue[tuple[Batch | None, BaseException | None]] = queue.SimpleQueue()
    places = threading.Semaphore(depth)
    given_up = threading.Event()

    def work() -> None:
        try:
            while places.acquire() and not given_up.is_set():
                with span("load", "data"):  # on the timeline a track of its own
                    batch = make()
                ready.put((batch, None))
        except BaseException as error:  # StopIteration, the end, among them
            ready.put((None, error))

    thread = threading.Thread(target=work, name="nanocnn prefetch", daemon=True)
    thread.start()
    try:
        while True:
            with span("wait for data", "data"):
                batch, error = ready.get()
            if isinstance(error, StopIteration):
                return
            if error is not None:
                error.add_note(
                    "(in the thread that loads batches ahead; prefetch=off loads them in the training thread)"
                )
                raise error
            places.release()
            yield batch  # type: ignore[misc]  # None comes with an error only
    finally:
        given_up.set()
        places.release()
        thread.join()
