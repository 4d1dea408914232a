"""The page and the picture of a dose study."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lraee import CheckpointError
from lraee.cli.main import app
from lraee.study.page import read_doses, write_doses
from lraee.study.page.charts import svg_file
from lraee.study.page.dose_page import render
from lraee.study.page.dose_plots import of_curve
from tests.dose_cells import report
from tests.study.page.test_page import HOSTILE, Page, hostile

NO_ROWS: Any = {"kept": [], "noise": [], "systems": [], "rescue": [], "claims": []}


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(report()))


def test_holds_every_claim_and_figure(page: Page) -> None:
    for claim in report()["claims"]:
        assert claim["claim"] in page.text
        if claim["backbone"] == "paper":
            assert claim["words"] in page.text
    row = next(r for r in report()["rescue"] if (r["backbone"], r["dose"]) == ("paper", 32.0))
    owed = row["owed"]
    assert f"{owed['value']:.2f} \u00b1 {2 * owed['error']:.2f}" in page.text
    assert f"{row['rescue']:,}" in page.text and "512" in page.text


def test_needs_nothing_else_and_is_in_order(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids)) and not page.all("script")
    for _, attributes in page.elements:
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), target
    assert all(svg["aria-labelledby"] in ids for svg in page.all("svg"))
    assert render(report()) == render(report())


def test_names_are_text() -> None:
    changed = Page(render(hostile(report())))
    assert not changed.all("script") and changed.text.count(HOSTILE) > 10


def test_parts_that_were_not_run() -> None:
    bare = Page(render(report() | NO_ROWS))
    assert not bare.all("svg") and "This part was not run." in bare.text


def test_the_picture_has_a_ground_of_its_own_in_light_and_dark() -> None:
    text = svg_file(of_curve(report()))
    assert text.startswith("<svg ") and text.rstrip().endswith("</svg>")
    assert text.count("<rect y=") == 1 and "prefers-color-scheme: dark" in text
    assert re.search(r"float control", text) and "LRA-EE as published" in text
    assert text == svg_file(of_curve(report()))


def test_files_come_back_and_the_page_can_be_written_again(tmp_path: Path) -> None:
    written = write_doses(report(), tmp_path)
    assert [path.name for path in written] == ["dose.json", "dose.html", "dose.svg"]
    assert read_doses(written[0]) == report()
    before = written[1].read_bytes()
    written[1].unlink()
    result = CliRunner().invoke(app, ["report", "--from", str(written[0])])
    assert result.exit_code == 0, result.output
    assert written[1].read_bytes() == before


def test_a_file_that_others_changed_is_refused(tmp_path: Path) -> None:
    path = write_doses(report(), tmp_path)[0]
    changed = json.loads(path.read_text())
    changed["rescue"][0]["owed"]["error"] = "0"
    path.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=r"rescue\[0\].owed.error must be a finite number"):
        read_doses(path)
