"""Blocks of a README from a report."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from bench import study_figures
from tests import dose_cells
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


def run(folder: Path, text: str, *options: str, second: bool = False) -> tuple[Result, str]:
    (folder / "report.json").write_text(json.dumps(report()))
    document, summary = folder / "README.md", folder / "summary.json"
    document.write_text(text)
    other = report()
    other["model"] = "second"
    other["findings"][0]["holds"] = None
    del other["findings"][1]
    (folder / "other.json").write_text(json.dumps(other))
    more = ["--second", str(folder / "other.json")] if second else []
    command = ["summarize", str(folder / "report.json"), str(summary), *more]
    assert CliRunner().invoke(study_figures.app, command).exit_code == 0
    result = CliRunner().invoke(study_figures.app, ["fill", str(summary), str(document), *options])
    return result, document.read_text()


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
    block = "<!-- report: stable -->\n<!-- /report -->\n"
    result, text = run(tmp_path, block, second=True)
    assert result.exit_code == 0
    rows = [line for line in text.splitlines() if line.startswith("| ")][2:]
    assert len(rows) == len(report()["findings"])
    assert rows[0].endswith("| inconclusive |") and rows[1].endswith("| not tested |")
    assert "must have a second model" in run(tmp_path, block)[0].output


def test_a_summary_of_another_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text('{"schema": "other"}')
    (tmp_path / "README.md").write_text(README)
    command = ["fill", str(tmp_path / "summary.json"), str(tmp_path / "README.md")]
    result = CliRunner().invoke(study_figures.app, command)
    assert result.exit_code == 1 and "must have the schema" in result.output


def test_names_are_no_markup() -> None:
    assert study_figures.escaped("a|b\n<!-- /report -->") == r"a\|b \<!-- /report --\>"


DOSE = """# Title
<!-- dose: run -->
<!-- /dose -->
<!-- dose: words -->
by hand
<!-- /dose -->
<!-- dose: verdicts -->
<!-- /dose -->
<!-- dose: curve -->
<!-- /dose -->
"""


def fill_dose(folder: Path, text: str, *options: str) -> tuple[Result, str]:
    (folder / "dose.json").write_text(json.dumps(dose_cells.report()))
    document = folder / "study.md"
    document.write_text(text)
    command = ["dose", str(folder / "dose.json"), str(document), *options]
    return CliRunner().invoke(study_figures.app, command), document.read_text()


def test_blocks_and_picture_of_a_dose_study(tmp_path: Path) -> None:
    picture = tmp_path / "images" / "dose.svg"
    result, text = fill_dose(tmp_path, DOSE, "--picture", str(picture))
    assert result.exit_code == 0, result.output
    assert "by hand" not in text and "same answer to 512 of 512 photos" in text
    claims = [c for c in dose_cells.report()["claims"] if c["backbone"] == "paper"]
    assert all(study_figures.escaped(claim["words"]) in text for claim in claims)
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(claims) + 2 + len(dose_cells.report()["rescue"])
    assert picture.read_text().startswith("<svg ")
    assert fill_dose(tmp_path, text, "--check")[0].exit_code == 0
    assert fill_dose(tmp_path, DOSE, "--check")[0].exit_code == 1


def test_a_dose_block_of_another_name_is_refused(tmp_path: Path) -> None:
    result, _ = fill_dose(tmp_path, "<!-- dose: main -->\n<!-- /dose -->\n")
    assert result.exit_code == 1 and "must be one of ['run'" in result.output
