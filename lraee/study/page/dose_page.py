"""The page of a dose study: one HTML file that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from lraee.storage.files import replace_file
from lraee.study.dose import schema
from lraee.study.dose.schema import Claim, DoseReport
from lraee.study.page import dose_plots, dose_tables
from lraee.study.page.page import environment
from lraee.study.page.parts import Part, Section

CURVE_WORDS = (
    "Each point is a dose on one backbone, labelled for the paper's. To the right: what full depth "
    "loses to quantization. Up: photos that exits rescue minus those that they lose, above the "
    "same on the float control, which is the line at 0. On the dashed line exits would win back "
    'all that was lost; above the line "as many rescued as lost" they are right more often than '
    "full depth. Bars are two standard errors either way."
)


def write_dose_page(report: DoseReport, path: Path | str) -> None:
    """Writes the page, whole or not at all.

    Args:
      report: as dose_study makes it, or from read_doses.
      path: the HTML file.
    Raises: ImportError without jinja2 or matplotlib.
    """
    replace_file(Path(path), render(report).encode())


def render(report: DoseReport) -> str:
    """The page as text; everything that comes from the report is escaped."""
    template = environment().get_template("dose.html.j2")
    text: str = template.render(
        report=report, curve=curve(report), verdicts=verdicts(report), parts=parts(report),
        claims=[claim for claim in report["claims"] if claim["backbone"] == "paper"],
        titled=dose_tables.titled, kind=_kind,
    )  # fmt: skip
    return text


def curve(report: DoseReport) -> Section:
    """The picture that the study is about."""
    charts = [dose_plots.of_curve(report)] if report["rescue"] else []
    return Section("response", "Rescue against loss", CURVE_WORDS, charts)


def verdicts(report: DoseReport) -> Section:
    """Each claim by dose, the paper's INT8 first."""
    tables = [dose_tables.of_verdicts(report, name) for name in schema.QUANTIZED]
    tables = [table for table in tables if table.rows]
    words = (
        "On the paper's own INT8 first; under each dose, what full depth loses there. A dash: not "
        "measured, as where no exit was dropped or a system saves what the other cannot."
    )
    return Section("verdicts", "Verdicts by dose", words, tables=tables)


def _kind(claim: Claim) -> str:
    """The class of a claim's colour: of the largest dose that decides it."""
    decided = [v["holds"] for v in claim["verdicts"] if v["holds"] is not None]
    return ("holds" if decided[-1] else "fails") if decided else "open"


def parts(report: DoseReport) -> list[Part]:
    """Curve, noise, systems, what the verdicts rest on."""
    return [_curve(report), _noise(report), _systems(report), _evidence(report)]


def _curve(report: DoseReport) -> Part:
    terms = (
        ("Dose", "the factor of the outlier channels; 1 is the model as it is."),
        ("Rescued \u2212 lost", "photos right only with exits, minus those right only at full "
         "depth, in points of top-1."),
        ("Above float", "minus the same of the exits of the float control: what is owed to "
         "quantization."),
        ("Still below float", "what the tower with exits lacks of float at full depth."),
    )  # fmt: skip
    tables = [dose_tables.of_curve(report), dose_tables.of_quadrants(report)]
    words = "Every point of the curve, and the quadrants behind it."
    section = Section("rescue", "By dose", words, tables=tables if report["rescue"] else [])
    return Part(1, "Dose and response", terms, [section])


def _noise(report: DoseReport) -> Part:
    terms = (
        ("NSR", "noise-to-signal ratio: how far quantization moves the tokens after a block, over "
         "how far the block moves them in float."),
    )  # fmt: skip
    by_dose = dose_plots.of_noise(report) if report["noise"] else []
    by_depth = dose_plots.of_depth(report) if report["noise"] else []
    sections = [
        Section("by-dose", "Noise and accuracy by dose", "Float answers the same at every dose.",
                by_dose, dose_tables.of_float(report)),
        Section("by-depth", "Noise by depth", "Means over seeds.", by_depth,
                dose_tables.of_noise(report)),
    ]  # fmt: skip
    return Part(2, "Noise", terms, sections)


def _systems(report: DoseReport) -> Part:
    terms = (
        ("Static exit, PABEE, confidence", "stand on our recipe's heads, at its budget."),
        ("Head at the last block", "the same head with no exit at all: what a new head alone "
         "wins back, without leaving early."),
    )  # fmt: skip
    words = "Mean and standard deviation over seeds; in brackets FLOPs saved in percent."
    section = Section(
        "systems", "All systems by dose", words, tables=dose_tables.of_systems(report)
    )
    return Part(3, "Systems", terms, [section] if report["systems"] else [])


def _evidence(report: DoseReport) -> Part:
    terms: Sequence[tuple[str, str]] = (
        ("Difference", "what a claim says is above 0, on the same photos, mean over seeds."),
        ("Interval, corrected", "of the level at which Holm's procedure decided it."),
    )
    tables = dose_tables.of_differences(report) if report["claims"] else []
    section = Section("differences", "Differences", "Each dose of each claim.", tables=tables)
    return Part(4, "What the verdicts rest on", terms, [section])
