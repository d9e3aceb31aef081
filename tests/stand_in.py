"""A stand-in for CuPy and for NVIDIA's driver, so that the code that asks them runs where neither is.

It answers what it is told to answer, under the names that CuPy 14 has; it computes nothing.
"""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.metadata
import sys
import types
from typing import Any

import numpy as np

from nanocnn.kernels.cuda import device


class Array:
    """What there is of an array before anything is computed: shape, dtype, place, and the GPU that it lies on."""

    def __init__(self, shape: tuple[int, ...], dtype: Any = np.float32, number: int = 0):
        self.shape, self.dtype, self.ndim = shape, np.dtype(dtype), len(shape)
        self.size = int(np.prod(shape))
        self.nbytes = self.size * self.dtype.itemsize
        self.data = types.SimpleNamespace(ptr=id(self))
        self.device = types.SimpleNamespace(id=number)
        self.flags = types.SimpleNamespace(c_contiguous=True)


Array.__module__ = "cupy"


class MemoryHook:
    """CuPy calls the hooks that are entered; here a test does."""

    entered: list[Any] = []  # noqa: RUF012

    def __enter__(self):
        self.entered.append(self)
        return self

    def __exit__(self, *_):
        self.entered.remove(self)


class Cupy(types.ModuleType):
    """The module `cupy`. `said` collects what it was asked to do."""

    def __init__(self, runtime: int = 13000, gpus: int = 1, capability: str = "90"):
        super().__init__("cupy")
        self.__spec__ = importlib.machinery.ModuleSpec("cupy", None)
        self.said: list[Any] = []
        self.pool = types.SimpleNamespace(used_bytes=lambda: 60_000_000_000, total_bytes=lambda: 70_000_000_000)
        self.get_default_memory_pool = lambda: self.pool
        self.current = 0
        stand_in = self

        class Device:
            compute_capability = capability

            def __init__(self, number: int | None = None):
                self.id = stand_in.current if number is None else number
                self.pci_bus_id = f"0000:{self.id:02x}:00.0"

            def use(self) -> None:
                stand_in.current = self.id

        self.cuda = types.ModuleType("cupy.cuda")
        self.cuda.__dict__.update(
            runtime=types.SimpleNamespace(
                runtimeGetVersion=lambda: runtime,
                getDeviceCount=lambda: gpus,
                memGetInfo=lambda: (1_000_000_000, 80_000_000_000),
                getDeviceProperties=lambda number: {"name": b"NVIDIA H200"},
            ),
            Device=Device,
            MemoryHook=MemoryHook,
            nvrtc=types.SimpleNamespace(getVersion=lambda: (runtime // 1000, 0)),
        )

    def asarray(self, array: np.ndarray, order: str = "K") -> Array:
        assert order == "C", "kernels take no other"
        return Array(array.shape, array.dtype, self.current)


def stand_in(monkeypatch: Any, folder: Any, driver: int = 13000, wheels: Any = ("cupy-cuda13x",), **facts: Any) -> Cupy:
    """Put one in CuPy's place, installed as `wheels`, and a driver for the CUDA of version `driver`; 0 is none."""
    for name in wheels:
        info = folder / f"{name.replace('-', '_')}-14.2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 14.2.0\n")

    def version(package: str) -> str:  # of what is installed in that folder alone
        for found in importlib.metadata.distributions(name=package, path=[str(folder)]):
            return found.version
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.syspath_prepend(folder)
    load = ctypes.CDLL

    def library(name: str, *rest: Any, **options: Any) -> Any:
        if name != device.DRIVER:
            return load(name, *rest, **options)
        if not driver:
            raise OSError(f"{name}: cannot open shared object file")

        def asked(number: Any) -> int:
            number._obj.value = driver  # ctypes.byref's
            return 0

        return types.SimpleNamespace(cuDriverGetVersion=asked)

    monkeypatch.setattr(ctypes, "CDLL", library)
    cupy = Cupy(**facts)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    monkeypatch.setitem(sys.modules, "cupy.cuda", cupy.cuda)
    forget()
    return cupy


def forget() -> None:
    """What was found out about the GPU."""
    device.check.cache_clear()
    device._capability.cache_clear()


class Stream:
    """A stream whose GPU reaches what is put into it when `pass_until` says so; its clock is that of a test, in ms."""

    def __init__(self):
        self.milliseconds = 0.0
        self.reached = 0.0
        self.waited = 0

    def event(self) -> Any:
        stream = self

        class Event:
            time = 0.0

            @property
            def done(self) -> bool:
                return self.time <= stream.reached

            def synchronize(self) -> None:
                stream.waited += 1
                stream.reached = max(stream.reached, self.time)

        return Event()

    def record(self, event: Any = None) -> Any:
        event = event or self.event()
        event.time = self.milliseconds
        return event

    def elapsed(self, start: Any, stop: Any) -> float:
        assert start.done
        assert stop.done, "CuPy raises cudaErrorNotReady"
        return stop.time - start.time


class Ranges:
    """`cupy.cuda.nvtx`"""

    available = True

    def __init__(self):
        self.open: list[str] = []
        self.seen: list[str] = []

    def RangePush(self, message: str, id_color: int = -1) -> None:
        self.open.append(message)
        self.seen.append("/".join(self.open))

    def RangePop(self) -> None:
        self.open.pop()
