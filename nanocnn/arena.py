"""Where arrays lie in one block of memory, if it is known when each of them is first and last used.

Arrays that are never in use at the same time may share memory. To find the smallest block is hard in general; largest
first, each at the lowest place that is free for all of its life, comes close (Pisarchyk & Lee 2020, "Efficient memory
management for deep neural net inference", section 4.3: greedy by size).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Life(NamedTuple):
    """Of an array: bytes, and the numbers of the first and of the last call that use it."""

    size: int
    first: int
    last: int


def arrange(lives: Sequence[Life], align: int = 4096) -> tuple[list[int], int]:
    """An offset for each array, a multiple of `align`, and the bytes of the block that holds them all."""
    offsets = [0] * len(lives)
    placed: list[int] = []
    for i in sorted(range(len(lives)), key=lambda i: (-lives[i].size, lives[i].first)):
        life, offset = lives[i], 0
        for j in sorted((j for j in placed if _meet(life, lives[j])), key=lambda j: offsets[j]):
            if offset + life.size <= offsets[j]:
                break  # it fits before this one
            offset = max(offset, -(-(offsets[j] + lives[j].size) // align) * align)
        offsets[i] = offset
        placed.append(i)
    return offsets, max((o + life.size for o, life in zip(offsets, lives, strict=True)), default=0)


def _meet(a: Life, b: Life) -> bool:
    """Whether some call uses both, or lies between calls that do."""
    return a.first <= b.last and b.first <= a.last
