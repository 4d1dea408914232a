"""What is known of this GPU of the user: small JSON files, by the hash of the kernels' source."""

import functools
import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

MOST_BYTES = 1 << 20
"""Of a file; a larger one was not written by us."""


@functools.cache
def kernels_hash() -> str:
    """sha256 of every source file of this package, 16 hex digits: another kernel, another file."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def folder() -> Path:
    """$LRAEE_CACHE, or lraee in $XDG_CACHE_HOME, or ~/.cache/lraee; then kernels and their hash."""
    given = os.environ.get("LRAEE_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(given) if given else Path(base) / "lraee"
    return root / "kernels" / kernels_hash()


def read(name: str) -> dict[str, Any] | None:
    """The object stored under this name; None where there is none, or no JSON object of ours."""
    path = folder() / f"{name}.json"
    try:
        if path.stat().st_size > MOST_BYTES:
            return None
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


def write(name: str, content: dict[str, Any]) -> Path:
    """Stores content under this name, whole or not at all, and returns where.

    Raises: OSError where the folder cannot be written.
    """
    folder().mkdir(parents=True, exist_ok=True)
    path = folder() / f"{name}.json"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{name}.")
    try:
        with os.fdopen(handle, "w") as file:
            json.dump(content, file, indent=1, sort_keys=True)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
