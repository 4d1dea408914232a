"""The page in a real browser: phone and desktop, light and dark, without network."""

from pathlib import Path

import pytest

from lraee.study.page import write_page
from tests.study_report import report, without_parts

pytest.importorskip("playwright", reason="pip install 'lraee[browser]'")
from bench import check_page  # noqa: E402

needs_browser = pytest.mark.skipif(
    check_page.browser_program() is None, reason="no Chromium is installed"
)


@needs_browser
@pytest.mark.parametrize("make", [report, without_parts])
def test_no_fault(tmp_path: Path, make: object) -> None:
    assert callable(make)
    write_page(make(), tmp_path / "page.html")
    assert check_page.check(tmp_path / "page.html", tmp_path / "shots") == []
    shots = sorted(path.name for path in (tmp_path / "shots").iterdir())
    assert shots == ["desktop-dark.png", "desktop-light.png", "phone-dark.png", "phone-light.png"]


@needs_browser
def test_faults_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(
        "<!doctype html><body style='background:#fff'><p id=a style='color:#ccc'>pale</p>"
        "<p id=a style='width:2000px'>wide</p><img src='http://example.invalid/x.png'>"
        "<script>console.error('broken')</script>"
    )
    faults = " ".join(check_page.check(page, tmp_path / "shots"))
    for fault in ("contrast 1.61: pale", "px wide in a window of 390", "no label or size",
                  "asks for http://example.invalid/x.png", "console says: broken",
                  "has the id a twice"):  # fmt: skip
        assert fault in faults
