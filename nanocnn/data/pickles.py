"""Read a pickle without running it.

A pickle is a program for a small stack machine, and `pickle.load` runs whatever it says: import any name, call it,
fill any memory. This is that machine with the instructions that arrays in a dictionary need and no other. Imports are
held against a list, and nothing is ever called: a call becomes a note of what would be called with what, from which
the one thing expected, an array of bytes, is then made here.
"""

from __future__ import annotations

import pickletools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .datasets import DataError

MOST_INSTRUCTIONS = 1_000_000  # a batch of CIFAR-10 has 30,000
ARRAYS = {(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")}  # protocols 0 to 4
BUFFERS = {(f"numpy.{core}.numeric", "_frombuffer") for core in ("core", "_core")}  # protocol 5
ALLOWED = ARRAYS | BUFFERS | {("numpy", "ndarray"), ("numpy", "dtype")}


class Import(NamedTuple):
    """A name that was not imported."""

    module: str
    name: str


@dataclass
class Call:
    """A call that was not made."""

    function: Import
    arguments: Any
    state: Any = None


def read_pickle(raw: bytes, where: object) -> Any:
    """What a pickle describes: dicts, lists, tuples, strings, bytes, ints, None, and uint8 arrays as `Call`s.

    Strings of Python 2 become `str`, character for byte (Latin-1). `where` names the file in a DataError.
    """
    try:
        return _run(raw)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except Exception as error:  # any other fault of the program: an empty stack, an unknown place, a cut string
        raise DataError(f"{where}: a damaged or truncated pickle ({type(error).__name__}: {error})") from error


def as_array(value: Any, where: object) -> np.ndarray:
    """The uint8 array that an unmade call describes. Raises DataError."""
    try:
        if value.function in ARRAYS:  # the state that ndarray.__setstate__ would be given
            _, shape, dtype, fortran, data = value.state
        else:  # _frombuffer(data, dtype, shape, order)
            data, dtype, shape, order = value.arguments
            fortran = order == "F"
        if value.function not in ARRAYS | BUFFERS or dtype.function != ("numpy", "dtype") or dtype.arguments[0] != "u1":
            raise ValueError("not an array of uint8")
        data = data.encode("latin-1") if isinstance(data, str) else data
        return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise DataError(f"{where}: expected an array of bytes (uint8) of a given shape; {error}") from error


def _run(raw: bytes) -> Any:
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    def update(pairs: list[Any]) -> None:
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str | bytes):  # a key of nested tuples can take for ever to hash
                raise DataError(f"a dictionary key is a {type(key).__name__}, expected a string")
            stack[-1][key.decode("latin-1") if isinstance(key, bytes) else key] = value

    for count, (instruction, argument, _) in enumerate(pickletools.genops(raw)):
        if count >= MOST_INSTRUCTIONS:
            raise DataError(f"more than {MOST_INSTRUCTIONS:,} instructions; this is no batch of images")
        match instruction.name:
            case "PROTO" | "FRAME":
                pass
            case (
                "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINSTRING" | "SHORT_BINSTRING" | "BINUNICODE"
                | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
            ):  # fmt: skip
                stack.append(argument)
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[instruction.name])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                size = int(instruction.name[-1])
                stack[-size:] = [tuple(stack[-size:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM":
                value = stack.pop()
                update([stack.pop(), value])
            case "SETITEMS":
                update(since_mark())
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL" | "STACK_GLOBAL":
                if instruction.name == "GLOBAL":
                    module, _, name = str(argument).partition(" ")
                else:
                    name, module = stack.pop(), stack.pop()
                if not isinstance(module, str) or not isinstance(name, str):
                    raise DataError("the pickle imports by a name that is no string; do not trust this file")
                if (module, name) not in ALLOWED:
                    raise DataError(
                        f"the pickle imports {module:.99}.{name:.99}, which no data set needs; do not trust this file"
                    )
                stack.append(Import(module, name))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                if not isinstance(function, Import):
                    raise DataError("the pickle calls what it did not import; do not trust this file")
                stack.append(Call(function, arguments))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "STOP":
                return stack.pop()
            case other:
                raise DataError(
                    f"the pickle uses {other}, which an array in a dictionary does not need; do not trust it"
                )
    raise DataError("the pickle has no end")  # genops() raises first
