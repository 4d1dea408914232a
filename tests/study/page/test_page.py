"""The page holds every figure, escapes every name, needs nothing else, and is the same twice."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from lraee.study.page import write_page
from lraee.study.page.page import render
from tests.study_report import report, row, without_parts

HOSTILE = "</style><script>alert('$x$')</script> --> & \"q\" '"
VOID = {"meta", "link", "img", "br"}


class Page(HTMLParser):
    """Elements with their attributes, text outside style, and whether all closes in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", [""]
        self.feed(text)
        assert self._open == [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1] != "style":
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def hostile(value: Any) -> Any:
    """The report with every name replaced; what is chosen from a list stays."""
    if isinstance(value, dict):
        kept = ("jpeg", "schema")
        return {key: each if key in kept else hostile(each) for key, each in value.items()}
    if isinstance(value, list):
        return [hostile(each) for each in value]
    return HOSTILE if isinstance(value, str) else value


@pytest.fixture(scope="module")
def page() -> Page:
    return Page(render(report()))


def test_same_report_same_bytes(tmp_path: Path) -> None:
    paths = [tmp_path / "a.html", tmp_path / "b.html"]
    for path in paths:
        write_page(report(), path)
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_findings_first_then_seven_parts(page: Page) -> None:
    sections = [attributes.get("id") for attributes in page.all("section")]
    named = [name for name in sections if name]
    assert named == ["findings", *(f"part{i}" for i in range(1, 8))]
    assert "Of 14 claims, 11 hold here, 1 fail, and 2 are inconclusive" in page.text
    for finding in report()["findings"]:
        assert finding["claim"] in page.text
        assert finding["words"] in page.text.replace("\u00a0%", " %")


def test_figures_of_every_part(page: Page) -> None:
    for figure in (
        "48.00", "36.80 \u00b1 0.30", "56.30 \u00b1 0.20", "ImageNet, other model",
        "60.40 \u00b1 0.30", "41.00", "25.00 \u00b1 1.20", "\u22124.60 to \u22123.40", "0.0004",
        "8: 0.86, 10: 0.84", "\u22120.70 to 1.10", "16.66", "14.20", "57.40",
    ):  # fmt: skip
        assert figure in page.text, figure


def test_needs_nothing_else(page: Page) -> None:
    assert not page.all("script") and not page.all("iframe")
    for _, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")]
        for name in ("src", "href", "xlink:href"):
            target = attributes.get(name)
            assert target is None or target.startswith(("#", "data:")), target
    assert not re.search(r"url\((?!#)|@import", render(report()))


def test_pictures_have_labels_and_headers_scopes(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("svg")) == 15 and len(page.all("img")) == 8
    assert all(svg["role"] == "img" and svg["aria-labelledby"] in ids for svg in page.all("svg"))
    assert all(image["alt"] for image in page.all("img"))
    assert all(cell.get("scope") in ("row", "col") for cell in page.all("th"))


def test_names_are_text() -> None:
    page = Page(render(hostile(report())))
    assert not page.all("script") and len(page.all("style")) == 1
    assert page.text.count(HOSTILE) > 100


def test_parts_that_were_not_run() -> None:
    page = Page(render(without_parts()))
    assert page.text.count("This part was not run.") == 14
    assert not page.all("svg") and not page.all("table")
    assert (
        "No findings are part of this report."
        in Page(
            render(without_parts() | {"findings": []})  # type: ignore[arg-type]
        ).text
    )


def test_one_seed_and_extremes() -> None:
    """A single block, figures of 0 and of 1e15, a backbone and an unknown system."""
    built: Any = report()
    built["noise"] = {"new": [built["noise"]["int8"][0] | {"inr": 1e15, "nsr": 0.0}],
                     "int8": [built["noise"]["int8"][0] | {"inr": 1e-12}], "paper": []}  # fmt: skip
    built["lens"] = {"float": built["lens"]["float"][:1], "int8": []}
    built["main"] = [row("new", "new", 1e15, agreement=None)]
    built["frontier"] = built["frontier"][:1]
    built["sweeps"][0] |= {"learned": [], "confidence": []}
    assert "1.00e+15" in Page(render(built)).text


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_says_what_to_install(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} must .*pip install 'lraee\[report\]'"):
        render(report())
