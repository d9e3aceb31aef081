"""All of an optimiser's buckets in one call, and the loss scale, without the host: what a step needs is in memory.

With loss scaling a step is three calls:

    found_nonfinite_(grads, found)                                  # found becomes 1 if a gradient is inf or NaN
    multi_sgd_update(control, hyper, data, grads, buffers, found)   # unscale, decay, update; or nothing
    update_scale_(control, found)                                   # the scale grows, or backs off; the step counts

`control` (5,) and `hyper` (buckets, 5) are float64, `found` (1,) is int32, all on the device. Nothing is copied to the
host, so a recorded step can be made again with other numbers. Without loss scaling there is the call in the middle
alone: `found` is None, and the scale 1. The references update bucket by bucket, by the primitives of update.py.

The order of the columns is below. Micikevicius et al., "Mixed precision training" (ICLR 2018), section 3.2; the rule by
which the scale changes is that of PyTorch's GradScaler.
"""

from __future__ import annotations

import numpy as np

from .dispatch import Primitive, xp_of
from .update import adam_update, sgd_update

# `control`: the learning rate; how many updates were made; the loss scale; steps since it changed last; skipped steps
LR, STEP, SCALE, GOOD, SKIPPED = range(5)
# Columns of `hyper`. A bucket's rate is the learning rate times its RATE.
SGD_COLUMNS = RATE, MOMENTUM, DAMPENING, WEIGHT_DECAY, NESTEROV = range(5)
ADAM_COLUMNS = (RATE, BETA1, BETA2, EPS, ADAM_DECAY, DECOUPLED) = range(6)
LARGEST = float(np.finfo(np.float32).max)  # of a loss scale: the loss is float32


@Primitive(inplace=True)
def found_nonfinite_(grads, found):
    """Make found[0] 1 if one of the arrays (n,) has an infinity or NaN; else leave it: several calls add up."""
    for grad in grads:
        found |= ~xp_of(grad).isfinite(grad).all()


@found_nonfinite_.work
def _(grads, found):
    return sum(grad.size for grad in grads), sum(grad.nbytes for grad in grads)


def _buckets(scale, found, hyper, data, grads, *more):
    """For each bucket its row of `hyper`, its data, its gradient over the scale, ...; none where `found` is not 0."""
    if found is None or not found[0]:
        for row, w, grad, *rest in zip(hyper.tolist(), data, grads, *more, strict=True):
            yield row, w, grad if scale == 1 else grad * grad.dtype.type(1 / scale), *rest


@Primitive(inplace=True)
def multi_sgd_update(control, hyper, data, grads, momentum_buffers, found=None):
    """`sgd_update` of each bucket with its row of `hyper` (B, 5), from gradients that are multiplied by 1 / scale.

    data, grads, momentum_buffers: lists of (n,) arrays of one float dtype; a buffer is None without momentum. Where
    `found` is given and not 0, nothing happens.
    """
    lr, step, scale = control[:GOOD].tolist()
    for row, w, grad, buffer in _buckets(scale, found, hyper, data, grads, momentum_buffers):
        rate, momentum, dampening, decay, nesterov = row
        first = step == 0  # PyTorch starts the buffer with the whole gradient
        sgd_update(w, grad, buffer, lr * rate, momentum, 0.0 if first else dampening, decay, bool(nesterov))


@Primitive(inplace=True)
def multi_adam_update(control, hyper, data, grads, exp_avgs, exp_avg_sqs, found=None):
    """`adam_update` of each bucket with its row of `hyper` (B, 6); the rest is as with `multi_sgd_update`."""
    lr, step, scale = control[:GOOD].tolist()
    for row, w, grad, exp_avg, exp_avg_sq in _buckets(scale, found, hyper, data, grads, exp_avgs, exp_avg_sqs):
        rate, beta1, beta2, eps, decay, decoupled = row
        adam_update(w, grad, exp_avg, exp_avg_sq, step + 1, lr * rate, beta1, beta2, eps, decay, bool(decoupled))


def _moved(data, grads, *states):
    """Bytes: gradients are read, the rest is read and written."""
    both = sum(a.nbytes for held in (data, *states) for a in held if a is not None)
    return sum(g.nbytes for g in grads) + 2 * both


@multi_sgd_update.work
def _(control, hyper, data, grads, momentum_buffers, found=None):
    return 8 * sum(w.size for w in data), _moved(data, grads, momentum_buffers)


@multi_adam_update.work
def _(control, hyper, data, grads, exp_avgs, exp_avg_sqs, found=None):
    return 15 * sum(w.size for w in data), _moved(data, grads, exp_avgs, exp_avg_sqs)


@Primitive(inplace=True)
def update_scale_(control, found, growth=2.0, backoff=0.5, interval=2000, floor=1.0):
    """The loss scale after a step: `backoff` times, but not below `floor`, where `found`; after `interval` good steps
    `growth` times.

    Counts the updates that were made and the steps that were skipped, and makes `found` 0 again. With growth and
    backoff 1 the scale is static.
    """
    if found[0]:
        control[SCALE] = max(float(control[SCALE]) * backoff, floor)
        control[GOOD] = 0
        control[SKIPPED] += 1
    else:
        control[STEP] += 1
        control[GOOD] += 1
        if control[GOOD] >= interval:
            control[GOOD] = 0
            if control[SCALE] * growth <= LARGEST:
                control[SCALE] *= growth
    found[...] = 0


update_scale_.work(lambda control, found, *rest, **more: (0, 2 * (control.nbytes + found.nbytes)))
