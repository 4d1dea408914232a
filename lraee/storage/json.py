"""JSON files: read strictly and within limits, written whole or not at all."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from lraee.storage.files import Violation, read_file, replace_file, require


def read_json(path: Path, limit_bytes: int) -> dict[str, Any]:
    """The JSON object in this file, see parse and open_file."""
    return parse(read_file(path, limit_bytes))


def write_json(value: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a report whole or not at all; its folder is made when missing.

    Raises: ValueError on NaN and Inf.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=2, allow_nan=False) + "\n"
    replace_file(path, text.encode())


def render(value: object) -> bytes:
    """The canonical text of a config: sorted keys, an indent of one, ASCII, one newline at the end.

    Raises: Violation on what JSON cannot hold, NaN and Inf among it.
    """
    try:
        text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise Violation("must be JSON", str(error)) from error
    return (text + "\n").encode("ascii")


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object in ASCII, without NaN and Inf, in which no key comes twice.

    Raises: Violation on anything else.
    """
    try:
        value = json.loads(
            data.decode("ascii"), object_pairs_hook=_unique, parse_constant=_refuse_constant
        )
    except Violation:
        raise
    except (ValueError, RecursionError) as error:
        raise Violation("must be JSON", str(error)) from error
    require(type(value) is dict, "must be a JSON object", value)
    return value  # type: ignore[no-any-return]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    require(len(result) == len(pairs), "must hold each key once", sorted(key for key, _ in pairs))
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise Violation("must hold finite numbers", name)
