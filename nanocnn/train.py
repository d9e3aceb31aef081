"""One step, one evaluation. There is no Trainer: a script owns its loop, and it is read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from . import functional as F
from . import random
from .capture import CaptureError, capture
from .data import Batch
from .kernels import dispatch
from .kernels.dispatch import Switch, span, to_device
from .metrics import confusion_matrix
from .nn import Module
from .optim import Optimizer, clip_grad_norm_
from .parallel import Comm, GradientAverager
from .tensor import Tensor, no_grad

graph = Switch(
    "graph",
    "how a training step of a process alone reaches its kernels",
    off="through Python, op by op",
    on="forward and backward are recorded once and made again: calls of kernels; on a GPU, a CUDA graph (capture.py)",
)


class NonFiniteLoss(ArithmeticError):
    """The loss became NaN or infinite; raised on every rank in the same step, before the parameters are touched."""


class StepResult(NamedTuple):
    """Sums over the global batch, the same on every rank."""

    loss: float
    correct: int
    samples: int
    stop: bool  # some rank was asked to stop


def train_step(
    model: Module,
    batch: Batch,
    optimizer: Optimizer,
    lr: float,
    averager: GradientAverager,
    *,
    label_smoothing: float = 0.0,
    clip: float | None = None,
    stop: bool = False,
) -> StepResult:
    """Forward, backward, average, update.

    Raises NonFiniteLoss, on all ranks alike and before the update, if the global loss is NaN or infinite.
    """

    def forward_backward(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        averager.zero()
        logits = model(x)
        # Ranks may hold unequal parts of the global batch: the sum over it divided by its size is the mean over it.
        loss = F.cross_entropy(logits, y, label_smoothing, reduction="sum")
        (loss * (1 / batch.global_size)).backward()  # buckets leave as they fill
        return loss, logits

    with random.keyed(batch.epoch, batch.index):
        run: Any = forward_backward
        if graph.value == "on" and averager.comm.size == 1 and dispatch.recorder is None:
            run = _recorded(model, forward_backward, batch, label_smoothing, averager)
        loss, logits = run(*(Tensor(a).to(model.device) for a in (batch.x, batch.y)))
    averager.finish()
    correct = (logits.data.argmax(axis=1) == to_device(batch.y, logits.device)).sum()
    with span("totals", "communication"):
        totals = averager.comm.all_reduce(np.array([loss.item(), correct.item(), stop], np.float64))
    loss_sum, correct, stopping = totals.tolist()
    if not math.isfinite(loss_sum):
        raise NonFiniteLoss(
            f"the loss is {loss_sum} in epoch {batch.epoch + 1}, step {batch.step + 1}, at learning rate {lr:.3g}; "
            "this step changed no parameter and saved nothing. Try a lower learning rate, a longer warm-up or "
            "--clip 1, and check the images for NaN; --resume goes on from the last checkpoint"
        )
    if clip is not None:
        clip_grad_norm_(averager.buckets, clip)
    optimizer.step(lr)
    return StepResult(loss_sum, int(correct), batch.global_size, stopping > 0)


_recordings: WeakKeyDictionary[Module, tuple[list, Any]] = WeakKeyDictionary()  # with what they were made for


def _recorded(
    model: Module, function: Callable[..., Any], batch: Batch, label_smoothing: float, averager: GradientAverager
) -> Callable[..., Any]:
    """The function, captured: once for each model, and anew if anything has changed that is not in the arrays."""
    key: list[Any] = [averager, batch.x.shape, batch.x.dtype, batch.y.shape, batch.y.dtype, batch.global_size]
    key += [label_smoothing, dispatch.choices_in_force()]
    for _, module in model.named_modules():
        key += [module.training, *((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str))]
    key += [_Same(x) for p in model.parameters() for x in (p, p.data, p.grad_buffer, p.requires_grad)]
    made_for, captured = _recordings.get(model, (None, None))
    if captured is None or made_for != key:
        _recordings.pop(model, None)  # its memory is for the next one
        try:
            captured = capture(function, *(to_device(a, model.device) for a in (batch.x, batch.y)))
        except CaptureError as error:
            error.add_note("(the switch graph=off trains without capturing)")
            raise
        _recordings[model] = key, captured
    return captured


class _Same:
    """Equal to another that holds the same object: arrays compare number by number otherwise."""

    def __init__(self, x: Any):
        self.x = x

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.x is other.x


class Evaluation(NamedTuple):
    """Of a whole split, the same on every rank. `seconds` is the forward passes' time, the longest of the ranks."""

    loss: float
    confusion: np.ndarray  # (C, C) int64, rows true and columns predicted
    seconds: float
    stopped: bool  # some rank was asked to stop: the figures are not those of the whole split

    @property
    def accuracy(self) -> float:
        return float(np.trace(self.confusion) / max(1, self.confusion.sum()))


def evaluate(
    model: Module,
    batches: Iterable[Batch],
    num_classes: int,
    comm: Comm,
    stop: Callable[[], bool] = lambda: False,
) -> Evaluation:
    """Mean loss and confusion matrix over the batches of all ranks, without a graph and in evaluation mode.

    `stop` is asked between batches; a rank for which it is true leaves the rest, and all ranks are told.
    """
    confusion = np.zeros((num_classes, num_classes), np.float64)
    loss, seconds = 0.0, 0.0
    training = model.training
    model.eval()
    with no_grad(), span("evaluate", "evaluate"):
        for batch in batches:
            if stop():
                break
            start = time.perf_counter()
            logits = model(Tensor(batch.x).to(model.device))
            seconds += time.perf_counter() - start
            loss += F.cross_entropy(logits, to_device(batch.y, logits.device), reduction="sum").item()
            confusion += confusion_matrix(batch.y, logits.numpy().argmax(axis=1), num_classes)
    model.train(training)
    totals: Any = comm.all_reduce(np.append(confusion.ravel(), [loss, stop()]))
    confusion, (loss, stopped) = totals[:-2].reshape(confusion.shape).astype(np.int64), totals[-2:].tolist()
    seconds = max(comm.all_gather_object(seconds))
    return Evaluation(loss / max(1, confusion.sum()), confusion, seconds, stopped > 0)
