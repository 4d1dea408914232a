"""Blocks of a README from a report."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench import readme_figures
from tests.study_report import report

README = """# Title
<!-- report: main -->
by hand
<!-- /report -->
text
<!-- report: quadrants -->
<!-- /report -->
<!-- report: summary -->
<!-- /report -->
end
"""


def run(folder: Path, text: str, *options: str) -> tuple[Result, str]:
    import typer

    (folder / "report.json").write_text(json.dumps(report()))
    readme = folder / "README.md"
    readme.write_text(text)
    app = typer.Typer()
    app.command()(readme_figures.main)
    result = CliRunner().invoke(app, [str(folder / "report.json"), str(readme), *options])
    return result, readme.read_text()


def test_blocks_are_made_and_stay(tmp_path: Path) -> None:
    result, text = run(tmp_path, README)
    assert result.exit_code == 0 and "by hand" not in text
    assert "| full depth | INT8 (paper) | 58.80 | 90.40 | 0.0 |" in text
    assert "| LRA-EE, our recipe | 8,000 | 420 | 400 | 6,180 |" in text
    assert "Fails (1): Exits are right more often than full depth" in text
    assert text.startswith("# Title\n") and text.endswith("<!-- /report -->\nend\n")
    assert run(tmp_path, text)[1] == text
    assert run(tmp_path, text, "--check")[0].exit_code == 0


def test_check_fails_and_changes_nothing(tmp_path: Path) -> None:
    result, text = run(tmp_path, README, "--check")
    assert result.exit_code == 1 and text == README


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- report: other -->\n<!-- /report -->\n", "must be one of ['summary'"),
        ("<!-- report: main -->\nnever closed\n", "must be closed on a line, got 0 of 1"),
        ("no block\n", "got 0 of 0"),
    ],
)
def test_refuses_blocks_it_cannot_make(tmp_path: Path, text: str, message: str) -> None:
    result, after = run(tmp_path, text)
    assert result.exit_code == 1 and after == text and message in result.output


def test_verdicts_beside_those_of_a_second_model(tmp_path: Path) -> None:
    other = report()
    other["model"] = "second"
    other["findings"][0]["holds"] = None
    del other["findings"][1]
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    block = "<!-- report: stable -->\n<!-- /report -->\n"
    result, text = run(tmp_path, block, "--second", str(path))
    assert result.exit_code == 0
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(report()["findings"])
    assert rows[0].endswith("| cannot be told |") and rows[1].endswith("| not asked |")
    assert run(tmp_path, block)[0].exit_code == 1


def test_names_are_no_markup() -> None:
    assert readme_figures.escaped("a|b\n<!-- /report -->") == r"a\|b \<!-- /report --\>"
