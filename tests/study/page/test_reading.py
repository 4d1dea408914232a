"""A report that others may have changed: one line names the field."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lraee import CheckpointError
from lraee.study.page import read_report
from tests.study_report import report, without_parts

Change = Callable[[Any], object]


def written(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def test_comes_back_as_it_was(tmp_path: Path) -> None:
    for built in (report(), without_parts()):
        assert read_report(written(tmp_path / "report.json", built)) == built


def test_whole_numbers_become_fractions(tmp_path: Path) -> None:
    built = report()
    built["minutes"] = 31
    back = read_report(written(tmp_path / "report.json", built))
    assert back["minutes"] == 31.0 and type(back["minutes"]) is float


CHANGES: dict[str, Change] = {
    "schema must be 'lraee.report/1'": lambda r: r.update(schema="other/9"),
    "must have the key main": lambda r: r.pop("main"),
    "must have no key but its own, got ['more']": lambda r: r.update(more=1),
    "blocks must be an integer from ": lambda r: r.update(blocks=12.0),
    "from -1000000000000000 to 1000000000000000, got True": lambda r: r.update(blocks=True),
    "model must be a string, got None": lambda r: r.update(model=None),
    "main must be a list": lambda r: r.update(main={}),
    "noise must be an object": lambda r: r.update(noise=[]),
    "main[1].top1.mean must be a finite number": lambda r: r["main"][1]["top1"].update(mean="9"),
    "must hold finite numbers, got 'NaN'": lambda r: r.update(minutes=float("nan")),
    "costs[0].flops_saved must be a finite": lambda r: r["costs"][0].update(flops_saved=1e300),
    "seeds[0] must be an integer from": lambda r: r.update(seeds=[10**40]),
    "noise.int8[0].is_dropped must be true": lambda r: r["noise"]["int8"][0].update(is_dropped=0),
    "owed[0].interval must be a list of 2": lambda r: r["owed"][0].update(interval=[1.0]),
    "findings[0].holds must be true or": lambda r: r["findings"][0].update(holds="yes"),
    "examples[0].jpeg must be a JPEG": lambda r: r["examples"][0].update(jpeg='x" onload="'),
    "examples[1].jpeg must be a JPEG": lambda r: r["examples"][1].update(jpeg="aGVsbG8="),
}


@pytest.mark.parametrize("message", CHANGES)
def test_refuses_and_names_the_field(tmp_path: Path, message: str) -> None:
    built: Any = report()
    CHANGES[message](built)
    path = written(tmp_path / "report.json", built)
    with pytest.raises(CheckpointError) as caught:
        read_report(path)
    line = str(caught.value)
    assert message in line and str(path) in line and "\n" not in line


@pytest.mark.parametrize("data", [b"", b"[1]", b"{", b"\xff", b"[" * 100_000, b'{"a":1,"a":2}'])
def test_refuses_what_is_no_report(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(data)
    with pytest.raises(CheckpointError):
        read_report(path)


def test_refuses_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lraee.study.page.reading.MAX_BYTES", 1000)
    with pytest.raises(CheckpointError, match="at most 1000 bytes"):
        read_report(written(tmp_path / "report.json", report()))
