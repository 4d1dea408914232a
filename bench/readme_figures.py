"""Writes the figures of a report between the marks of a README, so that none is typed by hand.

    python -m bench.readme_figures docs/report.json README.md [--second other.json] [--check]

A block begins with `<!-- report: NAME -->` and ends with `<!-- /report -->`, each on a line of its
own. NAME: summary (findings), main (the main table), quadrants (one row per backbone and recipe),
stable (the verdict on each claim beside that of a second model's report).
"""

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from lraee.storage.files import CheckpointError, replace_file
from lraee.study.page import read_report, words
from lraee.study.schema import Report

_BLOCK = re.compile(
    r"^(<!-- report: (?P<name>[^\n]*?) -->\n)(?P<body>.*?)^(<!-- /report -->)$", re.M | re.S
)
_SENTENCES = {True: "Holds", False: "Fails", None: "Cannot be told"}
_MARKUP = re.compile(r"([\\`*_\[\]<>|#])")


def summary(report: Report) -> str:
    """How many claims hold, then which hold, fail and cannot be told; at most four sentences."""
    found = report["findings"]
    where = f"{escaped(report['model'])} on {report['reported_on']:,} photos"
    lines = [f"{len(found)} claims of the paper, put to the test with {where}."]
    for holds, lead in _SENTENCES.items():
        claims = [escaped(finding["claim"]) for finding in found if finding["holds"] is holds]
        if claims:
            lines.append(f"{lead} ({len(claims)}): {'; '.join(claims)}.")
    return "\n\n".join(lines)


def main_table(report: Report) -> str:
    """The rows of the main table."""
    header = ("system", "backbone", "top-1, %", "as float, %", "FLOPs saved, %")
    rows = [
        (
            row["name"], words.backbone(row["backbone"]), words.spread(row["top1"]),
            words.spread(row["agreement"]), words.spread(row["flops_saved"], 1),
        )
        for row in report["main"]
    ]  # fmt: skip
    return markdown(header, rows)


def quadrants(report: Report) -> str:
    """One row per backbone and recipe."""
    header = ("backbone", "recipe", "both right", "rescue", "loss", "neither", "margin, points",
              "95 % interval", "McNemar p")  # fmt: skip
    rows = [
        (
            words.backbone(q["backbone"]), q["recipe"], f"{q['both']:,}", f"{q['rescue']:,}",
            f"{q['loss']:,}", f"{q['neither']:,}", words.spread(q["margin"]),
            words.interval(*q["interval"]), words.chance(q["mcnemar_p"]),
        )
        for q in report["quadrants"]
    ]  # fmt: skip
    return markdown(header, rows)


def stable(report: Report, second: Report) -> str:
    """The verdict on each claim in both reports."""
    others = {finding["claim"]: finding["holds"] for finding in second["findings"]}
    verdicts = {True: "holds", False: "fails", None: "cannot be told"}
    rows = [
        (
            found["claim"], verdicts[found["holds"]],
            verdicts[others[found["claim"]]] if found["claim"] in others else "not asked",
        )
        for found in report["findings"]
    ]  # fmt: skip
    return markdown(("claim", report["model"], second["model"]), rows)


BLOCKS: dict[str, Callable[[Report], str]] = {
    "summary": summary,
    "main": main_table,
    "quadrants": quadrants,
}


def markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; what its cells hold is text, not markup."""
    lines = [header, ["---"] * len(header), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Text in one line, without markup."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))


def filled(text: str, report: Report, second: Report | None = None) -> str:
    """The README with every block made again.

    Raises: ValueError on a block of another name or without its report, and where there is none.
    """

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        if name == "stable":
            if second is None:
                raise ValueError("readme_figures: --second must be given for the block stable")
            return f"{match[1]}\n{stable(report, second)}\n\n{match[4]}"
        if name not in BLOCKS:
            raise ValueError(
                f"readme_figures: a block must be one of {[*BLOCKS, 'stable']}, got {name!r}"
            )
        return f"{match[1]}\n{BLOCKS[name](report)}\n\n{match[4]}"

    result, count = _BLOCK.subn(replace, text)
    if not count or count != text.count("<!-- report: "):
        found = f"{count} of {text.count('<!-- report: ')}"
        raise ValueError(f"readme_figures: every block must be closed on a line, got {found}")
    return result


def main(
    report: Path,
    readme: Path,
    second: Annotated[Path | None, typer.Option(help="Report of another model.")] = None,
    check: Annotated[bool, typer.Option(help="Change nothing; fail if something would.")] = False,
) -> None:
    """Write the blocks, or check them."""
    try:
        before = readme.read_text()
        other = None if second is None else read_report(second)
        after = filled(before, read_report(report), other)
    except (CheckpointError, OSError, ValueError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    if check and before != after:
        typer.echo(f"readme_figures: {readme} must show the figures of {report}", err=True)
        raise typer.Exit(1)
    if not check and before != after:
        replace_file(readme, after.encode())


if __name__ == "__main__":
    typer.run(main)
