"""Reading files that may be damaged or hostile: every read has a cap, and no archive is ever unpacked to disk."""

from __future__ import annotations

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from .datasets import DataError

AGAIN = "download it again (python data/prepare.py)"


class _Capped:
    """A stream that raises DataError after `limit` bytes: what a few kilobytes of gzip unpack to has no other end."""

    def __init__(self, stream: BinaryIO | gzip.GzipFile, limit: int, path: Path):
        self.stream, self.limit, self.left, self.path = stream, limit, limit, path

    def read(self, size: int = -1) -> bytes:
        wanted = self.left + 1 if size < 0 else min(size, self.left + 1)
        data = self.stream.read(wanted)
        self.left -= len(data)
        if self.left < 0:
            raise DataError(
                f"{self.path}: more than {self.limit:,} bytes of contents, the most that is expected; {AGAIN}"
            )
        return data


def read_file(path: Path, limit: int) -> bytes:
    """The contents of a file of at most `limit` bytes, unpacked if its name ends in .gz. Raises DataError."""
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as stream:
            return _Capped(stream, limit, path).read()
    except (OSError, EOFError, zlib.error) as error:  # the last two: a gzip file that is cut off or damaged
        raise DataError(f"{path}: cannot be read, {_words(error)}; {AGAIN}") from error


def read_tar(path: Path, limits: Mapping[str, int], total: int) -> Iterator[tuple[str, bytes]]:
    """Name and contents of each member of a .tar.gz whose bare name is in `limits` (name -> most bytes), in file order.

    Others are skipped; the archive may unpack to `total` bytes. A member that points outside the archive, or is
    neither a file nor a folder, is no part of any data set: DataError.
    """
    try:
        with (
            gzip.open(path, "rb") as stream,
            tarfile.open(fileobj=(capped := _Capped(stream, total, path)), mode="r|", bufsize=1 << 20) as tar,  # type: ignore[call-overload]
        ):
            for member in tar:
                inside = PurePosixPath(member.name)
                if inside.is_absolute() or ".." in inside.parts:
                    raise DataError(
                        f"{path}: member {member.name!r} points outside the archive; do not trust this file"
                    )
                if not (member.type in tarfile.REGULAR_TYPES or member.isdir()) or member.issparse():
                    raise DataError(f"{path}: member {member.name!r} is a link or a device; do not trust this file")
                if inside.name not in limits or member.isdir():
                    continue
                if member.size > limits[inside.name]:
                    most = limits[inside.name]
                    raise DataError(
                        f"{path}: member {member.name!r} has {member.size:,} bytes, expected at most {most:,}"
                    )
                contents = tar.extractfile(member)
                assert contents is not None  # it is a regular file
                yield inside.name, contents.read()
            while capped.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
    except DataError:
        raise
    except Exception as error:  # a hostile header can trip tarfile in more ways than it documents
        raise DataError(f"{path}: a damaged or truncated archive, {_words(error)}; {AGAIN}") from error


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
