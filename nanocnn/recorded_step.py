"""A whole training step of a device in one recording: forward, backward, the test for overflow, update, loss scale.
And forward and backward alone, for the rest.

On a GPU that is one CUDA graph. What changes from step to step lies on the device (kernels/multi_tensor.py, `control`):
the learning rate is written there before each step, the count of updates and the loss scale change there. After the
step the host reads one small array, and with it knows all that it must: the loss, the number of correct predictions,
whether a gradient overflowed, and the state of the loss scaler. Between, it waits for nothing.

Not the whole step: where ranks sum gradients, for which the host works or waits; where the update asks the host (LARS,
Adagrad, clipping); and on the CPU, where the update is a few calls. There forward and backward are recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .capture import capture
from .data import Batch
from .kernels.dispatch import aside, to_device, xp_of
from .kernels.multi_tensor import GOOD, LR, SCALE, SKIPPED, STEP, found_nonfinite_, update_scale_
from .optim import Optimizer
from .parallel import GradientAverager
from .precision import LossScaler
from .tensor import Tensor

NEVER = 2**31 - 1


class Told(NamedTuple):
    """What the device tells of a step: sums over the batch, and whether the loss or a gradient was not finite."""

    loss: float
    correct: int
    overflowed: bool


class RecordedStep:
    """`forward_backward(x, y, seed)` returns the loss and the logits, and leaves gradients: see train.py."""

    def __init__(
        self,
        forward_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        optimizer: Optimizer,
        scaler: LossScaler,
        device: str,
        batch: Batch,
    ):
        self.optimizer, self.scaler, self.device = optimizer, scaler, device
        self.control = optimizer.control()
        self.found = to_device(np.zeros(1, np.int32), device)
        self._written: tuple | None = None  # what the device knows of the host's counters
        grads = [bucket.grad for bucket in optimizer.buckets]
        changing = scaler.enabled and scaler.dynamic
        rule = (scaler.growth, scaler.backoff, scaler.interval, scaler.floor) if changing else (1.0, 1.0, NEVER, 0.0)
        share = 1 / batch.global_size

        def step(x: Tensor, y: Tensor) -> Tensor:
            seed = (self.control[SCALE] * share).astype(np.float32)
            loss, logits = forward_backward(x, y, Tensor(seed))
            for bucket in optimizer.buckets:
                bucket.fill_missing()
            xp = xp_of(self.control)
            found_nonfinite_(grads, self.found)
            self.found |= ~xp.isfinite(loss.data)
            optimizer.apply(self.found)
            correct = (logits.data.argmax(axis=1) == y.data).sum()
            seen = [loss.data, correct, self.found]
            told = [value.reshape(1).astype(np.float64) for value in seen]
            update_scale_(self.control, self.found, *rule)
            return Tensor(xp.concatenate([*told, self.control]))

        self._write()
        self._step = capture(step, *(to_device(a, device) for a in (batch.x, batch.y)))

    def __call__(self, batch: Batch, lr: float) -> Told:
        """Take the step, and tell the optimiser and the scaler of the host what they are now."""
        self.optimizer.control()  # its hyper-parameters may have changed
        self._write()
        self.control[LR : LR + 1] = to_device(np.array([lr]), self.device)
        loss, correct, overflowed, *control = self._step(batch.x, batch.y).numpy().tolist()
        self.optimizer.steps = int(control[STEP])
        if self.scaler.enabled:
            self.scaler.scale, self.scaler.skipped = control[SCALE], int(control[SKIPPED])
            self.scaler.good = int(control[GOOD])
        self._written = self._counters()
        return Told(loss, int(correct), bool(overflowed))

    def _counters(self) -> tuple:
        return 0.0, self.optimizer.steps, self.scaler.scale, self.scaler.good, self.scaler.skipped

    def _write(self) -> None:
        """Send the counters to the device, if somebody else has changed them: at the start, after a checkpoint."""
        if self._written != self._counters():
            self._written = self._counters()
            self.control[...] = to_device(np.array(self._written, np.float64), self.device)


class RecordedBackward:
    """`forward_backward` alone, on any device: called as it is, and then every gradient is there, if need be as zeros.

    No bucket leaves while backward runs: what a graph does when it is launched, Python does not hear of, and each rank
    records when it has to. So `averager.finish()` sums them all.
    """

    def __init__(
        self,
        forward_backward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        averager: GradientAverager,
        example: list[Any],
    ):
        self.averager = averager

        def work(*inputs: Tensor) -> tuple[Tensor, Tensor]:
            results = forward_backward(*inputs)
            for bucket in averager.buckets:
                aside(bucket.fill_missing)
            return results

        with averager.no_sync():
            self._work = capture(work, *example)

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        """The loss and the logits."""
        with self.averager.no_sync():  # on the CPU the calls by which gradients announce themselves are made again
            results = self._work(*inputs)
        for bucket in self.averager.buckets:
            for p in bucket.params:
                p.grad = p.grad_buffer  # somebody may have forgotten it since
        return results
