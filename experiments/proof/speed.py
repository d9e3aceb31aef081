"""How fast: each ladder against what the GPU can do at most, launches, and copies between host and device.

On the emulator the ladders are counted in place of timed, and the rest has nothing to say.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from nanocnn.bench import arguments, shape_of
from nanocnn.kernels import dispatch
from nanocnn.kernels.dispatch import to_device
from nanocnn.kernels.elementwise import relu
from nanocnn.ladder import REFUSED
from nanocnn.sweep import seconds_by_events
from nanocnn.traffic import count, on_emulator

from . import Context, Row, not_run, section

# Primitive, dtype, sizes on a GPU, sizes in the emulator. Convolutions are those of ResNet-18 at batch 128.
PRODUCTS = (
    ("matmul", "float32", dict(m=4096, k=4096, n=4096), dict(m=64, k=64, n=64)),
    ("matmul", "float16", dict(m=4096, k=4096, n=4096), dict(m=64, k=64, n=64)),
    *(
        (name, dtype, dict(layer=layer), dict(batch=2, size=8, channels=16, out_channels=16))
        for name in ("conv2d", "conv2d_grad_x", "conv2d_grad_w")
        for dtype in ("float32", "float16")
        for layer in ("resnet18.layer1", "resnet18.layer3")
    ),
)
# On a GPU, images of 67 MB in both types: the numbers of a call do not fit into any L2.
STREAMS = tuple(
    (name, dtype, dict(batch=batch), dict(batch=2, size=8, channels=16))
    for dtype, batch in (("float32", 256), ("float16", 512))
    for name in (
        *("relu", "relu_grad", "epilogue", "batch_norm_stats", "batch_norm_apply", "batch_norm_grad_stats"),
        *("batch_norm_grad", "bias_grad", "max_pool2d", "max_pool2d_grad", "dropout_grad"),
        *(("sgd_update", "adam_update") if dtype == "float32" else ()),  # parameters are float32
    )
)
ONCE, MOST = 0.1, 50  # seconds of calls between two events, about, and how many at most


def timed(call: Callable[[], Any]) -> float:
    """Seconds of a call, by events: as many calls as fit in a moment."""
    once = seconds_by_events(call, 1)
    return seconds_by_events(call, int(max(1, min(MOST, ONCE / max(once, 1e-6)))))


def ceilings() -> dict[str, float]:
    """Bytes a second of a copy within the device, and operations a second of cuBLAS at 4096, measured now."""
    import cupy

    source = cupy.ones(1 << 28, cupy.float32)  # 1 GiB
    target = cupy.empty_like(source)
    found = {"copy": 2 * source.nbytes / timed(lambda: cupy.copyto(target, source))}
    random = np.random.default_rng(0).standard_normal((4096, 4096), np.float32)  # of ones, a GPU needs less power
    for dtype in ("float32", "float16"):
        a = cupy.asarray(random.astype(dtype))
        found[dtype] = 2 * 4096**3 / timed(lambda a=a: a @ a)
    return found


@section(seconds=50)
def ladders(context: Context) -> Iterator[Row]:
    """each ladder: TFLOP/s or GB/s against the measured ceilings; on the emulator, counted traffic"""
    top = ceilings() if context.on_gpu else {}
    for name, value in top.items():
        yield dict(ladder="ceiling", variant=name, rate=value / 1e12, unit="TB/s" if name == "copy" else "TFLOP/s")
    counted = set()
    for name, dtype, large, small in (*PRODUCTS, *STREAMS):
        if not context.on_gpu and (name, dtype) in counted:
            continue  # another layer on a GPU, the same small one here
        counted.add((name, dtype))
        try:
            if context.on_gpu:
                yield from _timed_ladder(name, dtype, large, top)
            else:
                yield from _counted_ladder(name, dtype, small)
        except Exception as error:
            yield dict(ladder=name, dtype=dtype, ok=False, note=f"{type(error).__name__}: {error}")


def _counted_ladder(name: str, dtype: str, sizes: dict[str, int]) -> Iterator[Row]:
    for c in count(name, *arguments(name, shape_of(**sizes), dtype)):
        if not c.note:
            row: Row = dict(ladder=name, dtype=dtype, variant=c.variant, sectors=c.report.total("global").units)
            yield row | dict(turns=c.report.total("shared").units, barriers=c.report.barriers, error=c.error)
        elif not c.note.startswith(REFUSED):
            yield dict(ladder=name, dtype=dtype, variant=c.variant, note=c.note)


def _timed_ladder(name: str, dtype: str, large: dict[str, Any], top: dict[str, float]) -> Iterator[Row]:
    p = dispatch.primitives[name]
    call = arguments(name, shape_of(**large), dtype)
    flops, moved = p.count_work(*call) if p.count_work else (0.0, 0.0)
    given = on_emulator(call, "cuda")
    product = name == "matmul" or name.startswith("conv2d")
    work, roof = (flops, top[dtype]) if product else (moved, top["copy"])
    label = f"{name} {' '.join(map(str, large.values()))}".strip()
    for variant in p.rungs("cuda").values():
        if not variant.supports(*given):
            continue
        rate = work / timed(lambda v=variant: v.body(*given))
        row: Row = dict(ladder=label, dtype=dtype, variant=variant.name, rate=rate / 1e12, share=rate / roof)
        yield row | dict(unit="TFLOP/s" if product else "TB/s")


@section(seconds=10)
def launches(context: Context) -> Iterator[Row]:
    """what a launch costs the host, and what it costs when they come one after the other"""
    if not context.on_gpu:
        yield not_run("launch overhead")
        return
    x = to_device(np.ones(32, np.float32), "cuda")
    calls: dict[str, Callable[[], Any]] = {
        "a kernel of ours, by dispatch": lambda: relu(x),
        "the same, its body alone": lambda: relu.variants["cuda"].body(x),
        "CuPy's x + x": lambda: x + x,
    }
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        for _ in range(1000):
            call()
        host = (time.perf_counter() - start) / 1000
        yield dict(launch=name, host_us=host * 1e6, by_events_us=seconds_by_events(call, 1000) * 1e6)


@section(seconds=15)
def copies(context: Context) -> Iterator[Row]:
    """from host to device: pageable, pinned, and pinned while a matrix product runs"""
    if not context.on_gpu:
        yield not_run("copies")
        return
    import cupy

    size = 1 << 28
    there = cupy.empty(size, cupy.uint8)
    pageable = np.ones(size, np.uint8)
    pinned = np.frombuffer(cupy.cuda.alloc_pinned_memory(size), np.uint8, size)
    stream = cupy.cuda.Stream(non_blocking=True)
    a = cupy.ones((8192, 8192), cupy.float32)

    def seconds(*works: Callable[[], Any]) -> float:
        for work in works:
            work()
        cupy.cuda.Device().synchronize()
        start = time.perf_counter()
        for work in works:
            work()
        cupy.cuda.Device().synchronize()
        return time.perf_counter() - start

    def copy_pinned() -> None:
        there.set(pinned, stream=stream)

    alone, product = seconds(copy_pinned), seconds(lambda: a @ a)
    both = seconds(copy_pinned, lambda: a @ a)
    yield dict(copy="pageable", GB_per_s=size / seconds(lambda: there.set(pageable)) / 1e9)
    yield dict(copy="pinned", GB_per_s=size / alone / 1e9)
    hidden = (alone + product - both) / min(alone, product)  # 1: the shorter one costs nothing
    yield dict(copy="pinned, while a product runs", GB_per_s=size / alone / 1e9, hidden=hidden)
