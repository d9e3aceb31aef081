"""Arrays of the device `emulated`: NumPy's, which do as CuPy's do where a program could notice the difference.

What NumPy computes with one is of the device, too; a sum is an array of no axes, not a number. And what the device does
can be recorded (kernels/cuda/graph.py), as a GPU's stream can: then nothing is done to arrays that are there, and to
look at a value, or to send one, is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np


class HostError(RuntimeError):
    """The host looked at the device's values, or sent it some, while what the device does was recorded."""


recording: list[Callable[[], Any]] | None = None  # set by kernels/cuda/graph.py: what the device will have to do


class Emulated(np.ndarray):
    """An array of the device `emulated`, in the host's memory."""

    def get(self) -> np.ndarray:
        """A copy on the CPU, as CuPy's arrays have it."""
        return self._seen().copy()

    # ---------------------------------------------------------------- what NumPy is asked to compute

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, out: tuple = (), **kwargs: Any) -> Any:
        if recording is not None:
            _refuse_blas(ufunc)
            _refuse_the_hosts(ufunc.__name__, inputs)
        function = getattr(ufunc, method)
        plain, into = _plain(inputs), _plain(out)
        kwargs = {name: _plain(a) for name, a in kwargs.items()}
        if out or method == "at":
            change(lambda: function(*plain, **kwargs, **({"out": into} if out else {})))
            return out[0] if len(out) == 1 else (out or None)
        made = _wrapped(_quietly(lambda: function(*plain, **kwargs)))
        if recording is not None:
            room = _plain(made if isinstance(made, tuple) else (made,))
            recording.append(lambda: function(*plain, out=room, **kwargs))
        return made

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        return _made_by(function, args, kwargs)

    def __getitem__(self, index: Any) -> Any:
        if recording is not None:
            _refuse_the_hosts("an index", index if isinstance(index, tuple) else (index,))
            _refuse_masks(index)
        found = super().__getitem__(index)
        if not isinstance(found, np.ndarray):  # a number; as an array of no axes it is a place
            return super().__getitem__((*(index if isinstance(index, tuple) else (index,)), ...))
        return found if _is_view(found, self) else _made_by(operator.getitem, (self, index), {})

    def __iter__(self) -> Any:
        return (self[i] for i in range(len(self)))

    def __setitem__(self, index: Any, value: Any) -> None:
        if recording is not None:
            _refuse_the_hosts("an assignment", (value, *(index if isinstance(index, tuple) else (index,))))
        change(lambda: operator.setitem(_plain(self), _plain(index), _plain(value)))

    # ---------------------------------------------------------------- what the host may look at

    def _seen(self) -> np.ndarray:
        if recording is not None:
            raise HostError(
                f"the host looks at an array ({self.dtype}{list(self.shape)}) while what the device does is recorded: "
                "its values are not there yet. Do that outside of the recording"
            )
        return _plain(self)

    def item(self, *args: Any) -> Any:
        """One value, as a number of Python."""
        return self._seen().item(*args)

    def tolist(self) -> Any:
        """All values, as numbers of Python."""
        return self._seen().tolist()

    def __bool__(self) -> bool:
        return bool(self._seen())

    def __int__(self) -> int:
        return int(self._seen())

    def __float__(self) -> float:
        return float(self._seen())

    def __index__(self) -> int:
        return operator.index(self._seen())

    def __complex__(self) -> complex:
        return complex(self._seen())

    def __format__(self, how: str) -> str:
        return format(self._seen(), how)


def _method(name: str) -> Callable[..., Any]:
    numpys = getattr(np.ndarray, name)

    def method(self: Emulated, *args: Any, **kwargs: Any) -> Any:
        return _made_by(numpys, (self, *args), kwargs)

    return method


def _perhaps_a_view(name: str) -> Callable[..., Any]:
    numpys = getattr(np.ndarray, name)

    def method(self: Emulated, *args: Any, **kwargs: Any) -> Any:
        found = numpys(self, *args, **kwargs)
        return found if _is_view(found, self) else _made_by(numpys, (self, *args), kwargs)

    return method


# Methods that NumPy computes without asking anybody; but for those that are views, look at values, or are ufuncs' own.
VIEWS = ("diagonal", "getfield", "squeeze", "swapaxes", "transpose", "view")
HOSTS = ("dump", "dumps", "get", "item", "setflags", "tobytes", "tofile", "tolist", "to_device")
UFUNCS = ("all", "any", "max", "mean", "min", "prod", "std", "sum", "var")
for _name, _numpys in vars(np.ndarray).items():
    if not _name.startswith("_") and callable(_numpys) and _name not in (*VIEWS, *HOSTS, *UFUNCS):
        setattr(Emulated, _name, _perhaps_a_view(_name) if _name in ("reshape", "ravel") else _method(_name))


