"""Reads report.json, which others may have changed: each field is checked against the schema."""

import base64
import binascii
import types
from pathlib import Path
from typing import Any, Union, cast, get_args, get_origin, get_type_hints, is_typeddict

from lraee.storage.files import refusing, require
from lraee.storage.json import read_json
from lraee.storage.schema import (
    FLAG,
    STRING,
    Kind,
    integer,
    items,
    nullable,
    record,
    scalar,
    table,
)  # fmt: skip
from lraee.study import schema
from lraee.study.dose import schema as dose_schema
from lraee.study.dose.schema import DoseReport
from lraee.study.schema import Report

MAX_BYTES = 32 << 20
_ADVICE = "write it again with lraee report"
_LARGEST = 10**15  # of any number: no figure of a study is larger, and drawings stay finite
_JPEG = (b"\xff\xd8\xff", b"\xff\xd9")  # how one begins and ends
_NUMBER = scalar(
    f"a finite number of at most {_LARGEST:g}",
    lambda v: type(v) in (int, float) and -_LARGEST <= v <= _LARGEST,  # which NaN is not
    build=float,
)
_SCALARS = {float: _NUMBER, int: integer(-_LARGEST, _LARGEST), bool: FLAG, str: STRING}


def read_report(path: Path | str) -> Report:
    """The report in this file; whole numbers where fractions may be come back as floats.

    Args:
      path: a regular file of ASCII JSON, at most 32 MiB.
    Raises: lraee.CheckpointError naming the field, on any other.
    """
    path = Path(path)
    with refusing(path, _ADVICE):
        report = cast(Report, _checked(path, schema.SCHEMA, Report))
        for i, example in enumerate(report["examples"]):
            is_jpeg = _is_jpeg(example["jpeg"])
            require(is_jpeg, f"examples[{i}].jpeg must be a JPEG in base64", example["jpeg"])
    return report


def read_doses(path: Path | str) -> DoseReport:
    """The same of a dose study; see read_report."""
    path = Path(path)
    with refusing(path, _ADVICE):
        return cast(DoseReport, _checked(path, dose_schema.SCHEMA, DoseReport))


def is_of_doses(path: Path) -> bool:
    """Whether the file says that it is of a dose study; see read_report for what is refused."""
    with refusing(path, _ADVICE):
        return read_json(path, MAX_BYTES).get("schema") == dose_schema.SCHEMA


def _checked(path: Path, expected: str, hint: Any) -> Any:
    raw = read_json(path, MAX_BYTES)
    require(raw.get("schema") == expected, f"schema must be {expected!r}", raw.get("schema"))
    return _kind(hint)(raw, "")


def _kind(hint: Any) -> Kind:
    """What JSON must hold where the schema has this type."""
    origin, of = get_origin(hint), get_args(hint)
    if is_typeddict(hint):
        return record({key: _kind(each) for key, each in get_type_hints(hint).items()})
    if origin in (Union, types.UnionType):
        (other,) = (each for each in of if each is not types.NoneType)
        return nullable(_kind(other))
    if origin is list:
        return items(_kind(of[0]), build=list)
    if origin is tuple:
        return items(_kind(of[0]), len(of), len(of))
    return table(_kind(of[1])) if origin is dict else _SCALARS[hint]


def _is_jpeg(text: str) -> bool:
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return False
    return data.startswith(_JPEG[0]) and data.endswith(_JPEG[1])
