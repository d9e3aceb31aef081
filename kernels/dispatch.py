"""Primitives, variants and switches: every choice that makes nanocnn faster is declared through this file.

A *primitive* maps arrays to arrays. Its first body is the reference, plain `xp` code that runs on NumPy and on CuPy;
faster *variants* are registered beside it, in ascending order, so that a kernel file reads as a ladder. A *switch* is a
named choice that is no kernel. `using()` chooses, `board()` lists; nothing else in the project keeps such a list.

    @Primitive
    def relu(x): return xp_of(x).maximum(x, 0)          # the reference

    @relu.variant("numba", device="cpu")                # the next rung
    def relu_numba(x): ...

    with using("reference", relu="numba"): ...
    with using(conv2d="upto:blocked"): ...              # `blocked` where it can, else the nearest rung before it
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .emulated_array import Emulated, emulated_numpy
from .narrow import is_float

POLICIES = {
    "fastest": "the last variant of each ladder that supports the arguments: a fixed rule, alike on every rank and run",
    "tuned": "measure the variants once for each shape and keep the answer in a file",
    "reference": "the first body of each primitive: plain NumPy or CuPy code",
}
UP_TO = "upto:"  # conv2d="upto:blocked": "fastest" on a ladder that ends with the rung `blocked`


class ChoiceError(ValueError):
    """An unknown name or choice, or a variant that cannot do what was asked of it; the message lists what exists."""


class DeviceError(RuntimeError):
    """A device that this machine does not have; the message says what to install."""


# ------------------------------------------------------------------ devices: the device is the type of the array

DEVICES = {
    "cpu": "NumPy arrays; kernels by NumPy and Numba",
    "cuda": "CuPy arrays; kernels by cuBLAS and CUDA",
    "emulated": "the same CUDA kernels, compiled by g++ and run on the CPU, to learn from and to test",
}


def xp_of(array: Any):
    """The module that made `array`, `numpy` or `cupy`; for the device `emulated`, one that does as NumPy does."""
    if isinstance(array, Emulated):
        return emulated_numpy
    if isinstance(array, np.ndarray | np.generic):
        return np
    if type(array).__module__.partition(".")[0] == "cupy":
        import cupy

        return cupy
    raise TypeError(f"expected a NumPy or CuPy array, got {type(array).__name__}")


def device_of(array: Any) -> str:
    """`"cpu"`, `"cuda"` or `"emulated"`."""
    if isinstance(array, Emulated):
        return "emulated"
    return "cpu" if xp_of(array) is np else "cuda"


def demand_one_device(where: str, arrays: Iterable[Any]) -> None:
    """Raise DeviceError if the arrays that meet in `where` are of several devices."""
    found = list(dict.fromkeys(map(device_of, arrays)))
    if len(found) > 1:
        raise DeviceError(
            f"{where} was given arrays of two devices, {' and '.join(found)}: move one of them, "
            f"by Tensor.to('{found[0]}') or Module.to('{found[0]}')"
        )


def to_device(array: Any, device: str):
    """`array` on one of DEVICES; the same object if it is there already.

    Raises DeviceError without a GPU, with what is missing (kernels/cuda/device.py), and MemoryError if it has no room.
    """
    if device not in DEVICES:
        raise DeviceError(f"unknown device {device!r}: expected one of {', '.join(DEVICES)}")
    if device == device_of(array):
        return array
    array = array if device_of(array) == "cpu" else array.get()
    if device == "cpu":
        return array
    if device == "emulated":
        return emulated_numpy.array(array, order="C")
    from .cuda import device as gpu  # which imports this file

    gpu.check()
    import cupy

    try:
        return cupy.asarray(array, order="C")  # as kernels want it, whatever NumPy has
    except MemoryError as error:
        error.add_note(f"an array to be moved to the device: {describe((array,), {})}")
        raise
    except Exception as error:  # what no check foresees, in CuPy's own words
        raise DeviceError(
            f"cannot use the device 'cuda': {type(error).__name__}: {error}. See whether nvidia-smi finds the GPU; "
            f"{gpu.ELSEWHERE}"
        ) from error


# ------------------------------------------------------------------ the board

primitives: dict[str, Primitive] = {}
switches: dict[str, Switch] = {}
_policy = "fastest"
_choices: dict[str, str] = {}


def _place(depth: int) -> str:
    frame = sys._getframe(depth + 1)
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


class Switch:
    """A named choice that is no kernel, declared once, where it acts.

    overlap = Switch("overlap", "when buckets are reduced", on="while backward still runs", off="after it")
    if overlap.value == "on": ...

    The first choice is the default. `about` and the choices' texts are what the board prints.
    """

    def __init__(self, name: str, about: str, **choices: str):
        _claim(name)
        self.name, self.about, self.choices = name, about, choices
        self.default = next(iter(choices))
        self.asked = False  # whether anything has looked at it: a switch that nobody asked changed nothing
        self.place = _place(1)
        switches[name] = self

    @property
    def value(self) -> str:
        self.asked = True
        return _choices.get(self.name, self.default)


def _claim(name: str) -> None:
    if name in primitives or name in switches or name in POLICIES:
        raise ChoiceError(f"the name {name!r} is taken: primitives, switches and policies share one board")


def board() -> list[dict[str, Any]]:
    """Each primitive and switch: name, kind, choices (name -> what it does), current choice, about, place."""
    rows = []
    for p in primitives.values():
        choices = {v.name: f"{_first_line(v.__doc__)} ({v.place})" for v in p.variants.values()}
        current = _choices.get(p.name, _policy)
        rows.append(
            dict(
                name=p.name,
                kind="primitive",
                choices=choices,
                current=current,
                about=_first_line(p.__doc__),
                place=p.place,
            )
        )
    for s in switches.values():
        rows.append(
            dict(
                name=s.name,
                kind="switch",
                choices=dict(s.choices),
                current=_choices.get(s.name, s.default),
                about=s.about,
                place=s.place,
            )
        )
    return rows


def choices_in_force() -> dict[str, str]:
    """What `using()` has set, with the policy: what a result file records."""
    return {"policy": _policy, **{s.name: s.default for s in switches.values()}, **_choices}


def variants_that_ran() -> dict[str, list[str]]:
    """For each primitive that was called, the variants that did the work, in the order of its ladder."""
    return {p.name: [name for name in p.variants if name in p.ran] for p in primitives.values() if p.ran}


def switches_asked() -> dict[str, str]:
    """The switches that the run has looked at so far, with their values: the others made no difference to it."""
    return {s.name: _choices.get(s.name, s.default) for s in switches.values() if s.asked}


def use(*policy: str, **choices: str) -> None:
    """Set a policy and choices until further notice: `using()` for scripts. Raises ChoiceError on an unknown name."""
    global _policy, _choices
    _policy, _choices = _checked(policy, choices)


@contextlib.contextmanager
def using(*policy: str, **choices: str) -> Iterator[None]:
    """Choose inside a `with` block: `using("fastest", im2col="reference", overlap="off")`.

    The choice holds for the process, not for one thread: a run has one configuration, and its background threads
    must see it too.
    """
    with put_in_force(_checked(policy, choices)):
        yield


def in_force() -> tuple[str, dict[str, str]]:
    """The policy and the choices, for `put_in_force`."""
    return _policy, _choices


@contextlib.contextmanager
def put_in_force(choices: tuple[str, dict[str, str]]) -> Iterator[None]:
    """Inside, what was in force once is in force again."""
    global _policy, _choices
    before, (_policy, _choices) = (_policy, _choices), choices
    try:
        yield
    finally:
        _policy, _choices = before


def _checked(policy: tuple[str, ...], choices: dict[str, str]) -> tuple[str, dict[str, str]]:
    if len(policy) > 1:
        raise ChoiceError(f"one policy at a time, got {', '.join(policy)}")
    chosen = policy[0] if policy else _policy
    if chosen not in POLICIES:
        raise ChoiceError(f"unknown policy {chosen!r}: expected one of {', '.join(POLICIES)}")
    for name, choice in choices.items():
        entry = primitives.get(name) or switches.get(name)
        if entry is None:
            names = ", ".join(sorted([*primitives, *switches]))
            raise ChoiceError(f"unknown primitive or switch {name!r}; there are: {names} (python -m nanocnn switches)")
        if isinstance(entry, Primitive):
            allowed = list(dict.fromkeys([*entry.variants, *POLICIES]))
            known = choice in allowed or choice.removeprefix(UP_TO) in entry.variants
        else:
            allowed, known = list(entry.choices), choice in entry.choices
        if not known:
            more = f"; {UP_TO}NAME is the last rung up to NAME that can" if choice.startswith(UP_TO) else ""
            raise ChoiceError(f"{name} has no choice {choice!r}; there are: {', '.join(allowed)} ({entry.place}){more}")
    return chosen, {**_choices, **choices}


def parse_use(words: list[str]) -> tuple[tuple[str, ...], dict[str, str]]:
    """The words of `--use fastest im2col=reference` as the arguments of `using()`."""
    policy = tuple(word for word in words if "=" not in word)
    return policy, dict(word.split("=", 1) for word in words if "=" in word)


# ------------------------------------------------------------------ primitives


FLOATS = np.dtype(np.float32), np.dtype(np.float64)


def plain_floats(*args: Any, **kwargs: Any) -> bool:
    """What a Numba variant supports unless it says otherwise: float arrays all float32 or all float64."""
    found = None
    for a in (*args, *kwargs.values()):
        if isinstance(a, np.ndarray) and is_float(a.dtype):
            if a.dtype not in FLOATS or a.dtype != (found or a.dtype):
                return False
            found = a.dtype
    return found is not None


def anything(*args: Any, **kwargs: Any) -> bool:
    return True


def nothing(device: str) -> str:
    return ""


@dataclass
class Variant:
    """One body of a primitive. `device` None is any device; `supports` is called with the primitive's arguments.

    `auto` says whether "fastest" may take it: False for a rung to learn from, slower than the one before it; a function
    of the arguments where it depends on them. `lacks` says in words what it misses on a device, and how to get it.
    """

    name: str
    body: Callable
    device: str | None
    supports: Callable[..., bool]
    place: str
    auto: bool | Callable[..., bool] = True
    lacks: Callable[[str], str] = nothing

    def runs_on(self, device: str) -> bool:
        """Whether it takes arrays of a device. The emulator runs what is written for CUDA."""
        return self.device in (None, "cuda" if device == "emulated" else device) and not self.lacks(device)

    def pays(self, *args: Any, **kwargs: Any) -> bool:
        """Whether "fastest" may take it for this call."""
        return self.auto(*args, **kwargs) if callable(self.auto) else self.auto

    def __post_init__(self) -> None:
        self.__doc__ = self.body.__doc__


class Primitive:
    """Arrays to arrays, by one of several variants. The decorated function is the reference and names the primitive.

    `inplace=True` says that a call changes its arguments, so that it must not be repeated for measuring. `unkeyed`
    names arguments that change from call to call and not the time that it takes (a seed): "tuned" looks past them.
    """

    def __new__(cls, reference: Callable | None = None, **options: Any):
        if reference is None:  # @Primitive(inplace=True)
            return lambda fn: cls(fn, **options)
        return super().__new__(cls)

    def __init__(self, reference: Callable | None = None, *, inplace: bool = False, unkeyed: tuple[str, ...] = ()):
        assert reference is not None  # __new__ made a decorator of @Primitive(inplace=True)
        self.name = reference.__name__
        _claim(self.name)
        self.__doc__, self.__name__, self.__module__ = reference.__doc__, reference.__name__, reference.__module__
        self.__wrapped__ = reference
        self.inplace, self.unkeyed = inplace, unkeyed
        self.signature = inspect.signature(reference)
        if unknown := set(unkeyed) - set(self.signature.parameters):
            raise TypeError(f"{self.name} has no argument {', '.join(sorted(unknown))} to leave out of its key")
        self.ran: set[str] = set()  # names of the variants that were called: what a result file records
        self.place = _place_of(reference)
        self.count_work: Callable[..., tuple[float, float]] | None = None
        self.variants = {"reference": Variant("reference", reference, None, anything, self.place)}
        primitives[self.name] = self

    def variant(
        self,
        name: str,
        *,
        device: str = "cpu",
        supports: Callable[..., bool] = plain_floats,
        auto: bool | Callable[..., bool] = True,
        before: str | None = None,
        lacks: Callable[[str], str] = nothing,
    ) -> Callable:
        """Register the next rung, or with `before` the one before that rung. `supports(*args, **kwargs)` says whether
        it can do this call, `auto` (or `auto(*args, **kwargs)`) whether "fastest" should let it, and `lacks(device)` in
        words what it misses on one of its devices: then it does not run there, and the error says so."""
        if name in self.variants or name in POLICIES:
            raise ChoiceError(f"{self.name} already has a variant {name!r}")
        if name.startswith(UP_TO):
            raise ChoiceError(f"a variant of {self.name} cannot be called {name!r}: {UP_TO} begins a choice")

        if before is not None and before not in list(self.variants)[1:]:
            raise ChoiceError(f"{self.name} has no rung {before!r} before which {name!r} could stand")

        def register(body: Callable) -> Callable:
            names = list(self.variants)
            faster = {n: self.variants.pop(n) for n in (names[names.index(before) :] if before else [])}
            self.variants |= {name: Variant(name, body, device, supports, _place_of(body), auto, lacks), **faster}
            return body

        return register

    def work(self, count: Callable[..., tuple[float, float]]) -> Callable:
        """Register `count(*args) -> (flops, bytes)`, the least that a call must do: for GFLOP/s, GB/s, rooflines."""
        self.count_work = count
        return count

    def rungs(self, device: str) -> dict[str, Variant]:
        """The variants for arrays of a device, in the order of the ladder."""
        return {name: v for name, v in self.variants.items() if v.runs_on(device)}

    def candidates(self, *args: Any, **kwargs: Any) -> list[Variant]:
        """The variants that can do this call, in the order of the ladder."""
        device = device_of_call(args, kwargs)
        return [v for v in self.rungs(device).values() if v.supports(*args, **kwargs)]

    def choose(self, *args: Any, **kwargs: Any) -> Variant:
        """The variant that a call with these arguments runs. Raises ChoiceError if an explicit choice cannot."""
        choice = _choices.get(self.name, _policy)
        if choice == "reference":
            return self.variants["reference"]
        if choice == "tuned" and not self.inplace:
            from . import tuned  # which measures, and so needs what is defined here

            return tuned.choose(self, args, kwargs)
        device = device_of_call(args, kwargs)
        if choice in POLICIES:
            return self._first_able(reversed(self.variants.values()), "", device, args, kwargs)
        if choice.startswith(UP_TO):
            end = choice.removeprefix(UP_TO)
            rungs = itertools.dropwhile(lambda v: v.name != end, reversed(self.variants.values()))
            return self._first_able(rungs, end, device, args, kwargs)
        variant = self.variants[choice]
        if not variant.runs_on(device) or not variant.supports(*args, **kwargs):
            able = ", ".join(v.name for v in self.candidates(*args, **kwargs))
            missing = f" ({lacking})" if (lacking := variant.lacks(device)) else ""
            raise ChoiceError(
                f"{self.name}={choice} cannot do this call: {describe(args, kwargs)} on {device}{missing}; "
                f"variants that can: {able} ({variant.place})"
            )
        return variant

    def _first_able(self, rungs: Iterable[Variant], named: str, device: str, args: tuple, kwargs: dict) -> Variant:
        """The first of `rungs` that can do the call and is automatic or `named`; the reference, the last, always is."""
        for variant in rungs:
            if not variant.runs_on(device) or (variant.auto is False and variant.name != named):
                continue
            if variant.supports(*args, **kwargs) and (variant.name == named or variant.pays(*args, **kwargs)):
                return variant
        raise AssertionError("a ladder begins with the reference, which can do every call")

    def __call__(self, *args: Any, **kwargs: Any):
        variant = self.choose(*args, **kwargs)
        self.ran.add(variant.name)
        active = recorder  # one look: a profile may end in another thread while this call runs
        if active is None:
            return variant.body(*args, **kwargs)
        return active.kernel(self, variant, args, kwargs)

    def __repr__(self) -> str:
        return f"<Primitive {self.name}: {', '.join(self.variants)}>"


def _place_of(fn: Callable) -> str:
    code = inspect.unwrap(fn).__code__
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}"


def device_of_call(args: tuple, kwargs: dict) -> str:
    """That of all arrays among the arguments. Raises DeviceError if they are of several."""
    found = None
    for a in (*args, *kwargs.values()):
        if isinstance(a, NO_ARRAYS):
            continue
        device = device_of(a)
        if found is None:
            found = device
        elif device != found:
            arrays = [a for a in (*args, *kwargs.values()) if not isinstance(a, NO_ARRAYS)]
            demand_one_device(f"a call ({describe(args, kwargs)})", arrays)
    return found or "cpu"


NO_ARRAYS = int, float, str, tuple, list, dict, type(None), np.generic  # a number of NumPy goes with any device


def describe(args: tuple, kwargs: dict) -> str:
    """A call in words: shapes and dtypes of arrays, the values of the rest. Also in the key of a tuned choice."""

    def word(a: Any) -> str:
        if isinstance(a, list | tuple) and any(hasattr(i, "dtype") for i in a):
            return "[" + ", ".join(map(word, a)) + "]"
        return f"{a.dtype}{list(a.shape)}" if hasattr(a, "dtype") and hasattr(a, "shape") else repr(a)

    return ", ".join([*map(word, args), *(f"{k}={word(v)}" for k, v in kwargs.items())])


# ------------------------------------------------------------------ recording: what ran, when

recorder: Recorder | None = None  # set by nanocnn.profile and nanocnn.capture, for as long as they record


class Recorder:
    """What is told of every call of a primitive and of every `span`, and of layers by nn.Module."""

    def enter(self, name: str, kind: str) -> None:
        """A span, or a kernel, begins."""

    def leave(self, start: float, stop: float, **facts: Any) -> None:
        """The last one that began has ended."""

    def layer(self, module: Any) -> str:
        """A name for a module."""
        return type(module).__name__

    def op(self, op: Any, kind: str, function: Callable, args: tuple, kwargs: dict) -> Any:
        """Run an op's forward or backward, and return what it returns; here, as a span of that kind."""
        facts = {"layer": op.layer} if kind == "backward" else {}
        with span(type(op).__name__, kind, **facts):
            return function(*args, **kwargs)

    def aside(self, function: Callable, args: tuple) -> Any:
        """Run what was given to `aside`, and return what it returns."""
        return function(*args)

    def looked(self) -> None:
        """Somebody takes a value out of a tensor."""

    def kernel(self, primitive: Primitive, variant: Variant, args: tuple, kwargs: dict) -> Any:
        """Run the variant's body and return what it returns; here, as a span of the kind "kernel"."""
        start = time.perf_counter()
        self.enter(primitive.name, "kernel")
        try:
            return variant.body(*args, **kwargs)
        finally:
            stop = time.perf_counter()
            count = primitive.count_work
            flops, moved = count(*args, **kwargs) if count else (0, 0)
            shapes = describe(args, kwargs)
            self.leave(start, stop, variant=variant.name, flops=flops, bytes=moved, shapes=shapes)


def aside(function: Callable, *args: Any) -> Any:
    """function(*args): something that NumPy does with arrays beside what primitives do, such as a copy.

    Inside an op that calls primitives, it must be said so: a recording of the calls would not know of it.
    """
    return function(*args) if recorder is None else recorder.aside(function, args)


@contextlib.contextmanager
def span(name: str, kind: str, **facts: Any) -> Iterator[None]:
    """Mark a stretch of work (`kind`: layer, forward, backward, communication, data, update) for the profile."""
    active = recorder
    if active is None:
        yield
        return
    start = time.perf_counter()
    active.enter(name, kind)
    try:
        yield
    finally:
        active.leave(start, time.perf_counter(), **facts)


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Record nothing inside."""
    global recorder
    before, recorder = recorder, None
    try:
        yield
    finally:
        recorder = before
