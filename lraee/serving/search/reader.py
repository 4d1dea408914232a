"""The bytes of indexed photos, from a folder, a ZIP, or absolute paths."""

import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from lraee.data.names import to_bytes
from lraee.data.sources import READ_ERRORS, DataError, Limits, Skipped, open_source, read_file


def open_reader(source: Path | None, beside: Path, limits: Limits) -> Callable[[str], bytes]:
    """read(name) -> bytes, which raises DataError on names that lead out of where photos are.

    Args:
      source: folder or ZIP; None: absolute names are paths, others begin in `beside`.
      beside: folder of the embeddings.
      limits: on the size of a file.
    Raises: DataError where `source` is no folder and no ZIP.
    """
    if source is not None and source.is_file():
        skipped: list[Skipped] = []
        read_member = open_source(source, limits, skipped).read
    root = os.fsencode(source or beside)

    def read(name: str) -> bytes:
        path = PurePosixPath(name)
        if ".." in path.parts or "\0" in name or (path.is_absolute() and source is not None):
            raise DataError("has an unsafe name")
        try:
            if source is not None and source.is_file():
                return read_member(name)
            return read_file(os.path.join(root, to_bytes(name)), limits)
        except (*READ_ERRORS, LookupError, ValueError) as error:
            raise DataError(f"cannot be read: {type(error).__name__}") from None

    return read
