"""The whole state of a training run: gathered, saved, and taken up again as if nothing had happened."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import checkpoint
from .checkpoint import CheckpointError
from .parallel import Comm
from .progress import say

# Options that say which samples a step sees. A run that goes on with other ones would be neither the old nor a new one.
FIXED_OPTIONS = ("data", "images", "seed", "val", "batch_size")


@dataclass
class Position:
    """Where a run is. The sums are over the part of the epoch under way that is done, and over all ranks."""

    epoch: int = 0  # epochs that are over
    batch: int = 0  # steps made in the epoch under way
    step: int = 0  # steps in all
    loss: float = 0.0
    correct: int = 0
    samples: int = 0
    seconds: float = 0.0  # of the epoch under way, interruptions not counted
    waiting: float = 0.0  # of these, for communication

    @property
    def mean_loss(self) -> float:
        return self.loss / self.samples

    @property
    def accuracy(self) -> float:
        return self.correct / self.samples

    @property
    def rate(self) -> float:
        """Images a second, over all ranks."""
        return self.samples / self.seconds

    @property
    def communication(self) -> float:
        """The share of the time that was waiting for communication."""
        return self.waiting / self.seconds

    def advance(self, loss: float, correct: int, samples: int, seconds: float, waiting: float) -> None:
        """One step was made: the sum of its losses, its right predictions, its images; the epoch's seconds so far."""
        self.batch += 1
        self.step += 1
        self.loss += loss
        self.correct += correct
        self.samples += samples
        self.seconds, self.waiting = seconds, waiting

    def next_epoch(self) -> None:
        """The epoch is over."""
        self.epoch, self.batch, self.loss, self.correct, self.samples = self.epoch + 1, 0, 0.0, 0, 0
        self.seconds = self.waiting = 0.0


class Keeper:
    """Saves and loads a run: `parts` are its objects with `state_dict()` and `load_state_dict()`; None is left out.

    Rank 0 writes, all ranks read: `folder` must be on a file system that every host sees. Saving and loading are
    collective. Nothing depends on the number of ranks but batch norm's running statistics in the middle of an epoch:
    each rank's own are kept, so that the same number of ranks goes on bit for bit; another number shares them out.
    """

    def __init__(
        self, folder: str | Path, comm: Comm, options: Mapping[str, Any], keep: int, *, model: Any, **parts: Any
    ):
        self.folder, self.comm, self.keep, self.model = Path(folder), comm, keep, model
        self.options = {name: options[name] for name in FIXED_OPTIONS}
        self.parts = {"model": model, **{name: part for name, part in parts.items() if part is not None}}
        if comm.rank == 0:
            checkpoint.sweep(self.folder)

    def save(self, position: Position, best: bool = False) -> None:
        """A new generation of the newest state; with `best` also in `folder`/best, which no rotation touches."""
        buffers = {name: buffer.data for name, buffer in self.model.named_buffers()}
        ranks = self.comm.all_gather_object(buffers)
        if self.comm.rank == 0:
            state = {name: part.state_dict() for name, part in self.parts.items()}
            state |= {"position": asdict(position), "options": self.options, "buffers_by_rank": ranks}
            checkpoint.save(self.folder, position.step, state, keep=self.keep)
            if best:
                checkpoint.save(self.folder / "best", position.step, state, keep=1)
        self.comm.barrier()

    def load(self) -> Position | None:
        """Take up the newest good generation; None if there is none. Raises CheckpointError if it is of another run."""
        path = self.comm.broadcast_object(self._latest() if self.comm.rank == 0 else None)
        if path is None:
            return None
        state = checkpoint.load(path)
        if state["options"] != self.options:
            differ = [
                f"{name} was {state['options'].get(name)!r}, now {self.options[name]!r}"
                for name in self.options
                if state["options"].get(name) != self.options[name]
            ]
            raise CheckpointError(
                f"{path}: {'; '.join(differ)}. Resume with the same, or start another run with --name"
            )
        checkpoint.check_same(state["model"], self.model.state_dict(), where=f"{path}: model")
        try:
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
        except KeyError as error:
            raise CheckpointError(f"{path} has no state of {error}: resume with the options of the run") from error
        except ValueError as error:
            raise CheckpointError(f"{path} does not fit the options of this run: {error}") from error
        buffers = state["buffers_by_rank"][self.comm.rank % len(state["buffers_by_rank"])]
        for name, buffer in self.model.named_buffers():
            buffer.data[...] = buffers[name]
        return Position(**state["position"])

    def load_best(self) -> None:
        """Give the model (and the average of its weights, if there is one) the state that was best by validation."""
        path = self.comm.broadcast_object(checkpoint.latest(self.folder / "best") if self.comm.rank == 0 else None)
        if path is not None:
            state = checkpoint.load(path)
            for name in {"model", "ema"} & set(self.parts):
                self.parts[name].load_state_dict(state[name])

    def _latest(self) -> Path | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = checkpoint.latest(self.folder)
        for warning in caught:  # a newer generation is damaged: a message for people, not for programmers
            say(f"warning: {warning.message}")
        return path
