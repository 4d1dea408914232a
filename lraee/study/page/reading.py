"""Reads report.json, which others may have changed: each field is checked against the schema."""

import base64
import binascii
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from lraee.storage.files import parse_json, read_regular, refuse
from lraee.study import schema
from lraee.study.schema import Report

MAX_BYTES = 32 << 20
_LARGEST = 1e15  # of any number: no figure of a study is larger, and drawings stay finite
_JPEG = (b"\xff\xd8\xff", b"\xff\xd9")  # how one begins and ends


def read_report(path: Path | str) -> Report:
    """The report in this file; whole numbers where fractions may be come back as floats.

    Args:
      path: a regular file of ASCII JSON, at most 32 MiB.
    Raises: lraee.CheckpointError naming the field, on any other.
    """
    path = Path(path)
    raw = parse_json(path, read_regular(path, MAX_BYTES))
    if raw.get("schema") != schema.SCHEMA:
        refuse(path, f"schema must be {schema.SCHEMA!r}", raw.get("schema"))
    report: Report = _checked(path, "the report", raw, Report)
    for i, example in enumerate(report["examples"]):
        _require_jpeg(path, f"examples[{i}].jpeg", example["jpeg"])
    return report


def _checked(path: Path, where: str, value: Any, kind: Any) -> Any:
    """The value as this type of the schema has it."""
    origin = get_origin(kind)
    if is_typeddict(kind):
        return _object(path, where, value, kind)
    if origin in (Union, types.UnionType):
        (other,) = (each for each in get_args(kind) if each is not types.NoneType)
        return None if value is None else _checked(path, where, value, other)
    if origin is list:
        return _list(path, where, value, get_args(kind)[0])
    if origin is tuple:
        if type(value) is not list or len(value) != len(get_args(kind)):
            refuse(path, f"{where} must be a list of {len(get_args(kind))}", value)
        pairs = enumerate(zip(value, get_args(kind), strict=True))
        return tuple(_checked(path, f"{where}[{i}]", v, k) for i, (v, k) in pairs)
    if origin is dict:
        if type(value) is not dict:
            refuse(path, f"{where} must be an object", value)
        of = get_args(kind)[1]
        return {key: _checked(path, f"{where}.{key[:40]}", v, of) for key, v in value.items()}
    return _scalar(path, where, value, kind)


def _object(path: Path, where: str, value: Any, kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    if type(value) is not dict:
        refuse(path, f"{where} must be an object", value)
    for key in hints:
        if key not in value:
            refuse(path, f"{where} must have the key {key}", sorted(value))
    unknown = sorted(set(value) - set(hints))
    if unknown:
        refuse(path, f"{where} must have no key but its own", unknown)
    prefix = "" if kind is Report else f"{where}."
    return {key: _checked(path, prefix + key, value[key], of) for key, of in hints.items()}


def _list(path: Path, where: str, value: Any, kind: Any) -> list[Any]:
    if type(value) is not list:
        refuse(path, f"{where} must be a list", value)
    return [_checked(path, f"{where}[{i}]", each, kind) for i, each in enumerate(value)]


def _scalar(path: Path, where: str, value: Any, kind: Any) -> Any:
    if kind is float and type(value) in (int, float):
        if not -_LARGEST <= value <= _LARGEST:  # which NaN is not either
            refuse(path, f"{where} must be a finite number of at most {_LARGEST:g}", value)
        return float(value)
    if type(value) is not kind:
        names = {float: "a number", int: "an integer", bool: "true or false", str: "a string"}
        refuse(path, f"{where} must be {names[kind]}", value)
    if kind is int and not -_LARGEST <= value <= _LARGEST:
        refuse(path, f"{where} must be an integer of at most {_LARGEST:g}", value)
    return value


def _require_jpeg(path: Path, where: str, text: str) -> None:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if not (data.startswith(_JPEG[0]) and data.endswith(_JPEG[1])):
        refuse(path, f"{where} must be a JPEG in base64", text)
