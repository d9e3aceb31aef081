"""The policy "tuned": each variant measured once for each shape, the quickest kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from . import threads
from .dispatch import describe, paused

if TYPE_CHECKING:
    from .dispatch import Primitive, Variant

choices: dict[str, str] = {}  # "conv2d(float32[128, 8, 8, 64], ...)" -> variant
measuring = True  # ranks that were given rank 0's table measure nothing, and take "fastest" for what is not in it


def file() -> Path:
    """Where tuned choices are kept: one file for each processor and thread count, under $NANOCNN_CACHE or ~/.cache."""
    machine = hashlib.sha256(f"{threads.processor()} {threads.count()}".encode()).hexdigest()[:12]
    root = os.environ.get("NANOCNN_CACHE") or Path.home() / ".cache" / "nanocnn"
    return Path(root) / f"tuned-{machine}.json"


def choose(primitive: Primitive, args: tuple, kwargs: dict) -> Variant:
    """The variant for this call: from the table, or measured now."""
    able = primitive.candidates(*args, **kwargs)
    candidates = {v.name: v for v in able if v.auto is not False}  # rungs to learn from would take seconds to measure
    if len(candidates) == 1:
        return next(iter(candidates.values()))
    if not choices:
        # no file, no home folder, no JSON, no dict: each means that nothing was measured yet
        with contextlib.suppress(OSError, RuntimeError, ValueError, AttributeError):
            choices.update({key: str(name) for key, name in json.loads(file().read_text()).items()})
    key = _key(primitive, args, kwargs)
    if choices.get(key) in candidates:
        return candidates[choices[key]]
    if not measuring:
        return [v for v in candidates.values() if v.pays(*args, **kwargs)][-1]
    times = {}
    with paused():
        for variant in candidates.values():
            runs = []
            for _ in range(4):  # the first compiles
                start = time.perf_counter()
                variant.body(*args, **kwargs)
                runs.append(time.perf_counter() - start)
            times[variant.name] = min(runs[1:])
    choices[key] = min(times, key=times.__getitem__)
    _keep()
    return candidates[choices[key]]


def _key(primitive: Primitive, args: tuple, kwargs: dict) -> str:
    """The call in words, less the arguments on which its time does not depend."""
    if primitive.unkeyed:
        given = primitive.signature.bind(*args, **kwargs).arguments
        args, kwargs = tuple(a for name, a in given.items() if name not in primitive.unkeyed), {}
    return f"{primitive.name}({describe(args, kwargs)})"


def _keep() -> None:
    """Write the table beside its place and rename it there; a cache that cannot be written costs only the measuring."""
    with contextlib.suppress(OSError, RuntimeError):
        path = file()
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_suffix(f".{os.getpid()}")
        beside.write_text(json.dumps(choices, indent=1, sort_keys=True))
        os.replace(beside, path)
