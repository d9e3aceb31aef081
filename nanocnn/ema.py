"""An exponential moving average of the weights, to evaluate with: it smooths the noise of the last steps away."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .buckets import Bucket
from .kernels.dispatch import span
from .kernels.update import ema_update
from .optim import named_views
from .state import copy_by_name


class EMA:
    """average = decay * average + (1 - decay) * weights after each step, over an optimiser's buckets.

    The average starts at the initial weights, which a short run would never forget; with `warmup` update number n
    (from 0) therefore uses min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage does. Running
    statistics of batch norm are no parameters and are not averaged.
    """

    def __init__(self, buckets: Sequence[Bucket], decay: float = 0.999, warmup: bool = True):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be a number in [0, 1), got {decay!r}")
        self.buckets, self.decay, self.warmup = list(buckets), decay, warmup
        self.updates = 0
        self.averages = [bucket.data.copy() for bucket in self.buckets]

    def update(self) -> None:
        """Take the weights of now into the average: call it after `optimizer.step()`."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay
        self.updates += 1
        with span("ema", "update"):
            for bucket, average in zip(self.buckets, self.averages, strict=True):
                ema_update(average, bucket.data, decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the model's weights are the averages; afterwards, also after an exception, its own again."""
        weights = [bucket.data.copy() for bucket in self.buckets]
        try:
            self._write(self.averages)
            yield
        finally:
            self._write(weights)

    def _write(self, flats: Sequence[Any]) -> None:
        for bucket, flat in zip(self.buckets, flats, strict=True):
            bucket.data[...] = flat

    def state_dict(self) -> dict[str, Any]:
        """{"updates": int, "average": {name: array}}: the arrays are views, not copies."""
        average: dict[str, Any] = {}
        for bucket, flat in zip(self.buckets, self.averages, strict=True):
            average.update(named_views(bucket, flat))
        return {"updates": self.updates, "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copy a state in. Raises ValueError, and changes nothing, if names or shapes differ."""
        if not isinstance(state, Mapping) or set(state) != {"updates", "average"}:
            keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"an EMA's state has the keys 'updates' and 'average', got {keys}")
        copy_by_name("the EMA", self.state_dict()["average"], state["average"])
        self.updates = int(state["updates"])
