"""JSON is written whole and read strictly; tests of hostile files cover what is refused."""

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
    assert [p.name for p in path.parent.iterdir()] == ["report.json"] and read_json(path, 1000)
    for wrong in (math.nan, -math.inf, {"x": {1}}, {1: 1, "1": 1}):
        with pytest.raises(Violation, match="^must be JSON, got"):
            render(wrong)
