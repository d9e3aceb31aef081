"""Checkpoints that cannot be lost: one checksummed HDF5 file for each generation, and the last few generations stay.

    000016-step-3910.h5           one generation: the whole state, written once, never changed
    000016-step-3910.h5.sha256    its checksum, which `sha256sum -c *.sha256` reads too
    000017-step-4301.h5 ...       the next one
    .lock                         locked while somebody writes; the lock of a writer that dies is freed by the system

Generations are numbered in the order in which they were saved. So no file is ever overwritten, not even when a step is
saved twice or when a run that fell back to an older generation passes the same step again.

Only rank 0 saves. Nothing in a file depends on the number of ranks, so any number may load it: rank 0 asks `latest()`,
and sends the path (or the state) to the others. The best model of a run needs no code of its own, since its generation
must merely stay out of the rotation: `save(folder / "best", step, state, keep=1)`.

The checksum finds accidents, such as a cut, a flipped bit or a half-written file. It is no signature: who can write the
folder can write both files.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import operator
import os
import re
import shutil
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .state_tree import TreeError, decode, encode

PATIENCE = 30.0  # seconds to wait for another writer
GENERATION = re.compile(r"(\d{6,})-step-\d+\.h5")
SIDECAR = re.compile(rb"([0-9a-f]{64})[ \t]+[^\n]+\n(?:# (\d+) bytes\n)?")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written, read or used; the message says what was found, expected, and what to do."""


# ------------------------------------------------------------------ writing


def save(folder: str | Path, step: int, state: dict[str, Any], keep: int = 3) -> Path:
    """Write `state` as the newest generation in `folder`, then delete all but the newest `keep`; returns its path.

    `state` is a nested dict with string keys of arrays (bool, int, float, complex; CuPy's are copied to the CPU),
    Python numbers, strings, booleans, None, and lists or tuples of those. When this returns, the generation is on the
    disk; killed at any instant before, the older ones are as they were. Raises CheckpointError where the disk is full
    or the folder cannot be written, TypeError for a value that has no place in a checkpoint.
    """
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}: the generation just written always stays")
    if (step := operator.index(step)) < 0:
        raise ValueError(f"step must not be negative, got {step}")
    data = encode(state)  # in memory, before the folder is touched: libhdf5 never meets a full disk
    folder = Path(folder)
    try:
        with _sole_writer(folder, PATIENCE) as alone:
            if not alone:
                raise CheckpointError(
                    f"{folder}: another process has been writing checkpoints here for {PATIENCE:g} s; expected one run "
                    "to a folder. Stop the other one, or give this run a folder of its own. Nothing was changed"
                )
            _remove_leftovers(folder)
            path = folder / f"{_next_number(folder):06d}-step-{step}.h5"
            try:
                _commit(path, data)
            except BaseException:  # Ctrl-C too
                with contextlib.suppress(OSError):
                    _remove_leftovers(folder)
                raise
            _rotate(folder, keep)
    except OSError as error:
        raise _cannot_write(folder, error, len(data)) from error
    return path


def _commit(path: Path, data: memoryview) -> None:
    """Put a generation in its place. The rename of the .h5 is the instant at which it begins to exist.

    The sidecar goes first, so that there is never a .h5 without its checksum: a sidecar alone is not a generation, and
    is swept. Both files are on the disk before either has its name; the folder is, before anything older goes.
    """
    sidecar = _sidecar(path)
    note = f"{hashlib.sha256(data).hexdigest()}  {path.name}\n# {len(data)} bytes\n"  # sha256sum skips the second line
    _write(f"{path}.tmp", data)
    _write(f"{sidecar}.tmp", memoryview(note.encode()))
    os.replace(f"{sidecar}.tmp", sidecar)
    os.replace(f"{path}.tmp", path)
    _sync_folder(path.parent)


