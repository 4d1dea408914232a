"""The charts of a dose study."""

from lraee.study.dose import schema
from lraee.study.dose.cells import RECIPES
from lraee.study.dose.schema import DoseReport, Rescue
from lraee.study.page.charts import BLUE, GREEN, RED, Chart, Curve, Curves, Line, Look, Panel, Point
from lraee.study.page.formatting import backbone
from lraee.study.schema import FULL_DEPTH

LOOKS = {
    "paper": Look(RED, "^--"),
    "int8": Look(BLUE, "s-"),
    schema.CALIBRATED: Look(GREEN, "D:"),
}
_REACH = 2.0
"""Standard errors of a bar, either way."""


def of_curve(report: DoseReport) -> Curves:
    """The margin above the float control against what full depth loses; a panel per recipe."""
    panels = [
        Panel(
            recipe,
            [
                Curve(backbone(name), LOOKS[name], [_point(row) for row in rows])
                for name in schema.QUANTIZED
                for rows in [_rows(report, name, recipe)]
                if rows
            ],
            _as_many(report, recipe),
        )
        for recipe in RECIPES
    ]
    return Curves(
        "curve", "What exits rescue, above the float control, against what quantization loses",
        "top-1 lost to quantization at full depth, points",
        "rescued \u2212 lost, above float, points", panels, zero="float control",
        diagonal="all that was lost",
    )  # fmt: skip


def _as_many(report: DoseReport, recipe: str) -> tuple[float, str] | None:
    """How far above the float control a margin is 0."""
    control = _rows(report, "float", recipe)
    return (-control[0]["margin"]["value"], "as many rescued as lost") if control else None


def _rows(report: DoseReport, name: str, recipe: str) -> list[Rescue]:
    rows = [r for r in report["rescue"] if (r["backbone"], r["recipe"]) == (name, recipe)]
    return sorted(rows, key=lambda row: row["dose"])


def _point(row: Rescue) -> Point:
    x, y = row["quantization_loss"], row["owed"]
    label = f"{row['dose']:g}" if row["backbone"] == "paper" else ""
    return Point(x["value"], y["value"], _REACH * x["error"], _REACH * y["error"], label)


def of_noise(report: DoseReport) -> list[Chart]:
    """Noise to signal after the last third of the blocks by dose, and top-1 at full depth."""
    third = max(report["blocks"] // 3, 1)
    noise, top1 = [], []
    for name in schema.QUANTIZED:
        rows = [each for each in report["noise"] if each["backbone"] == name]
        nsr = [100.0 * sum(b["nsr"] for b in each["blocks"][-third:]) / third for each in rows]
        noise.append(Line(backbone(name), LOOKS[name], [each["dose"] for each in rows], nsr))
        full = [r for r in report["systems"] if (r["backbone"], r["name"]) == (name, FULL_DEPTH)]
        spreads = [each["top1"] for each in full]
        top1.append(
            Line(
                backbone(name), LOOKS[name], [each["dose"] for each in full],
                [each["mean"] for each in spreads], [each["std"] for each in spreads],
            )
        )  # fmt: skip
    control = [
        row["top1"]["mean"] for row in report["systems"]
        if (row["backbone"], row["name"]) == ("float", FULL_DEPTH)
    ]  # fmt: skip
    level = (control[0], "float") if control else None
    charts = [
        Chart("nsr", "Noise-to-signal ratio in the last third of the blocks", "dose", "NSR, %",
              noise, is_log=True),
        Chart("top1", "Top-1 at full depth", "dose", "top-1, %", top1, level),
    ]  # fmt: skip
    return [each for each in charts if any(line.x for line in each.lines)]


def of_depth(report: DoseReport) -> list[Chart]:
    """Noise to signal by depth, a chart per backbone, a line per dose."""
    charts = []
    for place, name in enumerate(schema.QUANTIZED):
        rows = [noise for noise in report["noise"] if noise["backbone"] == name]
        lines = [
            Line(
                f"dose {noise['dose']:g}", _BY_PLACE[i % len(_BY_PLACE)],
                [float(b["block"]) for b in noise["blocks"]],
                [100.0 * b["nsr"] for b in noise["blocks"]],
            )
            for i, noise in enumerate(rows)
        ]  # fmt: skip
        title = f"Noise-to-signal ratio by depth, {backbone(name)}"
        if lines:
            charts.append(Chart(f"depth{place}", title, "block", "NSR, %", lines, is_log=True))
    return charts


_BY_PLACE = tuple(
    Look(colour, style)
    for colour, style in zip(
        (BLUE, GREEN, RED, BLUE, GREEN, RED), ("o-", "s-", "^-", "v--", "D--", "x--"), strict=True
    )
)
