"""The laboratory for the device `emulated`, where times say nothing: what one training step asks for is counted.

Our CUDA kernels are counted by the emulator. What NumPy does to arrays of the device, a matrix product or the
textbook's version of a layer, is CuPy's work on a GPU: each call one launch at least, which reads its arrays and writes
its result. So a call counts as one launch and those bytes. Of our kernels, bytes are 32 for each sector: what they ask
of the caches. How much of all that comes from memory is not simulated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

import nanocnn as nc
from nanocnn.data import DataSet
from nanocnn.kernels import dispatch, emulated_array
from nanocnn.kernels.cuda.emulated import counting
from nanocnn.kernels.emulated_array import Emulated

from laboratory import Configuration, Laboratory, Row, Training, progress_of  # isort: skip  (beside this file)

SECTOR = 32  # bytes


class Counted(Row):
    """A configuration and what one step of it asks for; the least is best, as of times."""

    @property
    def cost(self) -> float:
        """Megabytes that a step asks for."""
        return self.samples[0]["bytes"] / 1e6

    def figures(self) -> dict[str, Any]:
        """What was counted, and megabytes and their ratio to the base's."""
        return dict(self.samples[0], megabytes=self.cost) if self.measured else {}


class CountingLaboratory(Laboratory):
    """Counts configurations one after the other, in this process: nothing of it depends on what ran before."""

    row = Counted

    def look(self, configurations: Sequence[Configuration]) -> list[Row]:
        rows: list[Row] = [Counted(c) for c in configurations]
        with progress_of(len(rows)) as tell:
            for row in rows:
                tell(row.configuration.label)
                self._count(row)
        return rows

    def run(self, base: Row, rows: Sequence[Row], title: str) -> None:
        with progress_of(len(rows)) as tell:
            for row in (base, *rows):
                if not row.samples and not row.error:
                    tell(f"{title}: {row.configuration.label}")
                    self._count(row)
                if row.measured and base.measured:
                    row.samples[0]["ratio"] = row.samples[0]["bytes"] / base.samples[0]["bytes"]

    def _count(self, row: Row) -> None:
        c = row.configuration
        for switch in dispatch.switches.values():
            switch.asked = False
        try:
            with nc.using(c.policy, **c.choices):
                row.look, sample = _counted_step(self.data, self.model, self.options)
        except Exception as error:
            row.error = f"{type(error).__name__}: {error}"
        else:
            row.samples.append(sample)


def _counted_step(data: DataSet, model: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first step of a training that is warm, as what it calls and asks, and as what it asks for."""
    training = Training(data, model, options, options["seed"])
    with counting() as report, numpy_counted() as plain:
        loss = training.step()
    training.batches.close()
    units = report.total("global").units
    sample = dict(seed=options["seed"], loss=loss, kernels=sum(report.launches.values()), sectors=units)
    sample |= dict(turns=report.total("shared").units, barriers=report.barriers, calls=plain.calls)
    return training.look, sample | dict(bytes_of_numpy=plain.bytes, bytes=units * SECTOR + plain.bytes)


@dataclass
class Calls:
    """Of NumPy, on arrays of the device."""

    calls: int = 0
    bytes: int = 0


@contextmanager
def numpy_counted() -> Iterator[Calls]:
    """Count what NumPy does inside to arrays of the device: all that kernels/emulated_array.py hears of, less views."""
    found = Calls()
    made_by, of_ufunc, put = emulated_array._made_by, Emulated.__array_ufunc__, Emulated.__setitem__

    def add(*values: Any) -> None:
        found.calls += 1
        found.bytes += sum(a.nbytes for a in _arrays(values))

    def counted_ufunc(self: Any, ufunc: Any, method: str, *inputs: Any, **kwargs: Any) -> Any:
        result = of_ufunc(self, ufunc, method, *inputs, **kwargs)
        add(inputs, result)
        return result

    def counted_function(function: Any, args: tuple, kwargs: dict) -> Any:
        result, given = made_by(function, args, kwargs), [*args, *kwargs.values()]
        view = kwargs.get("out") is None and any(
            np.may_share_memory(a, b) for a in _arrays(result) for b in _arrays(given)
        )
        if not view and function not in emulated_array.UNINITIALISED:
            add(given, result)
        return result

    def counted_assignment(self: Any, index: Any, value: Any) -> None:
        add(value, self.view(np.ndarray)[index])
        put(self, index, value)

    try:
        emulated_array._made_by = counted_function
        Emulated.__array_ufunc__ = counted_ufunc  # type: ignore[method-assign,assignment]
        Emulated.__setitem__ = counted_assignment  # type: ignore[method-assign]
        yield found
    finally:
        emulated_array._made_by = made_by
        Emulated.__array_ufunc__, Emulated.__setitem__ = of_ufunc, put  # type: ignore[method-assign]


def _arrays(value: Any) -> list[np.ndarray]:
    """NumPy's, in tuples and lists too."""
    if isinstance(value, tuple | list):
        return [a for v in value for a in _arrays(v)]
    return [value.view(np.ndarray)] if isinstance(value, np.ndarray) else []
