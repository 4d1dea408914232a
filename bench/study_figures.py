"""The figures of a study in documents, so that none is typed by hand.

    python -m bench.study_figures summarize REPORT.json docs/study/summary.json
    python -m bench.study_figures fill docs/study/summary.json README.md docs/study.md [--check]
    python -m bench.study_figures dose DOSE.json docs/study.md [--picture docs/images/dose.svg]

`summarize` keeps a few KB of a report: findings, main table, quadrants, and the findings of a
second model. `fill` writes them between the marks of a document: a block begins with
`<!-- report: NAME -->` and ends with `<!-- /report -->`, each on a line of its own. NAME: summary
(findings), main (the main table), quadrants (one row per backbone and recipe), stable (the verdict
on each claim beside that of the second model).
`dose` does the same for a dose study from its dose.json, between `<!-- dose: NAME -->` and
`<!-- /dose -->`: run (what was run), words (the range in which each claim holds), verdicts (claims
by dose), curve (every point of the picture); with --picture it draws the curve anew.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar, cast

import typer

from lraee.storage.files import CheckpointError, replace_file
from lraee.study.dose.schema import DoseReport
from lraee.study.page import dose_tables, formatting, read_doses, read_report
from lraee.study.page.pictures import save_curve
from lraee.study.page.tables import Table
from lraee.study.schema import Report

C = TypeVar("C")

SCHEMA = "lraee.study_summary/1"
_BLOCK = r"^(<!-- {kind}: (?P<name>[^\n]*?) -->\n)(?P<body>.*?)^(<!-- /{kind} -->)$"
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


def dose_run(report: DoseReport) -> str:
    """What was run, in one sentence."""
    doses = ", ".join(f"{dose:g}" for dose in report["doses"])
    seeds = len(report["seeds"])
    same = sum(kept["same_answers"] for kept in report["kept"])
    photos = sum(kept["photos"] for kept in report["kept"])
    worst = max((kept["largest_error"] for kept in report["kept"]), default=0.0)
    return (
        f"{'Dose' if len(report['doses']) == 1 else 'Doses'} {doses}; {seeds}"
        f" {'seed' if seeds == 1 else 'seeds'}; {report['learned_from']:,}"
        f" photos to learn from, {report['reported_on']:,} to report on."
        f" With the doses in, float gave the same answer to {same:,}"
        f" of {photos:,} photos; its embeddings moved by {worst:.1e} at most."
    )


def dose_words(report: DoseReport) -> str:
    """Per claim, the ranges of doses on the paper's INT8."""
    lines = [
        f"- {escaped(dose_tables.titled(claim))}: {escaped(claim['words'])}"
        for claim in report["claims"]
        if claim["backbone"] == "paper"
    ]
    return "\n".join(lines)


def dose_table(table: Table) -> str:
    """One of the page's tables."""
    return markdown(table.header, table.rows)


DOSE_BLOCKS: dict[str, Callable[[DoseReport], str]] = {
    "run": dose_run,
    "words": dose_words,
    "verdicts": lambda report: dose_table(dose_tables.of_verdicts(report, "paper")),
    "curve": lambda report: dose_table(dose_tables.of_curve(report)),
}


def filled(
    text: str, contents: C, blocks: Mapping[str, Callable[[C], str]], kind: str = "report"
) -> str:
    """The document with every block of one kind written anew.

    Raises: ValueError on a block of another name, and where there is none.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in blocks:
            raise ValueError(f"study_figures: a block must be one of {[*blocks]}, got {name!r}")
        return f"{match[1]}\n{blocks[name](contents)}\n\n{match[4]}"

    result, count = re.subn(_BLOCK.format(kind=kind), replace, text, flags=re.M | re.S)
    opened = text.count(f"<!-- {kind}: ")
    if not count or count != opened:
        got = f"{count} of {opened}"
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
    with _one_line():
        contents = read_summary(summary)
        _write(documents, lambda text: filled(text, contents, BLOCKS), summary, is_check=check)


@app.command()
def dose(
    report: Path,
    documents: list[Path],
    picture: Annotated[Path | None, typer.Option(help="SVG of the curve to write.")] = None,
    check: Annotated[bool, typer.Option(help="Change nothing; fail if something would.")] = False,
) -> None:
    """Write the blocks of a dose study, or check them; draw its curve."""
    with _one_line():
        contents = read_doses(report)
        _write(
            documents, lambda text: filled(text, contents, DOSE_BLOCKS, "dose"), report,
            is_check=check,
        )  # fmt: skip
        if picture is not None and not check:
            save_curve(contents, picture)


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _write(
    documents: Sequence[Path], fill: Callable[[str], str], source: Path, *, is_check: bool
) -> None:
    """All documents or, where one cannot be filled, none of them."""
    texts = {path: path.read_text() for path in documents}
    results = {path: fill(text) for path, text in texts.items()}
    for path in documents:
        if texts[path] == results[path]:
            continue
        if is_check:
            typer.echo(f"study_figures: {path} must show the figures of {source}", err=True)
            raise typer.Exit(1)
        replace_file(path, results[path].encode())


if __name__ == "__main__":
    app()
