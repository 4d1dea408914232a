"""All that is kept of a study: its JSON, its page, and small pictures."""

from pathlib import Path

from lraee.storage.json import write_json
from lraee.study.dose.schema import DoseReport
from lraee.study.page import pictures
from lraee.study.page.dose_page import write_dose_page
from lraee.study.page.page import write_page
from lraee.study.page.reading import is_of_doses, read_doses, read_report
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


def write_doses(report: DoseReport, folder: Path) -> list[Path]:
    """Writes dose.json first, then dose.html and dose.svg; see write_report."""
    written = [folder / "dose.json", folder / "dose.html"]
    write_json(report, written[0])
    write_dose_page(report, written[1])
    return [*written, pictures.save_curve(report, folder / "dose.svg")]


def remade(path: Path) -> Path:
    """The page of a report.json or dose.json, written again beside it.

    Raises: lraee.CheckpointError on any other file, ImportError without jinja2 or matplotlib.
    """
    if is_of_doses(path):
        page = path.with_name("dose.html")
        write_dose_page(read_doses(path), page)
    else:
        page = path.with_name("report.html")
        write_page(read_report(path), page)
    return page