def _write(path: str, data: memoryview) -> None:
    """A new file that is on the disk when this returns."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        while data:
            data = data[os.write(fd, data) :]  # one call may write less: at most 2 GB on Linux, less on a full disk
        os.fsync(fd)
    finally:
        os.close(fd)


def _sync_folder(folder: Path) -> None:
    """Bring the names in `folder` to the disk."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems have no such call
            raise
    finally:
        os.close(fd)


def _rotate(folder: Path, keep: int) -> None:
    for path in _generations(folder)[:-keep]:
        try:
            for old in (path, _sidecar(path)):  # in this order, so that what a kill leaves is swept as a lone sidecar
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(old)
        except OSError as error:  # the new generation is safe: not worth ending a run for
            warnings.warn(f"{path}: cannot delete this old checkpoint: {error.strerror}", RuntimeWarning, stacklevel=3)


def sweep(folder: str | Path) -> list[str]:
    """Remove what writers that died have left in `folder`, and return the names; call it when a run starts.

    Makes the folder if there is none, so that one which cannot be written is a CheckpointError now, not after the first
    epoch. While another process is writing there, nothing is removed.
    """
    folder = Path(folder)
    try:
        with _sole_writer(folder, patience=0) as alone:
            return _remove_leftovers(folder) if alone else []
    except OSError as error:
        raise _cannot_write(folder, error) from error


def _remove_leftovers(folder: Path) -> list[str]:
    """Our temporaries, and sidecars whose .h5 was never put in place. Only for the holder of the lock."""
    names = set(os.listdir(folder))
    leftovers = []
    for name in sorted(names):
        path, temporary = name.removesuffix(".tmp").removesuffix(".sha256"), name.endswith(".tmp")
        if GENERATION.fullmatch(path) and (temporary or path not in names):
            os.unlink(folder / name)
            leftovers.append(name)
    return leftovers


