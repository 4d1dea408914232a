"""All that is kept of a study: its JSON, its page, and small pictures."""

from pathlib import Path

from lraee.storage.json import write_json
from lraee.study.page import pictures
from lraee.study.page.page import write_page
from lraee.study.schema import Report


def write_report(report: Report, folder: Path) -> list[Path]:
    """Writes report.json first, then report.html and the pictures; each whole or not at all.

    Args:
      report: as study makes it.
      folder: created if missing.
    Returns: the files written.
    Raises: ImportError without jinja2 or matplotlib; report.json is there then.
    """
    written = [folder / "report.json", folder / "report.html"]
    write_json(report, written[0])
    write_page(report, written[1])
    return [*written, *pictures.save(report, folder)]
