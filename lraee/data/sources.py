"""Where photos lie: a folder or a ZIP, listed and read with every size checked first."""

import os
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lraee.data.names import refused_file, refused_folder, refused_member, to_bytes, to_text

# What reading one file may raise; Photos makes each a reported skip.
READ_ERRORS = (OSError, zipfile.BadZipFile, RuntimeError, EOFError, zlib.error)


class DataError(ValueError):
    """The data as a whole cannot be used; the message is one line."""


@dataclass(frozen=True)
class Limits:
    """How large a file or a whole source may be before it is refused unread."""

    file_size_bytes: int = 64 << 20
    total_size_bytes: int = 256 << 30
    count: int = 5_000_000


@dataclass(frozen=True)
class Skipped:
    """One file that was not used, and why."""

    name: str
    reason: str


class Source(Protocol):
    """Where photos lie: their names, and the bytes of one name."""

    def names(self) -> list[str]:
        """Return the names of candidate files, sorted; others are in `skipped`."""

    def read(self, name: str) -> bytes:
        """Return the bytes of one file; raises DataError or an OS or ZIP error."""


def open_source(path: Path, limits: Limits, skipped: list[Skipped]) -> Source:
    """Open a folder or ZIP; files refused by their name alone go to `skipped`."""
    if path.is_dir():
        return _Folder(path, limits, skipped)
    if path.is_file():
        return _Zip(path, limits, skipped)
    raise DataError(f"data: {path} must be a folder or a ZIP file, got no such thing")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    return (str(error).splitlines() or [""])[0][:200] or type(error).__name__


def walk(root: str | os.PathLike[str]) -> Iterator[str | Skipped]:
    """Names of the photos below a folder, sorted by their bytes, and in between what is skipped.

    The order and the names are the same in every locale. Hidden and system folders are skipped. A
    link to a folder is followed, unless it leads around itself, or to a folder that is listed by
    its own name or was listed before: each folder is listed once.

    Memory: the entries of one folder and of those around it.
    """
    walker = _Walker(os.fsencode(root))
    # Folders and files still to come, the next one last
    stack: list[tuple[bytes, bool]] = [(b"", True)]
    while stack:
        path, is_folder = stack.pop()
        name = to_text(path)
        if not is_folder:
            reason = refused_file(name.rpartition("/")[2])
            yield Skipped(name, reason) if reason else name
            continue
        if reason := walker.refused(path):
            yield Skipped(name or ".", reason)
            continue
        try:
            stack += walker.entries(path)
        except OSError as error:
            yield Skipped(name or ".", f"cannot be listed: {error.strerror or error}")


class _Walker:
    """What `walk` knows of the folders listed so far."""

    def __init__(self, root: bytes) -> None:
        self._root, self._real_root = root, os.path.realpath(root)
        self._listed: set[tuple[int, int]] = set()

    def entries(self, path: bytes) -> list[tuple[bytes, bool]]:
        """Paths in a folder, and which are folders, in falling order of their bytes."""
        with os.scandir(os.path.join(self._root, path)) as entries:
            rows = [(os.path.join(path, entry.name), _is_folder(entry)) for entry in entries]
        # With its slash a folder stands where its files do
        return sorted(rows, key=lambda row: row[0] + b"/" * row[1], reverse=True)

    def refused(self, path: bytes) -> str | None:
        """Why this folder is not listed; None marks it as listed."""
        if path and (reason := refused_folder(to_text(os.path.basename(path)))):
            return reason
        full = os.path.join(self._root, path) if path else self._root
        try:
            if path and os.path.islink(full) and (reason := self._refused_link(full)):
                return reason
            status = os.stat(full)
        except OSError as error:
            return f"cannot be listed: {error.strerror or error}"
        identity = status.st_dev, status.st_ino
        if identity in self._listed:
            return "is a folder that was listed before"
        self._listed.add(identity)
        return None

    def _refused_link(self, link: bytes) -> str | None:
        target = os.path.realpath(link)
        if _is_inside(os.path.realpath(os.path.dirname(link)), target):
            return "is a link to a folder around it"
        if not _is_inside(target, self._real_root):
            return None
        inner = to_text(target[len(self._real_root) :]).split("/")
        is_listed = not any(map(refused_folder, inner))
        return "is a link to a folder that is listed by its own name" if is_listed else None


def _is_inside(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder.rstrip(b"/") + b"/")


def _is_folder(entry: os.DirEntry[bytes]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself: what is wrong is said when it is read
        return False


def read_file(path: bytes, limits: Limits) -> bytes:
    """The bytes of a regular file; raises DataError or OSError."""
    # Not blocking: a FIFO named like a photo must not stop the run.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise DataError("is not a regular file")
        check_size(status.st_size, limits)
        return file.read(limits.file_size_bytes + 1)


class _Folder:
    def __init__(self, root: Path, limits: Limits, skipped: list[Skipped]) -> None:
        self._root, self._limits, self._skipped = root, limits, skipped

    def names(self) -> list[str]:
        names: list[str] = []
        for row in walk(self._root):
            if isinstance(row, Skipped):
                self._skipped.append(Skipped(_printable(row.name), row.reason))
                continue
            names.append(row)
            if len(names) > self._limits.count:
                raise DataError(f"data: {self._root} must hold at most {self._limits.count} photos")
        return names

    def read(self, name: str) -> bytes:
        return read_file(os.path.join(os.fsencode(self._root), to_bytes(name)), self._limits)


class _Zip:
    def __init__(self, path: Path, limits: Limits, skipped: list[Skipped]) -> None:
        self._limits, self._skipped = limits, skipped
        try:
            self._zip = zipfile.ZipFile(path)
        except READ_ERRORS as error:
            raise DataError(f"data: {path} must be a ZIP file: {first_line(error)}") from error
        except (ValueError, LookupError, struct.error) as error:
            raise DataError(f"data: {path} must be a readable ZIP file: {error}") from error
        self._members: dict[str, zipfile.ZipInfo] = {}
        self._list(path)

    def _list(self, path: Path) -> None:
        members = [info for info in self._zip.infolist() if not info.is_dir()]
        total = sum(info.file_size for info in members)
        if len(members) > self._limits.count:
            raise DataError(f"data: {path} must hold at most {self._limits.count} files")
        if total > self._limits.total_size_bytes:
            allowed = self._limits.total_size_bytes
            raise DataError(f"data: {path} must unpack to at most {allowed} bytes, got {total}")
        for info in members:
            reason = refused_member(info.filename) or _unreadable(info, self._members)
            if reason:
                self._skipped.append(Skipped(_printable(info.filename), reason))
            else:
                self._members[info.filename] = info

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        info = self._members[name]
        check_size(info.file_size, self._limits)
        with self._zip.open(info) as file:
            # The declared size may lie; never read past the limit.
            data = file.read(self._limits.file_size_bytes + 1)
        check_size(len(data), self._limits)
        return data


def _unreadable(info: zipfile.ZipInfo, earlier: dict[str, zipfile.ZipInfo]) -> str | None:
    if info.flag_bits & 0x1:
        return "is encrypted"
    return "is there twice" if info.filename in earlier else None


def check_size(size_bytes: int, limits: Limits) -> None:
    """Raises DataError on a file that is larger than one may be."""
    if size_bytes > limits.file_size_bytes:
        raise DataError(f"has {size_bytes} bytes, more than {limits.file_size_bytes}")


def _printable(name: str) -> str:
    return ascii(name)[1:-1][:200]
