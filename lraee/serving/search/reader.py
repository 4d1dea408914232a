"""The bytes of indexed photos, from a folder or a ZIP."""

from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lraee.data.sources import READ_ERRORS, DataError, Limits, Skipped, open_source


def open_reader(source: Path, limits: Limits) -> Callable[[str], bytes]:
    """read(name) -> bytes, which raises DataError on names that lead out of `source`.

    Raises: DataError where `source` is no folder and no ZIP.
    """
    skipped: list[Skipped] = []
    files = open_source(source, limits, skipped)

    def read(name: str) -> bytes:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name:
            raise DataError("has an unsafe name")
        try:
            return files.read(name)
        except (*READ_ERRORS, KeyError) as error:
            raise DataError(f"cannot be read: {type(error).__name__}") from None

    return read
