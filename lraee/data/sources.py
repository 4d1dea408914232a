"""Where photos lie: a folder or a ZIP, listed and read with every size checked first."""

import os
import stat
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

# What may be a photo; what it is, its content says.
_SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
        ".avif", ".heic", ".heif",
    )
)  # fmt: skip
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


class _Folder:
    def __init__(self, root: Path, limits: Limits, skipped: list[Skipped]) -> None:
        self._root, self._limits, self._skipped = root, limits, skipped

    def names(self) -> list[str]:
        found: list[str] = []
        for folder, folders, files in os.walk(self._root, onerror=self._unreadable):
            folders.sort()
            for file in files:
                name = Path(folder, file).relative_to(self._root).as_posix()
                if reason := _refused_name(name):
                    self._skipped.append(Skipped(_printable(name), reason))
                else:
                    found.append(name)
            if len(found) > self._limits.count:
                raise DataError(f"data: {self._root} must hold at most {self._limits.count} photos")
        return sorted(found)

    def _unreadable(self, error: OSError) -> None:
        self._skipped.append(Skipped(_printable(str(error.filename)), first_line(error)))

    def read(self, name: str) -> bytes:
        # Not blocking: a FIFO named like a photo must not stop the run.
        descriptor = os.open(self._root / name, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise DataError("is not a regular file")
            _check_size(status.st_size, self._limits)
            return file.read(self._limits.file_size_bytes + 1)


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
            reason = _refused_name(info.filename) or _refused_member(info, self._members)
            if reason:
                self._skipped.append(Skipped(_printable(info.filename), reason))
            else:
                self._members[info.filename] = info

    def names(self) -> list[str]:
        return sorted(self._members)

    def read(self, name: str) -> bytes:
        info = self._members[name]
        _check_size(info.file_size, self._limits)
        with self._zip.open(info) as file:
            # The declared size may lie; never read past the limit.
            data = file.read(self._limits.file_size_bytes + 1)
        _check_size(len(data), self._limits)
        return data


def _refused_name(name: str) -> str | None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        return "has an unsafe name"
    if path.name.startswith(".") or "__MACOSX" in path.parts:
        return "is a hidden file"
    if path.suffix.lower() not in _SUFFIXES:
        return "has no photo's suffix"
    return None


def _refused_member(info: zipfile.ZipInfo, seen: dict[str, zipfile.ZipInfo]) -> str | None:
    if info.flag_bits & 0x1:
        return "is encrypted"
    return "is there twice" if info.filename in seen else None


def _check_size(size_bytes: int, limits: Limits) -> None:
    if size_bytes > limits.file_size_bytes:
        raise DataError(f"has {size_bytes} bytes, more than {limits.file_size_bytes}")


def _printable(name: str) -> str:
    return ascii(name)[1:-1][:200]