class EmulatedNumPy:
    """NumPy, whose new arrays are of the device `emulated`: what `cupy` is to `cuda`."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found):
            return found

        def on_the_device(*args: Any, **kwargs: Any) -> Any:
            if isinstance(found, np.ufunc):
                return _wrapped(found(*args, **kwargs))
            if recording is not None and found in SENDING:
                _refuse_the_hosts(f"xp.{name}()", args, even_numbers=True)
            return _made_by(found, args, kwargs)

        if isinstance(found, np.ufunc):
            setattr(on_the_device, "at", found.at)  # noqa: B010  mypy forbids it otherwise
        setattr(self, name, on_the_device)
        return on_the_device


SENDING = (np.array, np.asarray, np.ascontiguousarray)  # what the host has, to the device
IN_PLACE = (np.copyto, np.put, np.putmask, np.ndarray.fill, np.ndarray.put, np.ndarray.sort, np.ndarray.partition)
BY_VALUES = ("argwhere", "compress", "extract", "flatnonzero", "nonzero", "unique")  # by whose values the shape goes
UNINITIALISED = (np.empty, np.empty_like)
BLAS = ("dot", "einsum", "inner", "matmul", "matvec", "tensordot", "vdot", "vecdot", "vecmat")  # CuPy's own handle's

emulated_numpy = EmulatedNumPy()


# ------------------------------------------------------------------ done now, or recorded


def _is_view(x: np.ndarray, of: np.ndarray) -> bool:
    return np.may_share_memory(_plain(x), _plain(of))


def _plain(x: Any) -> Any:
    """The device's arrays as NumPy's, also in tuples and lists."""
    if isinstance(x, Emulated):
        return x.view(np.ndarray)
    return type(x)(map(_plain, x)) if type(x) in (tuple, list) else x


def _wrapped(x: Any) -> Any:
    """NumPy's arrays and numbers as arrays of the device, also in tuples and lists."""
    if isinstance(x, tuple | list):
        return tuple(map(_wrapped, x))
    return np.asarray(x).view(Emulated) if isinstance(x, np.ndarray | np.generic) else x


def change(compute: Callable[[], Any]) -> None:
    """What changes arrays that are there."""
    if recording is None:
        _quietly(compute)
    else:
        recording.append(compute)


def make_up_for(recorded: list[Callable[[], Any]]) -> None:
    """Do what was recorded, in order."""
    with np.errstate(all="ignore"):
        for compute in recorded:
            compute()


def _quietly(compute: Callable[[], Any]) -> Any:
    """Its result, without NumPy's warnings: a device gives none."""
    with np.errstate(all="ignore"):
        return compute()


def _made_by(function: Callable[..., Any], args: tuple, kwargs: dict) -> Any:
    """What a function of NumPy's makes of arrays of the device: views of them, or new ones."""
    arguments, named = _plain(args), {name: _plain(a) for name, a in kwargs.items()}

    def compute() -> Any:
        return function(*arguments, **named)

    if recording is not None:
        if getattr(function, "__name__", "") in BY_VALUES:
            raise HostError(f"{function.__name__}: how much it finds depends on values, {UNKNOWN}")
        _refuse_blas(function)
        _refuse_the_hosts(getattr(function, "__name__", "a function"), (*args, *kwargs.values()))
    if function in IN_PLACE or kwargs.get("out") is not None:
        change(compute)
        return kwargs.get("out")
    made = _wrapped(_quietly(compute))
    if recording is not None and function not in UNINITIALISED:
        own = [a for a in (*arguments, *named.values()) if isinstance(a, np.ndarray)]
        room = [_plain(m) for m in (made if isinstance(made, tuple) else (made,)) if isinstance(m, Emulated)]
        room = [m for m in room if not any(_is_view(m, a) for a in own)]
        if room:
            recording.append(lambda: _copy(compute(), room))
    return made


def _copy(found: Any, room: list[np.ndarray]) -> None:
    for x, y in zip(found if isinstance(found, tuple) else (found,), room, strict=True):
        np.copyto(y, x)


UNKNOWN = "which are not there while what the device does is recorded"


def _refuse_blas(function: Any) -> None:
    """Raise HostError for what CuPy lets cuBLAS or cuSOLVER compute, which it refuses while a stream is recorded."""
    name = getattr(function, "__name__", "")
    if name in BLAS or "linalg" in (getattr(function, "__module__", None) or ""):
        raise HostError(
            f"{name}: CuPy calls NVIDIA's libraries by a handle of its own, which cannot be recorded. The primitive "
            "`matmul` (kernels/matmul.py) can, and so can tensors' @"
        )


def _refuse_masks(index: Any) -> None:
    """Raise HostError if an array of truth values chooses: nobody knows how many."""
    for i in index if isinstance(index, tuple) else (index,):
        if isinstance(i, Emulated) and i.dtype == bool and i.ndim:
            raise HostError(f"x[mask]: how many numbers that are depends on values, {UNKNOWN}")


def _refuse_the_hosts(what: str, values: tuple, even_numbers: bool = False) -> None:
    """Raise HostError if an array of the host's is among the values: it would be recorded with what it holds now."""
    for x in values:
        if isinstance(x, tuple | list) and not even_numbers:
            _refuse_the_hosts(what, tuple(x))
        if isinstance(x, np.ndarray) and not isinstance(x, Emulated) and (x.ndim or even_numbers):
            raise HostError(
                f"{what} sends an array of the host's ({x.dtype}{list(x.shape)}) to the device while what that does "
                "is recorded: it would be the same for ever. Send it before"
            )
        if even_numbers and isinstance(x, int | float | np.generic | list | tuple):
            raise HostError(f"{what} sends {x!r} to the device while what that does is recorded: use xp.full()")