@contextlib.contextmanager
def _sole_writer(folder: Path, patience: float) -> Iterator[bool]:
    """Make `folder` and lock it against other writers; False if another holds the lock for `patience` seconds."""
    new = [f for f in (folder, *folder.parents) if not f.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for made in new:
        _sync_folder(made.parent)
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        deadline = time.monotonic() + patience
        while (taken := not _try_lock(fd)) and time.monotonic() < deadline:
            time.sleep(0.05)
        yield not taken
    finally:
        os.close(fd)  # which frees the lock


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: one writer to a folder is then the user's promise
        pass
    return True


def _cannot_write(folder: Path, error: OSError, needed: int = 0) -> CheckpointError:
    reason = f"{folder}: cannot write a checkpoint: {error.strerror or error}"
    if error.filename and Path(error.filename) != folder:
        reason += f" ({os.fsdecode(error.filename)})"
    if needed:
        try:
            free = f"{shutil.disk_usage(folder).free:,} bytes are"
        except OSError:
            free = "an unknown number is"
        reason += f"; it needs {needed:,} bytes and {free} free"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = (
            "Make room for one generation more than are kept (or raise the quota or ulimit -f), or choose another disk"
        )
    else:
        advice = "Expected a folder that this user may write to: choose another, or mend its permissions or its disk"
    return CheckpointError(f"{reason}. What was unfinished is removed, and no earlier checkpoint was touched. {advice}")


# ------------------------------------------------------------------ finding and reading


def latest(folder: str | Path) -> Path | None:
    """The newest good generation in `folder`; None if there are none at all.

    A bad one that is newer is reported in one line, as a RuntimeWarning. Raises CheckpointError if there are
    generations and none is good: a run must not start anew over what somebody may still be able to mend.
    """
    folder = Path(folder)
    bad = []
    for path in reversed(_generations(folder)):
        try:
            _read(path)
        except CheckpointError as error:
            if not path.exists():  # rotated away under our eyes: newer ones have come
                return latest(folder)
            bad.append(str(error))
            continue
        for line in bad:
            warnings.warn(f"falling back to {path.name}: {line}", RuntimeWarning, stacklevel=2)
        return path
    if bad:
        raise CheckpointError(
            f"{folder}: found {len(bad)} checkpoints and none is good; the newest: {bad[0]}. "
            "Restore one from a copy, or move the folder away and start anew"
        )
    return None


def load(path: str | Path, expect: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The state that `save()` wrote at `path`: equal bit for bit, all arrays on the CPU.

    The bytes are compared with their checksum before libhdf5 sees any of them (a corrupt file can loop there for ever:
    HDFGroup/hdf5#1707). `expect={"model": model.state_dict()}` applies `check_same` to those entries. Raises
    CheckpointError for a file that is missing, damaged, without checksum, of a newer schema or not ours.
    """
    path = Path(path)
    data = _read(path)
    try:
        state = decode(data)
    except TreeError as error:
        raise CheckpointError(f"{path}: {error}") from error
    for key, current in (expect or {}).items():
        check_same(state.get(key, {}), current, f"{path}: {key}")
    return state


def check_same(saved: Any, current: Any, where: str = "checkpoint") -> None:
    """Raise CheckpointError, with the first few differences, unless two states agree in names, shapes and dtypes."""
    old, new = dict(_outline(saved)), dict(_outline(current))
    differences = [f"missing {name} ({new[name]})" for name in new if name not in old]
    differences += [f"unexpected {name} ({old[name]})" for name in old if name not in new]
    differences += [
        f"{name} is {old[name]}, expected {new[name]}" for name in new if old.get(name, new[name]) != new[name]
    ]
    if differences:
        more = f"; and {len(differences) - 5} more" if len(differences) > 5 else ""
        raise CheckpointError(
            f"{where} does not fit this model: {'; '.join(differences[:5])}{more}. "
            "Build the model with the options that it was trained with, or choose another checkpoint"
        )


def _outline(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, dtype and shape) for each leaf of a state."""
    if isinstance(value, Mapping | list | tuple):
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _outline(item, f"{name}/{key}" if name else str(key))
    else:
        yield name, f"{value.dtype}{list(value.shape)}" if hasattr(value, "dtype") else "a Python value"


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.sha256")


def _generations(folder: Path) -> list[Path]:
    """Oldest first, good or bad."""
    try:
        names = [name for name in os.listdir(folder) if GENERATION.fullmatch(name)]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot look for checkpoints: {error.strerror}; expected a folder") from error
    return [folder / name for name in sorted(names, key=_number)]


def _number(name: str) -> int:
    return int(name.partition("-")[0])


def _next_number(folder: Path) -> int:
    return max((_number(path.name) for path in _generations(folder)), default=0) + 1


def _read(path: Path) -> bytes:
    """The bytes of a checkpoint, once they equal their checksum."""
    sidecar = _sidecar(path)
    try:
        size = path.stat().st_size
        try:
            with open(sidecar, "rb") as file:
                note = SIDECAR.match(file.read(4096))
        except FileNotFoundError:
            note = None
        if note is None:
            found = "is not a checksum" if sidecar.exists() else "does not exist"
            raise CheckpointError(
                f"{path}: cannot be trusted: {sidecar.name} {found}; expected the SHA-256 that save() wrote beside it. "
                "Restore the pair from a copy, or use an older checkpoint"
            )
        if note[2] and size != int(note[2]):
            raise _damaged(path, f"truncated or overwritten: found {size:,} bytes, expected {int(note[2]):,}")
        data = path.read_bytes()
    except FileNotFoundError as error:
        there = ", ".join(p.name for p in _generations(path.parent)[-3:]) or "no checkpoint"
        raise CheckpointError(
            f"{path}: no such file; found there: {there}. Expected a path that save() returned"
        ) from error
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read: {error.strerror}; expected a file that save() wrote. "
            "Check the path, its permissions and its disk, or use an older checkpoint"
        ) from error
    digest, expected = hashlib.sha256(data).hexdigest(), note[1].decode()
    if digest != expected:
        raise _damaged(path, f"its bytes have changed: found SHA-256 {digest[:16]}..., expected {expected[:16]}...")
    return data


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: {what}. Restore it from a copy, or use an older checkpoint (latest() finds it)")
