"""File names as photo libraries have them: kept byte for byte, escaped only where they are shown.

A name is text in which each byte that is not UTF-8 is a lone surrogate, in every locale.
"""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import PurePosixPath

# What may be a photo; what it is, its content says.
SUFFIXES = frozenset(
    (
        ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
        ".avif", ".heic", ".heif",
    )
)  # fmt: skip

# Folders that a system or a synchroniser keeps beside photos; those with a leading dot need no name
_SYSTEM_FOLDERS = frozenset(
    ("@eadir", "#recycle", "@recycle", "$recycle.bin", "recycler", "system volume information",
     "__macosx", "lost+found")
)  # fmt: skip
_SHOWN = 200
_STORED_BYTE = re.compile("\0([0-9a-f]{2})")


def to_text(name: bytes) -> str:
    """The name as text; `to_bytes` gives the same bytes again."""
    return name.decode("utf-8", "surrogateescape")


def to_bytes(name: str) -> bytes:
    """The bytes of a name, for the system's own calls."""
    return name.encode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    r"""The name for a terminal: what is no visible character as \u202f, at most 200 characters."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name[:_SHOWN])[:_SHOWN]


def to_stored(name: str) -> str:
    r"""The name as a UTF-8 column holds it: itself, and \0ff for a byte ff that is not UTF-8.

    No file name holds a NUL, so nothing is lost; `from_stored` gives the name again.
    """
    if name.isascii():
        return name
    # surrogateescape maps the byte b to the code point 0xDC00 + b
    return "".join(f"\0{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in name)


def from_stored(name: str) -> str:
    """The name that `to_stored` was given."""
    return _STORED_BYTE.sub(lambda match: chr(0xDC00 + int(match[1], 16)), name)


def refused_file(name: str) -> str | None:
    """Why a file of this name, without its folders, is no photo; None if it may be one."""
    if name.startswith("."):
        return "is a hidden file"
    if PurePosixPath(name).suffix.lower() not in SUFFIXES:
        return "has no photo's suffix"
    return None


def refused_folder(name: str) -> str | None:
    """Why a folder of this name, without those around it, holds no photos of the user."""
    if name.lower() in _SYSTEM_FOLDERS:
        return "is a system folder"
    return "is a hidden folder" if name.startswith(".") else None


def refused_member(name: str) -> str | None:
    """Why an archive's member of this path is not read; None if it may be a photo."""
    path = PurePosixPath(name)
    is_unsafe = path.is_absolute() or ".." in path.parts or "\\" in name
    if is_unsafe or any(unicodedata.category(c) == "Cc" for c in name):
        return "has an unsafe name"
    if reason := refused_file(path.name):
        return reason
    refused = filter(None, map(refused_folder, path.parts[:-1]))
    return next((reason.replace("is a", "lies in a") for reason in refused), None)


def reason_counts(reasons: Iterable[str]) -> dict[str, int]:
    """Reasons, without what differs from file to file, and how often each stands; most first."""
    counts: dict[str, int] = {}
    for reason in reasons:
        kind = re.sub(r"\d+", "N", reason.split(": ")[0])
        counts[kind] = counts.get(kind, 0) + 1
    return dict(sorted(counts.items(), key=lambda row: (-row[1], row[0])))
