"""The figures of a study in documents, so that none is typed by hand.

    python -m bench.study_figures summarize REPORT.json docs/study/summary.json
    python -m bench.study_figures fill docs/study/summary.json README.md docs/study.md [--check]

`summarize` keeps a few KB of a report: findings, main table, quadrants, and the findings of a
second model. `fill` writes them between the marks of a document: a block begins with
`<!-- report: NAME -->` and ends with `<!-- /report -->`, each on a line of its own. NAME: summary
(findings), main (the main table), quadrants (one row per backbone and recipe), stable (the verdict
on each claim beside that of the second model).
"""

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, cast

import typer

from lraee.storage.files import CheckpointError, replace_file
from lraee.study.page import formatting, read_report
from lraee.study.schema import Report

SCHEMA = "lraee.study_summary/1"
_BLOCK = re.compile(
    r"^(<!-- report: (?P<name>[^\n]*?) -->\n)(?P<body>.*?)^(<!-- /report -->)$", re.M | re.S
)
_SENTENCES = {True: "Holds", False: "Fails", None: "Inconclusive"}
_MARKUP = re.compile(r"([\\`*_\[\]<>|#])")
_MAIN = ("name", "backbone", "top1", "agreement", "flops_saved")
_QUADRANTS = (
    "backbone", "recipe", "both", "rescue", "loss", "neither", "margin", "interval", "mcnemar_p",
)  # fmt: skip


class Summary(TypedDict):
    """What documents show of one report; the rows have the fields of lraee.study.schema."""

    schema: str
    model: str
    reported_on: int
    date: str
    command: str
    main: list[dict[str, Any]]
    quadrants: list[dict[str, Any]]
    findings: list[dict[str, Any]]
    second_model: str | None
    second_findings: list[dict[str, Any]]


def summarized(report: Report, second: Report | None) -> Summary:
    """The fields of a report that documents show."""

    def rows(rows: Iterable[Any], fields: Sequence[str]) -> list[dict[str, Any]]:
        return [{field: _rounded(row[field]) for field in fields} for row in rows]

    findings = ("claim", "holds")
    return {
        "schema": SCHEMA,
        "model": report["model"],
        "reported_on": report["reported_on"],
        "date": report["made"],
        "command": report["command"],
        "main": rows(report["main"], _MAIN),
        "quadrants": rows(report["quadrants"], _QUADRANTS),
        "findings": rows(report["findings"], findings),
        "second_model": None if second is None else second["model"],
        "second_findings": [] if second is None else rows(second["findings"], findings),
    }


def _rounded(value: Any) -> Any:
    """Floats with six digits, as documents show at most four."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(each) for key, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def read_summary(path: Path) -> Summary:
    """The summary in a file.

    Raises: ValueError on another schema.
    """
    summary = json.loads(path.read_bytes())
    if not isinstance(summary, dict) or summary.get("schema") != SCHEMA:
        raise ValueError(f"study_figures: {path} must have the schema {SCHEMA!r}")
    return cast(Summary, summary)


def summary_text(summary: Summary) -> str:
    """How many claims hold, then which hold, fail and are inconclusive; at most four sentences."""
    findings = summary["findings"]
    where = f"{escaped(summary['model'])} on {summary['reported_on']:,} photos"
    lines = [f"{len(findings)} claims of the paper, tested with {where}."]
    for holds, lead in _SENTENCES.items():
        claims = [escaped(finding["claim"]) for finding in findings if finding["holds"] is holds]
        if claims:
            lines.append(f"{lead} ({len(claims)}): {'; '.join(claims)}.")
    return "\n\n".join(lines)


def main_table(report: Summary) -> str:
    """The rows of the main table."""
    header = ("system", "backbone", "top-1, %", "as float, %", "FLOPs saved, %")
    rows = [
        (
            row["name"], formatting.backbone(row["backbone"]), formatting.spread(row["top1"]),
            formatting.spread(row["agreement"]), formatting.spread(row["flops_saved"], 1),
        )
        for row in report["main"]
    ]  # fmt: skip
    return markdown(header, rows)


def quadrants(report: Summary) -> str:
    """One row per backbone and recipe."""
    header = ("backbone", "recipe", "both right", "rescue", "loss", "neither", "margin, points",
              "95 % interval", "McNemar p")  # fmt: skip
    rows = [
        (
            formatting.backbone(q["backbone"]), q["recipe"], f"{q['both']:,}", f"{q['rescue']:,}",
            f"{q['loss']:,}", f"{q['neither']:,}", formatting.spread(q["margin"]),
            formatting.interval(*q["interval"]), formatting.chance(q["mcnemar_p"]),
        )
        for q in report["quadrants"]
    ]  # fmt: skip
    return markdown(header, rows)


def stable(report: Summary) -> str:
    """The verdict on each claim for both models.

    Raises: ValueError without a second model.
    """
    if report["second_model"] is None:
        raise ValueError("study_figures: summary must have a second model for the block stable")
    others = {finding["claim"]: finding["holds"] for finding in report["second_findings"]}
    verdicts = {True: "holds", False: "fails", None: "inconclusive"}
    rows = [
        (
            finding["claim"], verdicts[finding["holds"]],
            verdicts[others[finding["claim"]]] if finding["claim"] in others else "not tested",
        )
        for finding in report["findings"]
    ]  # fmt: skip
    return markdown(("claim", report["model"], report["second_model"]), rows)


BLOCKS: dict[str, Callable[[Summary], str]] = {
    "summary": summary_text,
    "main": main_table,
    "quadrants": quadrants,
    "stable": stable,
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what its cells hold is text, not markup."""
    lines = [header, ["---"] * len(header), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text in one line, without markup."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def filled(text: str, summary: Summary) -> str:
    """The document with every block written anew.

    Raises: ValueError on a block of another name, and where there is none.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in BLOCKS:
            raise ValueError(f"study_figures: a block must be one of {[*BLOCKS]}, got {name!r}")
        return f"{match[1]}\n{BLOCKS[name](summary)}\n\n{match[4]}"

    result, count = _BLOCK.subn(replace, text)
    if not count or count != text.count("<!-- report: "):
        got = f"{count} of {text.count('<!-- report: ')}"
        raise ValueError(f"study_figures: every block must be closed on a line, got {got}")
    return result


app = typer.Typer(add_completion=False)


@app.command()
def summarize(
    report: Path,
    out: Path,
    second: Annotated[Path | None, typer.Option(help="Report of another model.")] = None,
) -> None:
    """Write the summary of a report."""
    try:
        other = None if second is None else read_report(second)
        summary = summarized(read_report(report), other)
    except (CheckpointError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    replace_file(out, (json.dumps(summary, ensure_ascii=False) + "\n").encode())


@app.command()
def fill(
    summary: Path,
    documents: list[Path],
    check: Annotated[bool, typer.Option(help="Change nothing; fail if something would.")] = False,
) -> None:
    """Write the blocks of documents, or check them."""
    try:
        contents = read_summary(summary)
        texts = {path: path.read_text() for path in documents}
        results = {path: filled(text, contents) for path, text in texts.items()}
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for path in documents:
        if texts[path] == results[path]:
            continue
        if check:
            typer.echo(f"study_figures: {path} must show the figures of {summary}", err=True)
            raise typer.Exit(1)
        replace_file(path, results[path].encode())


if __name__ == "__main__":
    app()
