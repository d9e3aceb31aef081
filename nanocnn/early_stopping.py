"""Early stopping: end the training when the validation figure has stopped improving."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class EarlyStopping:
    """Says stop after `patience` values in a row that are not better than the best by more than `min_delta`.

    `mode` is "max" for a figure that should grow (accuracy), "min" for one that should fall (loss). NaN is no
    improvement. Give it the figure of the validation set, never of the test set, and the same one on every rank.
    """

    def __init__(self, patience: int, mode: str = "max", min_delta: float = 0.0):
        if patience < 1:
            raise ValueError(f"patience must be at least 1, got {patience!r}")
        if mode not in ("max", "min"):
            raise ValueError(f"mode must be 'max' or 'min', got {mode!r}")
        if not min_delta >= 0:
            raise ValueError(f"min_delta must be a number >= 0, got {min_delta!r}")
        self.patience, self.mode, self.min_delta = patience, mode, min_delta
        self.best: float | None = None
        self.waited = 0  # values since the best one; 0 says that the last value was the best

    def step(self, value: float) -> bool:
        """Take the next value; True when it is time to stop."""
        value = float(value)
        if self.best is None:
            better = value == value  # anything but NaN
        else:
            gain = value - self.best if self.mode == "max" else self.best - value
            better = gain > self.min_delta
        if better:
            self.best, self.waited = value, 0
        else:
            self.waited += 1
        return self.waited >= self.patience

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not isinstance(state, Mapping) or set(state) != {"best", "waited"}:
            keys = sorted(map(str, state)) if isinstance(state, Mapping) else type(state).__name__
            raise ValueError(f"the state of early stopping has the keys 'best' and 'waited', got {keys}")
        self.best = None if state["best"] is None else float(state["best"])
        self.waited = int(state["waited"])
