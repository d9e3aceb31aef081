"""Compiled kernels kept on disk, each in a file that is named by all that its code depends on.

Numba's own cache numbers a function's files, and keeps the numbers in an index that knows one source file. Here:

- A kernel is compiled together with helpers of other files: when simd.py changed, the convolutions would go on running
  their old code. Constants are compiled in too, such as the cache sizes of the host, which other hosts may not share.
- Ranks that start together write one index at once. Two may take the same number for different arguments, and then the
  one finds the other's code under its own name.
- An index or a file that a crash or a full disk has torn ends every later run with an error.

So there is no index: whatever a kernel depends on is hashed, and the hash is the name. Files appear whole or not at
all and carry a checksum; one that is broken is compiled anew. What one process compiles the others wait for: four
ranks on two cores would otherwise compile everything four times, and take four times as long.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pickle
import re
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numba
import numpy as np
from numba.core import caching, serialize

COMPILES = re.compile(r"^(?:from|import) (?:numba|\.simd)\b", re.M)  # is there code for Numba in a file?
IMPORTS = re.compile(r"^\s*from \.(\w*) import (\([^)]*\)|.+)", re.M)
ADDRESS = re.compile(r" at 0x[0-9a-f]+")  # of a function, in the name of its type: another in each run
END = ".kernel"
PATIENCE = 60  # seconds to wait for another process; one that failed to compile gives no sign


def keep(modules: Iterable[ModuleType]) -> None:
    """Keep the kernels of these modules, all of one package, by the rules of this file. Call it right after import."""
    modules = list(modules)
    for module in modules:
        # Read now, and not when it is needed: somebody may edit a file while this process runs what it was.
        try:
            _texts[module.__name__] = Path(module.__file__ or "").read_text(encoding="utf-8")
        except OSError:  # packed away in an archive: Numba does what it can
            continue
        simple = {k: v for k, v in vars(module).items() if not k.startswith("__") and _is_constant(v)}
        _constants[module.__name__] = repr(sorted(simple.items()))
    for module in modules:
        for kernel in vars(module).values():
            ufunc = getattr(kernel, "_dispatcher", None)  # @vectorize wraps one
            for its in (getattr(kernel, "_cache", None), getattr(ufunc, "cache", None)):
                if isinstance(its, caching.Cache) and its._py_func.__module__ == module.__name__ in _texts:
                    its._cache_file = Shelf(its.cache_path, its._py_func)


class Shelf:
    """Where a function's compiled code lies: what Numba asks to `load` and to `save`, by a key of its own making."""

    def __init__(self, folder: str, function: Any):
        self.folder, self.module = Path(folder), function.__module__
        name = re.sub(r"[^\w.]", "", f"{self.module.rpartition('.')[2]}.{function.__qualname__}")
        self.begun: dict[Path, int] = {}  # what we compile, with the lock that says so
        self.prefix = f"{name}-py{sys.version_info.major}{sys.version_info.minor}{sys.abiflags}-"

    def load(self, key: tuple) -> Any:
        """What was saved under this key; None if nothing was, or not all of it is there: then we are to compile it."""
        path = self.path(key)
        value = _read(path)
        if value is None:
            self._begin(path)
            value = _read(path)  # another process may have finished it meanwhile
            if value is not None:
                self._end(path)
        return value

    def save(self, key: tuple, value: Any) -> None:
        """Write beside the place, then rename. A disk that is full costs the next run a compilation, and no more."""
        data, path = serialize.dumps(value), self.path(key)
        beside = path.with_suffix(f".{uuid.uuid4().hex}")
        try:
            beside.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(beside, path)
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink()
            return
        finally:
            self._end(path)
        current = self.prefix + _source_hash(self.module)
        self._remove(lambda name: not name.startswith(current))

    def _begin(self, path: Path) -> None:
        """Wait while another process compiles this, and say that now we do. Without locks, nobody waits."""
        if path in self.begun:
            return
        end = time.monotonic() + PATIENCE
        with contextlib.suppress(OSError):
            file = os.open(path.with_suffix(".lock"), os.O_CREAT | os.O_RDWR)
            while time.monotonic() < end:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    self.begun[path] = file
                    return
                except BlockingIOError:
                    time.sleep(0.02)
                except OSError:  # a file system without locks
                    break
            os.close(file)

    def _end(self, path: Path) -> None:
        file = self.begun.pop(path, None)
        if file is not None:
            with contextlib.suppress(OSError):
                path.with_suffix(".lock").unlink()
            fcntl.flock(file, fcntl.LOCK_UN)  # closing is not enough where a forked child has it too
            os.close(file)

    def flush(self) -> None:
        """Forget everything: what Numba asks for when a function is compiled again."""
        self._remove(lambda name: True)

    def _remove(self, condemned: Any) -> None:
        for path in self.folder.glob(f"{self.prefix}*{END}"):
            if condemned(path.name):
                with contextlib.suppress(OSError):
                    path.unlink()

    def path(self, key: tuple) -> Path:
        """Its name says the sources of the function, so that old files are known, and hashes all the rest."""
        types, *machine = key
        brought = sorted({name for t in types for name in _brought_by(t)})
        modules = sorted({name for module in (self.module, *brought) for name in _closure(module)})
        rest = [numba.__version__, repr(types), repr(machine), *map(_source_hash, brought)]
        rest += [_constants[name] for name in modules]
        return self.folder / f"{self.prefix}{_source_hash(self.module)}-{_hash(ADDRESS.sub('', ' '.join(rest)))}{END}"


def _read(path: Path) -> Any:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    checksum, data = content[:32], content[32:]
    return pickle.loads(data) if checksum == hashlib.sha256(data).digest() else None


def _brought_by(kind: Any) -> Iterator[str]:
    """Our modules whose code an argument of this type brings with it: a named tuple's class, a function."""
    for module in (
        getattr(getattr(kind, "instance_class", None), "__module__", ""),
        getattr(getattr(getattr(kind, "dispatcher", None), "py_func", None), "__module__", ""),
    ):
        if module in _texts:
            yield module
    for inner in getattr(kind, "types", ()):
        yield from _brought_by(inner)


# ------------------------------------------------------------------ what the code in a module depends on

_texts: dict[str, str] = {}  # module -> its source
_constants: dict[str, str] = {}  # module -> names and values of its numbers and words


def _is_constant(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_constant, value))
    return isinstance(value, int | float | str | np.generic)


@cache
def _closure(module: str) -> tuple[str, ...]:
    """The module and all of its package that it imports, directly or not, in order."""
    package = module.rpartition(".")[0]
    found, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name in _texts and name not in found:
            found.add(name)
            for source, names in IMPORTS.findall(_texts[name]):
                waiting += [f"{package}.{word}" for word in ([source] if source else re.findall(r"\w+", names))]
    return tuple(sorted(found))


@cache
def _source_hash(module: str) -> str:
    """Of the sources that are compiled into the module's kernels: its own, and those of the helpers it imports."""
    texts = [_texts[name] for name in _closure(module)]
    return _hash("\0".join(text for text in texts if COMPILES.search(text)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:20]
