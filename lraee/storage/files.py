"""Files that others may have changed: read within limits, written whole or not at all."""

import os
import reprlib
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from errno import EINVAL, ENOTSUP
from pathlib import Path
from typing import BinaryIO

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_MAX_MESSAGE = 300


class CheckpointError(ValueError):
    """Not a file of this format: one line names file, field, rule, value and what to do."""


class Violation(ValueError):
    """A value that breaks a rule; `refusing` adds the file, and its own advice where none is given.

    Args:
      rule: `<field> must <rule>`.
      value: printed in at most 300 characters.
      advice: what to do.
    """

    def __init__(self, rule: str, value: object, advice: str = "") -> None:
        """See the class."""
        super().__init__(f"{rule}, got {_SHORT.repr(value)[:_MAX_MESSAGE]}")
        self.advice = advice


def require(holds: bool, rule: str, value: object, advice: str = "") -> None:
    """Raises Violation unless the rule holds."""
    if not holds:
        raise Violation(rule, value, advice)


@contextmanager
def refusing(path: Path, advice: str = "write it again, or copy it again") -> Iterator[None]:
    """Turns ValueError and OSError of the block into a CheckpointError about this file."""
    try:
        yield
    except CheckpointError:
        raise
    except (ValueError, OSError) as error:
        text = str(error)
        if isinstance(error, OSError):
            text = f"must be a readable file, got {error.strerror}"
        advice = getattr(error, "advice", "") or advice
        line = " ".join(text[: 2 * _MAX_MESSAGE].split("\n"))
        raise CheckpointError(f"load: {path}: {line}; {advice}") from error


@contextmanager
def open_file(path: Path, limit_bytes: int) -> Iterator[tuple[BinaryIO, int]]:
    """A regular file of at most this size, and its size; symbolic links to one are followed.

    Raises: OSError or Violation; pipes and devices are refused before they are opened.
    """
    _require_regular(os.stat(path), limit_bytes)
    flags = ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # some only on some systems
    handle = os.open(path, sum(getattr(os, flag, 0) for flag in flags) | os.O_RDONLY)
    with os.fdopen(handle, "rb") as file:
        yield file, _require_regular(os.fstat(handle), limit_bytes)


def _require_regular(info: os.stat_result, limit_bytes: int) -> int:
    kind = stat.filemode(info.st_mode)
    require(stat.S_ISREG(info.st_mode), "must be a regular file or a link to one", kind)
    require(info.st_size <= limit_bytes, f"must be of at most {limit_bytes} bytes", info.st_size)
    return info.st_size


def read_file(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file of at most this size, see open_file."""
    with open_file(path, limit_bytes) as (file, size):
        data = file.read(size + 1)
    require(len(data) == size, f"must stay of {size} bytes while it is read", len(data))
    return data


def replace_file(path: Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """The whole file under its name, or nothing: written beside it, flushed to disk, renamed.

    `data` may come in parts, of which one is read at a time.

    Where `path` is a symbolic link the link is replaced; what it points to is never written.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.writelines([data] if isinstance(data, bytes) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":  # the new name itself must reach the disk
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        except OSError as error:
            if error.errno not in (EINVAL, ENOTSUP):  # some network mounts flush files alone
                raise
        finally:
            os.close(folder)
