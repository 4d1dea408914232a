"""What is kept of a study."""

from pathlib import Path

from lraee.study.page import read_report, write_report
from tests.study_report import report, without_parts


def test_all_files_are_written_and_read_back(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    written = write_report(report(), folder)
    names = ["report.json", "report.html", "frontier.png", "lens.png", "drift.png"]
    assert [path.name for path in written] == names
    assert sorted(folder.iterdir()) == sorted(written)
    assert read_report(folder / "report.json") == report()


def test_without_figures_there_are_no_pictures(tmp_path: Path) -> None:
    assert [path.suffix for path in write_report(without_parts(), tmp_path)] == [".json", ".html"]
