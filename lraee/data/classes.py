"""Class names, read from a JSON file."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lraee.data.sources import DataError, first_line

_MAX_CLASSES_BYTES = 64 << 20


@dataclass(frozen=True)
class Classes:
    """Label i is the folder name `wnids[i]` and, in prompts, the word `names[i]`."""

    wnids: tuple[str, ...]
    names: tuple[str, ...]


def read_classes(path: str | os.PathLike[str]) -> Classes:
    """Read `{"wnids": [...], "names": [...]}`: folder names and prompt words, in label order.

    Raises: DataError, one line, on an unreadable file, other keys, or lists that do not fit.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_CLASSES_BYTES:
            raise DataError(f"data: {path} must be at most {_MAX_CLASSES_BYTES} bytes")
        content = json.loads(path.read_bytes())
    except (OSError, RecursionError) as error:
        raise DataError(f"data: {path} must be a readable JSON: {first_line(error)}") from error
    except DataError:
        raise
    except ValueError as error:
        raise DataError(f"data: {path} must be JSON: {first_line(error)}") from error
    if not isinstance(content, dict) or not {"wnids", "names"} <= content.keys():
        got = (
            ", ".join(map(str, list(content)[:5]))
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise DataError(f'data: {path} must have the keys "wnids" and "names", got {got}')
    wnids, names = content["wnids"], content["names"]
    for key, rows in (("wnids", wnids), ("names", names)):
        if not isinstance(rows, list) or not rows or not all(_is_word(row) for row in rows):
            raise DataError(f'data: {path} must have a list of words under "{key}"')
    if len(wnids) != len(names):
        raise DataError(
            f"data: {path} must name each class once, got {len(wnids)} wnids, {len(names)} names"
        )
    if len(set(wnids)) != len(wnids):
        raise DataError(f"data: {path} must not repeat a wnid")
    return Classes(tuple(wnids), tuple(names))


def _is_word(row: object) -> bool:
    return isinstance(row, str) and bool(row.strip())
