"""A GPU's memory: what CuPy's pool holds, the most that was in use, and what to say where there is not enough.

CuPy takes memory of the driver piece by piece and keeps what it has; an array takes the smallest piece that is large
enough. What is held and not in use, even at the peak, lies in pieces that fit nobody: fragmentation. The variable
CUPY_GPU_MEMORY_LIMIT ("50%", or bytes) limits the pool, so that several processes can share a GPU.

Not yet run on a GPU.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from ..dispatch import choices_in_force
from . import device, graph


def held() -> dict[str, int] | None:
    """Bytes of the current GPU: `in_use` by arrays, `pool`, `free` for all, `total`. None if no GPU was used.

    A recorded step has a pool of its own, which is counted with the common one.
    """
    if not device.used():
        return None
    import cupy

    pools = [cupy.get_default_memory_pool(), *graph.pools()]
    free, total = cupy.cuda.runtime.memGetInfo()
    in_use, pool = sum(p.used_bytes() for p in pools), sum(p.total_bytes() for p in pools)
    return dict(in_use=in_use, pool=pool, free=free, total=total)


class Peak:
    """Bytes that this thread's arrays take: `now`, and the `most` so far."""

    def __init__(self, now: int):
        self.now = self.most = now

    def add(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


@contextlib.contextmanager
def watched() -> Iterator[Peak | None]:
    """Counts what CuPy gives and takes back inside; None where no GPU was used. It costs a call for each array."""
    if not device.used():
        yield None
        return
    import cupy

    peak = Peak(cupy.get_default_memory_pool().used_bytes())

    class Hook(cupy.cuda.MemoryHook):  # type: ignore[misc]
        name = "nanocnn"

        def malloc_postprocess(self, **facts: int) -> None:
            if facts["mem_ptr"]:  # 0: there was not enough
                peak.add(facts["mem_size"])

        def free_postprocess(self, **facts: int) -> None:
            peak.add(-facts["mem_size"])

    with Hook():
        yield peak


def shortage(error: MemoryError) -> str:
    """What was asked for and by whom, what there is, and what would take less: one line for a failed allocation."""
    size = re.search(r"([\d,]+) bytes", str(error))
    words = [f"not enough memory for {gigabytes(int(size[1].replace(',', '')))}" if size else f"{error}"]
    words += [f"asked for by {note}" for note in getattr(error, "__notes__", [])]
    found = held()
    if found:
        total, free, pool, in_use = (gigabytes(found[name]) for name in ("total", "free", "pool", "in_use"))
        words.append(f"the GPU has {total}, of which {free} are free; our pool holds {pool}, {in_use} of it in arrays")
    choices = choices_in_force()
    less = ["a smaller batch (what backward needs grows with it)", "a narrower model"]
    if choices["policy"] == "reference":
        less.append("the policy fastest (the reference's convolution unfolds its images)")
    saving = {"graph": "off", "fuse": "on"}  # a graph keeps what a step needs; what is fused writes less in between
    if found:
        saving |= {"precision": "fp16", "resident": "off"}  # half of the activations; images stay on the host
    less += [f"{name}={value}" for name, value in saving.items() if choices.get(name, value) != value]
    return f"{'; '.join(words)}. What takes less: {', '.join(less)}; python -m nanocnn switches"


def gigabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
