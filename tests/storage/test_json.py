"""JSON is written whole and read strictly."""

import math
from pathlib import Path

import pytest

from lraee.storage.files import Violation
from lraee.storage.json import parse, read_json, render, write_json


def test_what_is_written_is_read(tmp_path: Path) -> None:
    value = {"b": [1, 2.5, None, True], "a": {"é\ud800": "x"}}
    path = tmp_path / "new" / "report.json"
    write_json(value, path)
    assert read_json(path, 1000) == value
    assert render(value) == b'{\n "a": {\n  "\\u00e9\\ud800": "x"\n },\n "b": [\n  1,\n  2.5,\n  null,\n  true\n ]\n}\n'  # fmt: skip  # noqa: E501
    assert parse(render(value)) == value
    with pytest.raises(ValueError):
        write_json({"x": math.nan}, path)
    assert [p.name for p in path.parent.iterdir()] == ["report.json"]
    assert read_json(path, 1000) == value
    with pytest.raises(Violation, match="must be of at most 10 bytes, got"):
        read_json(path, 10)


@pytest.mark.parametrize("value", [math.nan, {"x": {1}}, {1: 1, "1": 1}, math.inf])
def test_what_json_cannot_hold_is_not_rendered(value: object) -> None:
    with pytest.raises(Violation, match="^must be JSON, got"):
        render(value)


TEXTS = {
    b"": "must be JSON",
    b"[1]": "must be a JSON object",
    b"{": "must be JSON",
    b'{"a": "\xff"}': "must be JSON",
    b'{"a": 1, "a": 2}': "must hold each key once",
    b'{"a": {"b": NaN}}': "must hold finite numbers, got 'NaN'",
    b'{"a": -Infinity}': "must hold finite numbers, got '-Infinity'",
    b'{"a": ' + b"[" * 100_000: "must be JSON",
    b'{"a": ' + b"9" * 5000 + b"}": "must be JSON",
}


@pytest.mark.parametrize("data", TEXTS, ids=range(len(TEXTS)))
def test_other_text_is_refused(data: bytes) -> None:
    with pytest.raises(Violation, match=f"^{TEXTS[data]}"):
        parse(data)
