"""What is to be embedded: photos of a folder, an archive, tar shards or a list of paths, or texts.

A listing streams: it holds no more than the names of one folder or archive.
"""

import glob
import os
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path
from typing import BinaryIO, Protocol

from lraee.data.names import refused_member, to_bytes, to_text
from lraee.data.sources import (
    DataError,
    Limits,
    Skipped,
    check_size,
    first_line,
    open_source,
    read_file,
    walk,
)  # fmt: skip

UNKNOWN_SIZE = -1
_CHUNK = 1 << 16
_LONGEST_LINE = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidate:
    """Something to embed: its name, and what tells that it has not changed.

    `size` in bytes, -1 where it cannot be read; `mtime_us` in microseconds since 1970, UTC.
    """

    name: str
    size: int
    mtime_us: int
    place: tuple[str, int] | None = None
    """Of a tar's member: the tar, and where its bytes begin."""


class Listing(Protocol):
    """Candidates in an order that never changes, with what is skipped in between."""

    @property
    def photos_from(self) -> str | None:
        """See Provenance."""

    def __iter__(self) -> Iterator[Candidate | Skipped]:
        """All of them, once."""

    def count(self) -> int | None:
        """How many candidates there are; None where that is known at the end only."""

    def read(self, candidate: Candidate) -> bytes:
        """Its bytes, from any thread; raises DataError or one of sources.READ_ERRORS."""


class FolderListing:
    """The photos below a folder, in the order of their names' bytes."""

    def __init__(self, root: Path, limits: Limits) -> None:
        self._root, self._limits = root, limits
        self.photos_from = os.path.abspath(root)

    def __iter__(self) -> Iterator[Candidate | Skipped]:
        for row in walk(self._root):
            yield row if isinstance(row, Skipped) else _file(row, self._path(row))

    def count(self) -> int:
        """See Listing."""
        return sum(not isinstance(row, Skipped) for row in walk(self._root))

    def read(self, candidate: Candidate) -> bytes:
        """See Listing."""
        return read_file(self._path(candidate.name), self._limits)

    def _path(self, name: str) -> bytes:
        return os.path.join(os.fsencode(self._root), to_bytes(name))


class PathListing:
    """Files by their paths, as a list has them; a path that comes twice is skipped.

    Args:
      open_list: opens the list anew; paths stand one a line, or each before a NUL.
      can_count: whether the list can be read twice.
    """

    photos_from = None

    def __init__(
        self, open_list: Callable[[], BinaryIO], limits: Limits, *, can_count: bool
    ) -> None:
        self._open, self._limits, self._can_count = open_list, limits, can_count

    def __iter__(self) -> Iterator[Candidate | Skipped]:
        earlier: set[int] = set()
        for path in self._paths():
            name = to_text(path)
            if _is_repeated(path, earlier):
                yield Skipped(name, "is listed twice")
            else:
                yield _file(name, path)

    def count(self) -> int | None:
        """See Listing."""
        return sum(1 for _ in self._paths()) if self._can_count else None

    def read(self, candidate: Candidate) -> bytes:
        """See Listing."""
        return read_file(to_bytes(candidate.name), self._limits)

    def _paths(self) -> Iterator[bytes]:
        with self._open() as file:
            yield from filter(None, split_paths(file))


class ZipListing:
    """The photos of a ZIP, which is never unpacked to disk."""

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path, self._limits = path, limits
        self.photos_from = os.path.abspath(path)
        self._skipped: list[Skipped] = []
        self._source = open_source(path, limits, self._skipped)
        self._lock = threading.Lock()
        with zipfile.ZipFile(path) as archive:
            rows = archive.infolist()
        self._about = {info.filename: (info.file_size, _zip_time(info)) for info in rows}

    def __iter__(self) -> Iterator[Candidate | Skipped]:
        yield from self._skipped
        for name in self._source.names():
            yield Candidate(name, *self._about[name])

    def count(self) -> int:
        """See Listing."""
        return len(self._source.names())

    def read(self, candidate: Candidate) -> bytes:
        """See Listing."""
        return self._source.read(candidate.name)

    def __reduce__(self) -> tuple[type["ZipListing"], tuple[Path, Limits]]:
        return ZipListing, (self._path, self._limits)


class TarListing:
    """The photos of tar shards (webdataset), in the order of the shards and of their members.

    Names begin with the shard's: `00000.tar/000017.jpg`. What follows a damaged header is lost, and
    reported as one skip.
    """

    def __init__(self, paths: Sequence[str], limits: Limits) -> None:
        self._limits = limits
        folder = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
        self.photos_from = folder
        self._tars = {os.path.relpath(os.path.abspath(path), folder): path for path in paths}

    def __iter__(self) -> Iterator[Candidate | Skipped]:
        for shard, path in self._tars.items():
            earlier: set[int] = set()
            for row in _members(shard, path):
                is_repeated = isinstance(row, Candidate) and _is_repeated(
                    to_bytes(row.name), earlier
                )
                yield Skipped(row.name, "is there twice") if is_repeated else row

    def count(self) -> int:
        """See Listing."""
        return sum(isinstance(row, Candidate) for row in self)

    def read(self, candidate: Candidate) -> bytes:
        """See Listing."""
        assert candidate.place is not None
        check_size(candidate.size, self._limits)
        path, offset = candidate.place
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.pread(descriptor, candidate.size, offset)
        finally:
            os.close(descriptor)


