"""A folder that several processes read and write: its lock, and what killed writers left in it."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: folders are not locked there
    fcntl = None  # type: ignore[assignment]

_log = logging.getLogger("lraee")


@contextmanager
def in_use(folder: Path) -> Iterator[int | None]:
    """Holds the folder's shared lock, under which no other process removes files.

    Yields None where there is no lock; then nothing is removed.
    """
    with ExitStack() as stack:
        locked = None
        with suppress(OSError):  # some network mounts, and a folder that is not there
            if fcntl:
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_SH)
                locked = handle
        yield locked


def is_alone(folder: Path, handle: int | None) -> bool:
    """Whether no other process uses the folder now, nor will before in_use ends."""
    if handle is not None:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            return False  # the last of these processes cleans up
        except OSError:  # NFS gives this lock to files alone
            pass
    _log.warning("save: %s cannot be locked: older tensors in it stay", folder)
    return False


def remove_others(folder: Path, names: str, keep: set[str]) -> None:
    """Removes files of these names (a pattern) but those to keep, and what replace_file left."""
    temporary = rf"\.({names})\.[0-9a-f]{{16}}\.tmp"
    for path in folder.iterdir():
        if re.fullmatch(f"{names}|{temporary}", path.name) and path.name not in keep:
            path.unlink()
