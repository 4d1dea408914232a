"""Files that others may have changed: read strictly, written whole or not at all."""

import json
import os
import reprlib
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

T = TypeVar("T")

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_MAX_MESSAGE = 300
_FLOAT32_MAX = (2 - 2**-23) * 2.0**127


class CheckpointError(ValueError):
    """Not a checkpoint of this model; one line names the file, the rule and the value."""


def replace_file(path: Path, data: bytes) -> None:
    """The whole file under its name, or nothing: written beside it, flushed to disk, renamed."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(data)
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
        finally:
            os.close(folder)


def short(value: object) -> str:
    """repr(value) in one line of at most 300 characters."""
    return _SHORT.repr(value)[:_MAX_MESSAGE]


def refuse(path: Path, rule: str, value: object) -> NoReturn:
    """Raises the one line: file, rule, value."""
    raise CheckpointError(f"load: {path}: {rule}, got {short(value)}")


def read_regular(path: Path, limit_bytes: int) -> bytes:
    """The content of a regular file (no link, pipe or device) of at most this size."""
    flags = ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")  # some only on some systems
    try:
        handle = os.open(path, sum(getattr(os, flag, 0) for flag in flags) | os.O_RDONLY)
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise CheckpointError(
            f"load: {path}: must be a regular file, no link, got {reason}"
        ) from error
    try:
        info = os.fstat(handle)
        if not stat.S_ISREG(info.st_mode):
            refuse(path, "must be a regular file, no link", stat.filemode(info.st_mode))
        if info.st_size > limit_bytes:
            refuse(path, f"must be of at most {limit_bytes} bytes", info.st_size)
        with os.fdopen(os.dup(handle), "rb") as file:
            data = file.read(min(limit_bytes, info.st_size) + 1)
    finally:
        os.close(handle)
    if len(data) > limit_bytes:
        refuse(path, f"must be of at most {limit_bytes} bytes", len(data))
    return data


def parse_json(path: Path, data: bytes) -> dict[str, Any]:
    """A JSON object in ASCII in which no key comes twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            refuse(path, "must hold each key once", sorted(key for key, _ in pairs))
        return result

    try:
        value = json.loads(data.decode("ascii"), object_pairs_hook=unique)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"load: {path}: must be JSON, got {short(str(error))}") from error
    if type(value) is not dict:
        refuse(path, "must be a JSON object", value)
    return value


def is_same_json(found: object, expected: object) -> bool:
    """Equal in type too: to Python 64.0 == 64 and True == 1."""
    return json.dumps(found, sort_keys=True) == json.dumps(expected, sort_keys=True)


def require_keys(path: Path, where: str, value: object, keys: Iterable[str]) -> dict[str, Any]:
    """The value, if it is an object with exactly these keys."""
    if type(value) is not dict:
        refuse(path, f"{where} must be an object", value)
    missing, unknown = sorted(set(keys) - set(value)), sorted(set(value) - set(keys))
    if missing:
        refuse(path, f"{where} must have the key {missing[0]}", sorted(value))
    if unknown:
        refuse(path, f"{where} must have no key but its own", unknown)
    return value


def require_list(path: Path, where: str, value: object, least: int, most: int) -> list[Any]:
    """The value, if it is a list of that many."""
    if type(value) is not list or not least <= len(value) <= most:
        refuse(path, f"{where} must be a list of {least} to {most}", value)
    return value


def require_count(path: Path, where: str, value: object, most: int) -> int:
    """The value, if it is an integer from 1 on, no bool and no float."""
    if type(value) is not int or not 1 <= value <= most:
        refuse(path, f"{where} must be an integer from 1 to {most}", value)
    return value


def require_number(path: Path, where: str, value: object) -> float:
    """The value, if it is a float, no integer, and finite in float32 too."""
    if type(value) is not float or not abs(value) <= _FLOAT32_MAX:
        refuse(path, f"{where} must be a finite float32 number", value)
    return value


def is_sha256(value: object) -> bool:
    """64 hexadecimal digits in lower case, which is also safe in a file name."""
    return type(value) is str and len(value) == 64 and set(value) <= set("0123456789abcdef")


def parse_options(
    path: Path, where: str, value: object, defaults: T, *, since: Mapping[str, object] = {}
) -> T:
    """A dataclass of strings, flags and tuples of strings from its JSON object.

    Args:
      path, where: for messages.
      value: the object, with exactly the fields of the dataclass.
      defaults: one such dataclass; its values show the types.
      since: fields that older files lack, and what these files stand for.
    """
    if type(value) is dict:
        value = {**since, **value}
    raw = dict(require_keys(path, where, value, vars(defaults)))
    for name, default in vars(defaults).items():
        wanted = list if type(default) is tuple else type(default)
        if type(raw[name]) is not wanted:
            refuse(path, f"{where}.{name} must be of type {wanted.__name__}", raw[name])
        if wanted is list:
            if not all(type(element) is str for element in raw[name]):
                refuse(path, f"{where}.{name} must hold strings", raw[name])
            raw[name] = tuple(raw[name])
    with refusing(path):
        return type(defaults)(**raw)


@contextmanager
def refusing(path: Path) -> Iterator[None]:
    """Refuses the file where the constructor of what it holds raises ValueError."""
    try:
        yield
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"load: {path}: {str(error)[:_MAX_MESSAGE]}") from error
