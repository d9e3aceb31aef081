"""One step, one evaluation. There is no Trainer: a script owns its loop, and it is read from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from . import functional as F
from . import random
from .capture import CaptureError
from .data import Batch
from .functional.cast_together import cast_together
from .kernels import dispatch
from .kernels.dispatch import Switch, span, to_device
from .kernels.emulated_array import HostError
from .metrics import confusion_matrix
from .nn import Module
from .optim import Optimizer, clip_grad_norm_
from .parallel import Comm, GradientAverager
from .precision import LossScaler, NonFiniteGradient, Overflow, at_entrance, first_overflow, precision
from .recorded_step import RecordedBackward, RecordedStep
from .tensor import Tensor, no_grad

graph = Switch(
    "graph",
    "how a training step reaches its kernels",
    off="through Python, op by op",
    on="recorded once and made again: on a GPU the whole step of a process alone; else forward and backward, and after "
    "them ranks sum their gradients (no overlap)",
)


UNSCALED = LossScaler(enabled=False)


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
    scaler: LossScaler = UNSCALED,
) -> StepResult:
    """Forward, backward, average, update; the update is left out if `scaler` finds an overflow (without one, which is
    for float32, gradients are looked at only where the whole step is recorded).

    Raises, on all ranks alike and before the update, NonFiniteLoss if the global loss is NaN or infinite, which no loss
    scale would change, and NonFiniteGradient if a gradient is at the smallest scale. In half precision both name the
    first layer that overflowed.
    """

    def forward_backward(x: Tensor, y: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
        for bucket in averager.buckets:
            bucket.zero()
        x = at_entrance(x)
        with cast_together(averager.buckets, x.dtype):
            logits = model(x)
        loss = F.cross_entropy(logits, y, label_smoothing, reduction="sum")
        loss.backward(seed)  # buckets leave as they fill
        return loss, logits

    averager.begin()
    recorded = graph.value == "on" and dispatch.recorder is None and _recordable(batch, model.device)
    whole = model.device != "cpu" and averager.comm.size == 1 and optimizer.goes_together() and clip is None
    if recorded and whole:
        return _recorded_step(model, forward_backward, batch, optimizer, lr, averager, label_smoothing, stop, scaler)
    with random.keyed(batch.epoch, batch.index):
        run: Any = forward_backward
        if recorded:
            example = [to_device(a, model.device) for a in (batch.x, batch.y, _seed(batch, 1.0))]
            make = partial(RecordedBackward, forward_backward, averager, example)
            run = _kept(model, batch, make, averager, label_smoothing)
        loss, logits = run(*(Tensor(a).to(model.device) for a in (batch.x, batch.y, _seed(batch, scaler.scale))))
    averager.finish()
    correct = (logits.data.argmax(axis=1) == to_device(batch.y, logits.device)).sum()
    with span("totals", "communication"):
        totals = averager.comm.all_reduce(np.array([loss.item(), int(correct), stop], np.float64))
    loss_sum, correct, stopping = totals.tolist()
    result = StepResult(loss_sum, int(correct), batch.global_size, stopping > 0)
    _check_loss(loss_sum, model, batch, lr, label_smoothing, averager.comm)
    try:
        good = scaler.unscale(averager.buckets)
    except NonFiniteGradient as error:
        raise _explained(error, model, batch, scaler, scaler.scale, label_smoothing, averager.comm) from None
    if good:
        if clip is not None:
            clip_grad_norm_(averager.buckets, clip)
        optimizer.step(lr)
    return result


def _recordable(batch: Batch, device: str) -> bool:
    """Not so is a rank's part of a batch that has no images; nor, on the CPU, one whose labels are all the same: it is
    on others that a recording is tried there (trial.py). Such a step is made op by op, to the same bits."""
    return len(batch.y) > 0 and (device != "cpu" or bool((batch.y != batch.y[0]).any()))


def _recorded_step(
    model: Module,
    forward_backward: Callable[..., Any],
    batch: Batch,
    optimizer: Optimizer,
    lr: float,
    averager: GradientAverager,
    label_smoothing: float,
    stop: bool,
    scaler: LossScaler,
) -> StepResult:
    """The same on a device, in one piece (recorded_step.py)."""
    scale, make = scaler.scale, partial(RecordedStep, forward_backward, optimizer, scaler, model.device, batch)
    with random.keyed(batch.epoch, batch.index):
        rule = scaler.enabled, scaler.dynamic, scaler.growth, scaler.backoff, scaler.interval, scaler.floor
        step = _kept(model, batch, make, averager, label_smoothing, optimizer, scaler, batch.global_size, rule)
        told = step(batch, lr)
    _check_loss(told.loss, model, batch, lr, label_smoothing, averager.comm)
    if told.overflowed and (not scaler.enabled or scale <= scaler.floor):
        error = scaler.refusal(scale)
        raise _explained(error, model, batch, scaler, scale, label_smoothing, averager.comm)
    return StepResult(told.loss, told.correct, batch.global_size, stop)


def _check_loss(loss: float, model: Module, batch: Batch, lr: float, label_smoothing: float, comm: Comm) -> None:
    """Raise NonFiniteLoss if it is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(
            f"the loss is {loss} in epoch {batch.epoch + 1}, step {batch.step + 1}, at learning rate {lr:.3g}; "
            "this step changed no parameter and saved nothing. Try a lower learning rate, a longer warm-up or "
            "--clip 1, and check the images for NaN; --resume goes on from the last checkpoint"
            + _named_overflow(model, batch, 1.0, label_smoothing, comm, _remedy())
        )


