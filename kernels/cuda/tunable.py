"""The numbers of a launch that may be others: threads of a block, sides of a tile, stages on their way.

    TILES = Tunable("a row of a tile is one warp's load", macros("gemm.cu", "TILE"), dict(TILE=16), dict(TILE=8))
    TILES["TILE"]                        # 32, as the source has it
    with TILES.using(TILE=16): ...       # and as it is not: kernels that have these tiles are compiled anew

`python -m nanocnn bench matmul --device emulated --sweep` tries the others that are named, and shows what each takes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class Tunable:
    """Numbers by name: the default, for the reason that `rule` says, and others that are worth a try.

    Those that are macros of a .cu file have their default there, and are passed to the compiler where they differ; the
    kernel is told so: Kernel(file, name, TILES). Others are of the launch alone.
    """

    def __init__(self, rule: str, default: dict[str, int], *others: dict[str, int]):
        self.rule, self.default, self.now = rule, default, default
        self.others = [self._with(other) for other in others]

    def __getitem__(self, name: str) -> int:
        return self.numbers()[name]

    def numbers(self) -> dict[str, int]:
        """All of them, as they are now."""
        if _asked is not None and self not in _asked:
            _asked.append(self)
        return self.now

    def different(self) -> dict[str, int]:
        """Those that are not as by default."""
        return {name: number for name, number in self.now.items() if number != self.default[name]}

    @contextmanager
    def using(self, **numbers: int) -> Iterator[None]:
        """Others inside a `with` block. Raises ValueError on a name that it does not have."""
        before, self.now = self.now, self._with(numbers)
        try:
            yield
        finally:
            self.now = before

    def _with(self, numbers: dict[str, int]) -> dict[str, int]:
        if unknown := set(numbers) - set(self.default):
            raise ValueError(f"no {', '.join(sorted(unknown))} to choose; there are: {', '.join(self.default)}")
        return {**self.default, **numbers}


_asked: list[Tunable] | None = None


@contextmanager
def asked() -> Iterator[list[Tunable]]:
    """Those that the launches inside depend on."""
    global _asked
    before, _asked = _asked, []
    try:
        yield _asked
    finally:
        _asked = before
