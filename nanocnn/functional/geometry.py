"""A number or a pair of them: how windows are described."""

from __future__ import annotations

from numbers import Integral

Pair = int | tuple[int, int]


def pair(name: str, value: Pair, least: int) -> tuple[int, int]:
    """`value` as (rows, columns). Raises ValueError unless it is one or two integers of at least `least`."""
    if type(value) is int and value >= least:  # the usual case first: every layer of every step comes this way
        return value, value
    values = tuple(value) if isinstance(value, tuple | list) else (value, value)
    if len(values) != 2 or any(not isinstance(v, Integral) or isinstance(v, bool) or v < least for v in values):
        raise ValueError(
            f"{name}={value!r}: expected an integer of at least {least}, or a pair (rows, columns) of them"
        )
    return int(values[0]), int(values[1])
