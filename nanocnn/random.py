"""The seed, the generator that weights are drawn from, and what keys dropout.

A mask is a function of (seed, epoch, sample, stream) and of nothing else: `keyed()` says which epoch it is and which
samples the rows of this batch are, and `stream` counts the dropout calls of a forward pass. So a mask depends neither
on the number of ranks nor on what was drawn before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from .kernels.dispatch import aside, to_device

# Augmentation draws from the same function with the same key, from stream 0 on; dropout must not repeat its numbers.
KEYED_STREAMS, COUNTED_STREAMS = 1 << 24, 1 << 25


class Key(NamedTuple):
    """What keys a mask: the numbers of the samples (N,), and (seed, epoch, stream), int64 both.

    They are arrays, and new ones for each mask, so that a captured step (capture.py) draws new masks, too.
    """

    samples: np.ndarray
    place: np.ndarray


_seed = 0
_generator = np.random.default_rng(_seed)
_drawn = 0  # masks drawn outside keyed(), each of which is a new epoch of its own
_batch: tuple[int, np.ndarray] | None = None  # (epoch, samples) inside keyed()
_there: KeysOnDevice | None = None  # inside KeysOnDevice.in_use()
_stream = 0  # dropout calls since keyed() was entered


def manual_seed(seed: int) -> None:
    """Start over: new weights and dropout masks follow from `seed`, 0 to 2^63 - 1. Without a call the seed is 0."""
    global _seed, _generator, _drawn
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or not 0 <= seed < 2**63:
        raise ValueError(f"manual_seed({seed!r}): expected an integer from 0 to 2^63 - 1")
    _seed, _generator, _drawn = int(seed), np.random.default_rng(int(seed)), 0


def generator() -> np.random.Generator:
    """The generator that new layers draw their weights from."""
    return _generator


@contextlib.contextmanager
def keyed(epoch: int, samples: Any) -> Iterator[None]:
    """Inside, dropout masks belong to these samples of the data set: (N,) integers, one for each row of the batch.

        with random.keyed(epoch, batch.index):
            loss = F.cross_entropy(model(x), y)

    One block a forward pass: entering it numbers the dropout calls from 0 again. Raises ValueError on other shapes.
    """
    global _batch, _stream
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind not in "iu":
        raise ValueError(f"keyed() takes sample numbers (N,) of an integer dtype, got {samples.dtype} {samples.shape}")
    before = _batch, _stream
    _batch, _stream = (int(epoch), samples.astype(np.int64)), 0
    try:
        yield
    finally:
        _batch, _stream = before


def next_key(rows: int) -> Key:
    """The key of the next mask, for a batch of `rows` rows.

    Outside keyed() the rows are numbered from 0 and every call draws a new mask. Inside, the rows of a sample stand
    together (tokens of an image, say); raises ValueError if their number is no multiple of the samples'.
    """
    return aside(_next_key, rows)


def _next_key(rows: int) -> Key:
    global _drawn, _stream
    if _there is not None:
        _stream += 1
        return _there.key(rows, _stream - 1)
    if _batch is None:
        _drawn += 1
        return Key(np.arange(rows), np.array([_seed, _drawn - 1, COUNTED_STREAMS]))
    epoch, samples = _batch
    if rows != len(samples) and (len(samples) == 0 or rows % len(samples)):
        raise ValueError(
            f"dropout of {rows} rows inside keyed() with {len(samples)} samples: expected one row for each sample, or "
            "the same number of rows for each"
        )
    _stream += 1
    return Key(samples.copy(), np.array([_seed, epoch, KEYED_STREAMS + _stream - 1]))


class KeysOnDevice:
    """Keys that lie on a device and stay there: a recorded step (kernels/cuda/graph.py) draws its masks with them.

    keys = KeysOnDevice("cuda", rows=128)
    keys.draw()                         # before each step, inside or outside keyed()
    with keys.in_use(): ...
    """

    MASKS = 64  # in one forward pass

    def __init__(self, device: str, rows: int):
        self.device = device
        self.samples = to_device(np.zeros(rows, np.int64), device)
        self.places = to_device(np.zeros((self.MASKS, 3), np.int64), device)

    def draw(self) -> None:
        """Send the device what the next masks are keyed by: inside keyed() as ever, else as a new epoch."""
        global _drawn
        if _batch is None:
            _drawn += 1
        epoch, samples = _batch or (_drawn - 1, np.arange(len(self.samples)))
        places = np.empty((self.MASKS, 3), np.int64)
        places[:, :2] = _seed, epoch
        places[:, 2] = (COUNTED_STREAMS if _batch is None else KEYED_STREAMS) + np.arange(self.MASKS)
        self.places[...] = to_device(places, self.device)
        self.samples[...] = to_device(samples, self.device)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Inside, masks are drawn with these; they are numbered from 0."""
        global _there, _stream
        before = _there, _stream
        _there, _stream = self, 0
        try:
            yield
        finally:
            _there, _stream = before

    def key(self, rows: int, stream: int) -> Key:
        """That of the mask of this number."""
        if rows != len(self.samples) or stream >= self.MASKS:
            raise ValueError(
                f"dropout of {rows} rows, mask {stream + 1} of a recorded step: expected {len(self.samples)} rows, one "
                f"for each row of the first input, and {self.MASKS} masks at most"
            )
        return Key(self.samples, self.places[stream])


@contextlib.contextmanager
def repeated() -> Iterator[None]:
    """The masks that are drawn inside will be drawn again afterwards."""
    global _drawn, _stream
    before = _drawn, _stream
    try:
        yield
    finally:
        _drawn, _stream = before
