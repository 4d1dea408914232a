"""Small pictures of a report for a README."""

from pathlib import Path

from lraee.storage.files import replace_file
from lraee.study.dose.schema import DoseReport
from lraee.study.page import dose_plots, plots
from lraee.study.page.charts import png, svg_file
from lraee.study.schema import Report


def save(report: Report, folder: Path | str) -> list[Path]:
    """Writes frontier.png, lens.png and drift.png, those that the report has figures for.

    Args:
      report: from read_report.
      folder: created if missing.
    Returns: the files written.
    Raises: ImportError without matplotlib.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    charts = {"frontier": plots.of_frontier, "lens": plots.of_lens, "drift": plots.of_drift}
    for name, of in charts.items():
        for chart in of(report)[:1]:
            written.append(folder / f"{name}.png")
            replace_file(written[-1], png(chart))
    return written


def save_curve(report: DoseReport, path: Path | str) -> Path:
    """Writes the curve of a dose study as an SVG that reads on light and dark pages alike.

    Raises: ImportError without matplotlib.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, svg_file(dose_plots.of_curve(report)).encode())
    return path