def _explained(
    error: NonFiniteGradient,
    model: Module,
    batch: Batch,
    scaler: LossScaler,
    scale: float,
    label_smoothing: float,
    comm: Comm,
) -> NonFiniteGradient:
    """The error with the place of the step, the first layer that overflowed, and what to do."""
    advice = _remedy() if scaler.dynamic or scaler.looks_only else "with a smaller --loss-scale, or a dynamic one"
    where = _named_overflow(model, batch, scale, label_smoothing, comm, advice)
    return NonFiniteGradient(f"{error} in epoch {batch.epoch + 1}, step {batch.step + 1}{where}")


def _seed(batch: Batch, scale: float) -> np.ndarray:
    """The gradient that backward begins with. Of a sum over a rank's part of the global batch it makes the mean over
    all of it, however unequal the parts are. An array, so that a recorded step takes the scale of each step."""
    return np.array(scale / batch.global_size, np.float32)


def overflow_of_step(model: Module, batch: Batch, scale: float = 1.0, label_smoothing: float = 0.0) -> Overflow | None:
    """The first array that is not finite in a training step with these images and this loss scale; None if all are.

    The step is taken with a copy of the model, on this rank alone: see precision.first_overflow.
    """

    def step(twin: Module) -> None:
        x, y, seed = (Tensor(a).to(model.device) for a in (batch.x, batch.y, _seed(batch, scale)))
        with random.keyed(batch.epoch, batch.index):
            F.cross_entropy(twin(at_entrance(x)), y, label_smoothing, reduction="sum").backward(seed)

    return first_overflow(model, step)


def _remedy() -> str:
    """Where a loss scale is no help: bfloat16 overflows no sooner than float32."""
    return "with --use precision=bf16, or in float32" if precision.value == "fp16" else "at a lower learning rate"


def _named_overflow(model: Module, batch: Batch, scale: float, label_smoothing: float, comm: Comm, advice: str) -> str:
    """For the end of an error in half precision: what the ranks' microscopes see, and what to do. Collective."""
    if precision.value == "fp32":
        return ""
    found = overflow_of_step(model, batch, scale, label_smoothing)
    texts = [(rank, text) for rank, text in enumerate(comm.all_gather_object(found and str(found))) if text]
    if not texts:
        return ". A second look at this step finds no layer with an infinity or NaN"
    rank, text = texts[0]
    where = f" on rank {rank}" if comm.size > 1 else ""
    return f". The first to overflow{where} is {text}. In half precision such a step cannot be taken: train {advice}"


_recordings: WeakKeyDictionary[Module, tuple[list, Any]] = WeakKeyDictionary()  # with what they were made for


def _kept(model: Module, batch: Batch, make: Callable[[], Any], *made_with: Any) -> Any:
    """What `make` records: once for each model, and anew if anything has changed that is not in the arrays."""
    key: list[Any] = [batch.x.shape, batch.x.dtype, batch.y.shape, batch.y.dtype]
    key += [*(x if isinstance(x, int | float | tuple) else _Same(x) for x in made_with), dispatch.choices_in_force()]
    for _, module in model.named_modules():
        key += [module.training, *((k, v) for k, v in vars(module).items() if isinstance(v, int | float | str))]
    key += [_Same(x) for p in model.parameters() for x in (p, p.data, p.grad_buffer, p.requires_grad)]
    made_for, recording = _recordings.get(model, (None, None))
    if recording is None or made_for != key:
        _recordings.pop(model, None)  # its memory is for the next one
        try:
            recording = make()
        except (CaptureError, HostError) as error:
            error.add_note("(the switch graph=off trains without capturing)")
            raise
        _recordings[model] = key, recording
    return recording


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
            logits = model(at_entrance(Tensor(batch.x).to(model.device)))
            seconds += time.perf_counter() - start
            loss += F.cross_entropy(logits, to_device(batch.y, logits.device), reduction="sum").item()
            confusion += confusion_matrix(to_device(batch.y, "cpu"), logits.numpy().argmax(axis=1), num_classes)
    model.train(training)
    totals: Any = comm.all_reduce(np.append(confusion.ravel(), [loss, stop()]))
    confusion, (loss, stopped) = totals[:-2].reshape(confusion.shape).astype(np.int64), totals[-2:].tolist()
    seconds = max(comm.all_gather_object(seconds))
    return Evaluation(loss / max(1, confusion.sum()), confusion, seconds, stopped > 0)
