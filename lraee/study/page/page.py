"""The page: one HTML file that needs nothing else, the same bytes for the same report."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lraee.storage.files import replace_file
from lraee.study.page import formatting
from lraee.study.page.charts import svg
from lraee.study.page.parts import parts
from lraee.study.schema import Finding, Report

_VERDICTS = {True: ("holds", "\u2713 holds"), False: ("fails", "\u2717 fails"),
             None: ("open", "? inconclusive")}  # fmt: skip


def write_page(report: Report, path: Path | str) -> None:
    """Writes the report as a page, whole or not at all.

    Args:
      report: as study makes it, or from read_report.
      path: the HTML file.
    Raises: ImportError without jinja2 or matplotlib.
    """
    replace_file(Path(path), render(report).encode())


def render(report: Report) -> str:
    """The page as text; everything that comes from the report is escaped."""
    template = environment().get_template("page.html.j2")
    text: str = template.render(
        report=report, parts=parts(report), verdict=_verdict,
        counts=_counts(report["findings"]),
    )  # fmt: skip
    return text


def environment() -> Any:
    """Templates beside this file, with formats and charts; all that they show is escaped.

    Raises: ImportError without jinja2.
    """
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined
    except ImportError as error:
        raise ImportError(
            f"report: jinja2 must be installed: pip install 'lraee[report]' ({error})"
        ) from error
    result: Environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    result.filters |= {"figure": formatting.figure, "backbone": formatting.backbone}
    result.globals["svg"] = svg
    return result


def _verdict(finding: Finding) -> tuple[str, str]:
    """Class and words."""
    return _VERDICTS[finding["holds"]]


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    kinds = [_VERDICTS[each["holds"]][0] for each in findings]
    return {kind: kinds.count(kind) for kind, _ in _VERDICTS.values()}