class TextListing:
    """Texts, one a line, in UTF-8; the candidates' names are the texts themselves."""

    photos_from = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def __iter__(self) -> Iterator[Candidate | Skipped]:
        with self._path.open("rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(_LONGEST_LINE), b""), 1):
                try:
                    text = line.rstrip(b"\r\n").decode()
                except UnicodeDecodeError:
                    yield Skipped(f"line {number}", "is not UTF-8")
                    continue
                if text.strip():
                    yield Candidate(text, len(line), number)
                else:
                    yield Skipped(f"line {number}", "is empty")

    def count(self) -> int:
        """See Listing."""
        return sum(isinstance(row, Candidate) for row in self)

    def read(self, candidate: Candidate) -> bytes:
        """See Listing."""
        return candidate.name.encode()


def open_listing(photos: Sequence[str], limits: Limits) -> Listing:
    """The listing of a folder, a ZIP, one or more .tar (or a glob of them), a .txt, or `-`.

    Raises: DataError, one line, where it is none of these.
    """
    paths = [path for each in photos for path in _expanded(each)]
    if all(path.endswith(".tar") for path in paths):
        return TarListing(paths, limits)
    if len(paths) > 1:
        raise DataError(f"data: PHOTOS must be one, or several .tar, got {len(paths)} of others")
    path = Path(paths[0])
    if paths[0] == "-":
        return PathListing(lambda: sys.stdin.buffer, limits, can_count=False)
    if path.suffix == ".txt":
        return PathListing(lambda: path.open("rb"), limits, can_count=path.is_file())
    return FolderListing(path, limits) if path.is_dir() else ZipListing(path, limits)


def split_paths(file: BinaryIO) -> Iterator[bytes]:
    """Paths of a list: each ends with a NUL where its first 64 KiB hold one, else with its line."""
    rest = file.read(_CHUNK)
    separator = b"\0" if b"\0" in rest else b"\n"
    while chunk := file.read(_CHUNK):
        *paths, rest = (rest + chunk).split(separator)
        yield from (_stripped(path, separator) for path in paths)
        if len(rest) > _LONGEST_LINE:
            raise DataError(f"data: the list must hold paths of at most {_LONGEST_LINE} bytes")
    yield from (_stripped(path, separator) for path in rest.split(separator))


def _stripped(path: bytes, separator: bytes) -> bytes:
    return path if separator == b"\0" else path.removesuffix(b"\r")


def _expanded(photos: str) -> list[str]:
    if photos == "-" or os.path.exists(photos):
        return [photos]
    if paths := sorted(glob.glob(photos), key=os.fsencode):
        return paths
    raise DataError(
        f"data: {photos} must be a folder, a ZIP, .tar files, a .txt of paths or -, got no such"
        " thing"
    )


def _file(name: str, path: bytes) -> Candidate:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # why is said when it is read
        return Candidate(name, UNKNOWN_SIZE, 0)
    return Candidate(name, status.st_size, status.st_mtime_ns // 1000)


def _members(shard: str, path: str) -> Iterator[Candidate | Skipped]:
    try:
        with tarfile.open(path, "r:", encoding="utf-8", errors="surrogateescape") as tar:
            for member in tar:
                # tarfile keeps every member it has read
                tar.members = []  # type: ignore[attr-defined]
                if not member.isdir():
                    yield _member(shard, path, member)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        yield Skipped(shard, f"is damaged, the rest of it is lost: {first_line(error)}")


def _member(shard: str, path: str, member: tarfile.TarInfo) -> Candidate | Skipped:
    name = f"{shard}/{member.name}"
    reason = refused_member(member.name)
    if reason is None and (not member.isreg() or member.issparse()):
        reason = "is not a regular file"
    if reason:
        return Skipped(name, reason)
    return Candidate(name, member.size, int(member.mtime * 1e6), (path, member.offset_data))


def _zip_time(info: zipfile.ZipInfo) -> int:
    """A ZIP's time has no zone: taken as UTC; 0 where it is no date."""
    try:
        return int(datetime(*info.date_time, tzinfo=UTC).timestamp()) * 1_000_000
    except ValueError:
        return 0


def _is_repeated(name: bytes, earlier: set[int]) -> bool:
    """Whether a name came before; 64 bits of each are kept."""
    digest = int.from_bytes(blake2b(name, digest_size=8).digest())
    is_repeated = digest in earlier
    earlier.add(digest)
    return is_repeated
