"""All buckets in one launch, whatever their number, and the loss scale; the kernels are in multi_tensor.cu."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..dispatch import device_of, to_device
from ..multi_tensor import (
    ADAM_COLUMNS,
    SGD_COLUMNS,
    found_nonfinite_,
    multi_adam_update,
    multi_sgd_update,
    update_scale_,
)
from .launch import REALS, Kernel
from .source import macros
from .tunable import Tunable

CHUNKS = Tunable(
    "64 numbers for each of 256 threads: for ResNet-18 682 blocks, several for each of a hundred multiprocessors",
    macros("multi_tensor.cu", "THREADS", "CHUNK"),
    dict(CHUNK=4096),
    dict(CHUNK=65536),
    dict(THREADS=128),
)

FOUND_NONFINITE, SGD, ADAM, UPDATE_SCALE = (
    Kernel("multi_tensor.cu", name, tunable)
    for name, tunable in (
        ("found_nonfinite", CHUNKS),
        ("multi_sgd", CHUNKS),
        ("multi_adam", CHUNKS),
        ("update_scale", None),
    )
)

_layouts: dict[tuple, tuple[Any, Any]] = {}


def _layout(arrays, device):
    """The chunks (count, 2) of arrays, each as its array's number and its own, and the arrays' sizes: on the device,
    where they are kept for good, as a recorded launch may read them later."""
    sizes, each = tuple(a.size for a in arrays), CHUNKS["CHUNK"]
    if (sizes, each, device) not in _layouts:
        chunks = [(which, chunk) for which, size in enumerate(sizes) for chunk in range(-(-size // each))]
        tables = np.array(chunks, np.int32), np.array(sizes, np.int64)
        _layouts[sizes, each, device] = tuple(to_device(table, device) for table in tables)
    return _layouts[sizes, each, device]


def _flat(*lists):
    """Whether these are (n,) arrays of one dtype, not all empty, and those of one place of one size; or None."""
    arrays = [a for held in lists for a in held if a is not None]
    sizes = (len({a.size for a in held if a is not None}) == 1 for held in zip(*lists, strict=True))
    alike = any(a.size for a in arrays) and all(
        a.dtype == arrays[0].dtype and a.ndim == 1 and a.flags.c_contiguous for a in arrays
    )
    return alike and all(sizes) and arrays[0].dtype in REALS


def _numbers(control, hyper, columns, found):
    fits = control.dtype == hyper.dtype == np.float64 and control.shape == (5,) and hyper.shape[1:] == (len(columns),)
    return fits and _flag(found)


def _flag(found):
    return found is None or (found.dtype == np.int32 and found.shape == (1,))


def _run(kernel, control, hyper, data, *lists, found):
    chunks, sizes = _layout(data, device_of(control))
    kernel((len(chunks),), (CHUNKS["THREADS"],), chunks, sizes, data, *lists, hyper, control, found)


@found_nonfinite_.variant("cuda", device="cuda", supports=lambda grads, found: _flat(grads) and _flag(found))
def found_nonfinite_cuda(grads, found):
    """one launch for all, which reads each gradient once"""
    chunks, sizes = _layout(grads, device_of(found))
    FOUND_NONFINITE((len(chunks),), (CHUNKS["THREADS"],), chunks, sizes, grads, found)


def _able_sgd(control, hyper, data, grads, momentum_buffers, found=None):
    return _numbers(control, hyper, SGD_COLUMNS, found) and _flat(data, grads, momentum_buffers)


@multi_sgd_update.variant("cuda", device="cuda", supports=_able_sgd)
def multi_sgd_update_cuda(control, hyper, data, grads, momentum_buffers, found=None):
    """one launch for all: every array is read once and written once"""
    _run(SGD, control, hyper, data, grads, momentum_buffers, found=found)


def _able_adam(control, hyper, data, grads, exp_avgs, exp_avg_sqs, found=None):
    return _numbers(control, hyper, ADAM_COLUMNS, found) and _flat(data, grads, exp_avgs, exp_avg_sqs)


@multi_adam_update.variant("cuda", device="cuda", supports=_able_adam)
def multi_adam_update_cuda(control, hyper, data, grads, exp_avgs, exp_avg_sqs, found=None):
    """one launch for all: every array is read once and written once"""
    _run(ADAM, control, hyper, data, grads, exp_avgs, exp_avg_sqs, found=found)


@update_scale_.variant("cuda", device="cuda", supports=lambda control, found, *rest, **more: _flag(found))
def update_scale_cuda(control, found, growth=2.0, backoff=0.5, interval=2000, floor=1.0):
    """one thread, which asks the host for nothing"""
    UPDATE_SCALE((1,), (1,), control, found, float(growth), float(backoff), interval, float(floor))
